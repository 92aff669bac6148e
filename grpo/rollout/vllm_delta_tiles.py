"""One choice of tiles for each of vLLM's kernels of gated DeltaNet over prompts, where vLLM tries a hundred.

Trying compiles them all, one after another, before the first token: minutes at the first start of a machine. And two
starts may choose differently, and then round differently.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from importlib import import_module
from typing import Any

KERNELS = "vllm.third_party.flash_linear_attention.ops"
WARPS, STAGES, SIDE = 4, 2, 64
"""Of the choices that a kernel has, the nearest to these numbers of warps and stages and this side of a tile."""


def settle_tiles() -> int:
    """Leave each kernel one choice; how many had several."""
    tuned = [tuner for module in modules() for value in vars(module).values() if (tuner := tuner_of(value)) is not None]
    several = {id(tuner): tuner for tuner in tuned if len(tuner.configs) > 1}
    for tuner in several.values():
        tuner.configs = [min(tuner.configs, key=distance)]
    return len(several)


def modules() -> Iterator[Any]:
    """Those that vLLM has its kernels in."""
    package = import_module(KERNELS)
    for found in pkgutil.iter_modules(package.__path__):
        yield import_module(f"{KERNELS}.{found.name}")


def tuner_of(value: Any) -> Any:
    """What tries the choices of the kernel `value`, below whatever wraps it; None where nothing does."""
    while value is not None:
        own = getattr(value, "__dict__", {})
        if isinstance(own.get("configs"), list):
            return value
        value = own.get("fn")
    return None


def distance(config: Any) -> tuple[float, ...]:
    """How far a choice is from the middle ones."""
    sides = [size for size in config.kwargs.values() if isinstance(size, int)]
    return (
        max(config.num_warps / WARPS, WARPS / config.num_warps),
        abs(config.num_stages - STAGES),
        sum(max(size / SIDE, SIDE / size) for size in sides),
    )
