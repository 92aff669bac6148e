"""What a kernel has to know of a GPU: its architecture, the shared memory of a block, multiprocessors, the L2 cache.

The architecture is Triton's, so that a kernel compiled for another one than the GPU's own is planned for that one too.
Not here: speeds, which are measured (nf4_plans.py), and what fits a card's memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
import triton

KB = 1 << 10
MB = 1 << 20

SHARED_MEMORY = {
    75: 64 * KB, 80: 163 * KB, 86: 99 * KB, 87: 163 * KB, 89: 99 * KB, 90: 227 * KB, 100: 227 * KB, 103: 227 * KB,
    110: 227 * KB, 120: 99 * KB, 121: 99 * KB,
}  # fmt: skip
"""Architecture -> bytes of shared memory that one block may have."""

MatrixUnit = Literal["none", "m16n8k8", "mma", "wgmma", "tcgen05"]
"""Which instruction multiplies 16-bit tiles: Triton's, or on sm_75, where it uses none, our own (nf4_turing.py)."""


@dataclass(frozen=True)
class Card:
    """A GPU, or a slice of one, as a kernel sees it."""

    name: str
    architecture: int
    """90 for sm_90."""
    shared_memory: int
    multiprocessors: int
    l2: int

    @property
    def unit(self) -> MatrixUnit:
        return matrix_unit(self.architecture)

    @property
    def dot_is_fast(self) -> bool:
        """Whether Triton's `dot` of 16-bit tiles uses tensor cores; elsewhere it spills registers by the kilobyte."""
        return self.architecture >= 80

    @property
    def overlaps(self) -> bool:
        """Whether a kernel may begin before the one in front of it has ended (programmatic dependent launch)."""
        return overlaps(self.architecture)


OVERLAPPED_LAUNCHES = True
"""For benchmarks to switch: whole rollouts have the same bits either way."""


def overlaps(architecture: int) -> bool:
    """As `Card.overlaps`."""
    return OVERLAPPED_LAUNCHES and architecture >= 90


def matrix_unit(architecture: int) -> MatrixUnit:
    """Of an architecture. sm_120 has mma.sync again."""
    if architecture < 80:
        return "m16n8k8" if architecture == 75 else "none"
    if 90 <= architecture < 120:
        return "wgmma" if architecture < 100 else "tcgen05"
    return "mma"


def architecture() -> int:
    """The architecture that Triton compiles for on the current device."""
    return int(triton.runtime.driver.active.get_current_target().arch)


@lru_cache
def card(device: torch.device) -> Card:
    """What `device`, a GPU, says of itself."""
    properties = torch.cuda.get_device_properties(device)
    with torch.cuda.device(device):
        compiled_for = architecture()
    capability = properties.major * 10 + properties.minor
    known = SHARED_MEMORY.get(compiled_for, 99 * KB)
    block = getattr(properties, "shared_memory_per_block_optin", known) if compiled_for == capability else known
    return Card(
        properties.name,
        compiled_for,
        block,
        properties.multi_processor_count,
        getattr(properties, "L2_cache_size", 4 * MB),
    )
