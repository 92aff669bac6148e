"""A product split along K: the workspace of its partial sums, the program that adds them up last, and what joins the
sums before they are rounded, once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo.kernels.launch import round_to

WORKSPACE_BYTES = 64 << 20
"""Per device: a dequantised piece of a weight, or the partial sums of a split product."""
COUNTERS = 1 << 14
"""Output tiles of a split product, at most."""

SHRINK_BYTES = 16 << 20
"""The same for x A^T, which runs beside the product that adds it (lora_shrink.py)."""

_workspaces: dict[tuple[torch.device, int], tuple[Tensor, Tensor]] = {}


def workspace(device: torch.device, size: int = WORKSPACE_BYTES) -> tuple[Tensor, Tensor]:
    """(uint8 [size], int32 zeros [COUNTERS]) of `device`, made by the first call; one for each size."""
    if (device, size) not in _workspaces:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("call nf4_gemm.prepare(device) before a CUDA graph is captured")
        with torch.inference_mode(False):
            scratch = torch.empty(size, dtype=torch.uint8, device=device)
            _workspaces[device, size] = scratch, torch.zeros(COUNTERS, dtype=torch.int32, device=device)
    return _workspaces[device, size]


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


@triton.jit
def add_low_rank(
    total, x_lora_a_ptr, b_ptr, m, n, rows, features, stride_x_lora_a_m, stride_b_n, stride_b_r,
    RANKS: tl.constexpr, BR: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """total [BN, BM] plus b [BN, RANKS] times the transpose of x_lora_a [BM, RANKS], BR ranks at a time."""
    r = tl.arange(0, BR)
    for start in tl.static_range(0, RANKS, BR):
        rank = start + r
        b_ptrs = b_ptr + n.to(tl.int64)[:, None] * stride_b_n + rank[None, :] * stride_b_r
        left = tl.load(b_ptrs, mask=(n < features)[:, None] & (rank < RANKS)[None, :], other=0.0)
        x_lora_a_ptrs = x_lora_a_ptr + (m * stride_x_lora_a_m)[None, :] + rank[:, None]
        right = tl.load(x_lora_a_ptrs, mask=(m < rows)[None, :] & (rank < RANKS)[:, None], other=0.0)
        total = dot(left, right, total, INTERPRETED)
    return total


@triton.jit
def store_rounded(
    total, out_ptr, bias_ptr, m, n, rows, features, stride_out_m, HAS_BIAS: tl.constexpr, INTERPRETED: tl.constexpr
):  # fmt: skip
    """Rows `m`, columns `n` of out [rows, features]: the transpose of total [BN, BM], plus bias, rounded."""
    if HAS_BIAS:
        total += tl.load(bias_ptr + n, mask=n < features, other=0.0).to(tl.float32)[:, None]
    out_ptrs = out_ptr + m[None, :] * stride_out_m + n[:, None]
    mask = (m < rows)[None, :] & (n < features)[:, None]
    tl.store(out_ptrs, round_to(total, out_ptr.dtype.element_ty, INTERPRETED), mask=mask)
