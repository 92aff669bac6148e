"""A product split along K: the workspace of its partial sums, and the program that adds them up last."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WORKSPACE_BYTES = 64 << 20
"""Per device: a dequantised piece of a weight, or the partial sums of a split product."""
COUNTERS = 1 << 14
"""Output tiles of a split product, at most."""

_workspaces: dict[torch.device, tuple[Tensor, Tensor]] = {}


def workspace(device: torch.device) -> tuple[Tensor, Tensor]:
    """(uint8 [WORKSPACE_BYTES], int32 zeros [COUNTERS]) of `device`, made by the first call."""
    if device not in _workspaces:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("call nf4_gemm.prepare(device) before a CUDA graph is captured")
        with torch.inference_mode(False):
            scratch = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
            _workspaces[device] = scratch, torch.zeros(COUNTERS, dtype=torch.int32, device=device)
    return _workspaces[device]


@triton.jit
def store_part(part, part_ptrs, counter_ptr, SPLIT: tl.constexpr):
    """Store this program's part of a sum; whether all SPLIT parts are there now. Who finds that clears the counter."""
    tl.store(part_ptrs, part)
    tl.debug_barrier()  # every thread's part is written before one thread says so
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel") == SPLIT - 1


@triton.jit
def sum_parts(part_ptrs, SIZE: tl.constexpr, SPLIT: tl.constexpr):
    """The SPLIT parts at `part_ptrs`, `part_ptrs` + SIZE, ..., added in their order."""
    total = tl.load(part_ptrs, cache_modifier=".cg")
    for index in tl.static_range(1, SPLIT):
        total += tl.load(part_ptrs + index * SIZE, cache_modifier=".cg")
    return total


@triton.jit
def dot(a, b, total, INTERPRETED: tl.constexpr):
    if INTERPRETED:  # the interpreter multiplies bf16 as if it were integers
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, b, total)
