"""x A^T for a LoRA adapter's narrow A, in one launch: the first half of y += (x A^T) B^T while sampling.

The second half is added by nf4_gemm.py while its result is still in registers, so an adapter costs one small launch a
layer, and from sm_90 on the product can begin while that runs: it needs x A^T only at its end. A has a few dozen rows
and thousands of columns, so the work is split along K over the GPU's multiprocessors; whichever program finishes last
adds the parts in their order. A row's result has the same bits whatever other rows there are, up to MOST_ROWS; above,
the product is cuBLAS's.

Not here: gradients, per-token choice among adapters. One stream at a time per device (nf4_gemm.py's workspace).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from grpo.kernels import cards
from grpo.kernels.launch import on_device, round_to
from grpo.kernels.sizes import RANK_MULTIPLE
from grpo.kernels.split_k import COUNTERS, SHRINK_BYTES, dot, store_part, sum_parts, workspace

MOST_ROWS = 512
"""Rows of x up to which our kernel is used: a decoding batch, not a prompt."""
ROWS = 16
"""Rows of x per program, the least a tensor core takes."""
COLUMNS = 128
"""Columns of x per step of a program."""
STEPS = 2
"""Steps per program: more would leave multiprocessors idle, fewer would spend the time on adding up."""
LARGEST_SPLIT = 32


def lora_shrink(x: Tensor, a: Tensor, scale: Tensor, *, overlapped: bool = False) -> Tensor:
    """scale * (x [M, K] times the transpose of a [R, K]): [M, R], rounded once to x's dtype.

    a: contiguous, in x's dtype, R a multiple of RANK_MULTIPLE. scale: one number of x's dtype, read on the device, so
    that a captured graph follows its changes. Sums are float32. Records no gradient. By cuBLAS, as for prompts and on
    sm_75, a scale other than 0 and 1 would be a second rounding. overlapped: from sm_90 on it is launched while the
    kernel in front of it runs, and a product with a pending `LowRank` while this one does.
    """
    if serves(x):
        return launch_shrink(x, a, scale, overlapped=overlapped and cards.card(x.device).overlaps)
    return F.linear(x, a) * scale


def serves(x: Tensor) -> bool:
    """Whether the kernel takes x [M, K]: 16 bit, a decoding batch, a GPU on which Triton multiplies."""
    return x.is_cuda and x.dtype != torch.float32 and 0 < x.shape[0] <= MOST_ROWS and cards.card(x.device).dot_is_fast


def launch_shrink(
    x: Tensor, a: Tensor, scale: Tensor, *, interpreted: bool = False, overlapped: bool = False
) -> Tensor:
    """The kernel. interpreted: the form for Triton's interpreter."""
    rows, columns = x.shape
    ranks = a.shape[0]
    assert a.shape[1] == columns and a.dtype == x.dtype == scale.dtype and x.element_size() == 2
    assert a.is_contiguous() and x.stride(1) == 1 and scale.numel() == 1 and ranks % RANK_MULTIPLE == 0
    block, split = cut(ranks, columns)
    grid = (triton.cdiv(rows, ROWS), ranks // block, split)
    assert grid[0] * grid[1] <= COUNTERS and grid[0] * grid[1] * split * ROWS * block * 4 <= SHRINK_BYTES
    out = torch.empty(rows, ranks, dtype=x.dtype, device=x.device)
    scratch, counters = workspace(x.device, SHRINK_BYTES)
    with on_device(x):
        _shrink_kernel[grid](
            x, a, scale, out, scratch.view(torch.float32), counters, rows, columns, x.stride(0),
            ranks, block, split, ROWS, COLUMNS, columns % COLUMNS != 0, interpreted,
            overlapped, num_warps=4, launch_pdl=overlapped,
        )  # fmt: skip
    return out


def cut(ranks: int, columns: int) -> tuple[int, int]:
    """How many ranks a program has, and how many programs share the columns."""
    block = next(size for size in (64, 32, 16) if ranks % size == 0)
    return block, min(LARGEST_SPLIT, triton.cdiv(columns, COLUMNS * STEPS))


@triton.jit(do_not_specialize=["rows"])
def _shrink_kernel(
    x_ptr, a_ptr, scale_ptr, out_ptr, partial_ptr, counters_ptr, rows, columns, stride_x_m,
    RANKS: tl.constexpr, BR: tl.constexpr, SPLIT: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    TAIL: tl.constexpr, INTERPRETED: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """out [BM, BR] = x [BM, part of K] a [BR, part of K]^T."""
    if OVERLAPPED:
        tl.extra.cuda.gdc_wait()  # for x: this may be launched while that is computed
        tl.extra.cuda.gdc_launch_dependents()  # a product that waits for this at its end may begin
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    k = tl.arange(0, BK)
    x_ptrs = x_ptr + (m * stride_x_m)[:, None] + k[None, :]
    a_ptrs = a_ptr + (r * columns)[None, :] + k[:, None]
    steps = tl.cdiv(columns, BK)
    share = tl.cdiv(steps, SPLIT)
    first = tl.program_id(2) * share
    total = tl.zeros([BM, BR], tl.float32)
    for step in tl.range(first, tl.minimum(first + share, steps)):
        x_mask = (m < rows)[:, None]
        if TAIL:
            inside = step * BK + k < columns
            x_tile = tl.load(x_ptrs + step * BK, mask=x_mask & inside[None, :], other=0.0)
            a_tile = tl.load(a_ptrs + step * BK, mask=inside[:, None], other=0.0)
        else:
            x_tile = tl.load(x_ptrs + step * BK, mask=x_mask, other=0.0)
            a_tile = tl.load(a_ptrs + step * BK)
        total = dot(x_tile, a_tile, total, INTERPRETED)
    out_ptrs = out_ptr + (m * RANKS)[:, None] + r[None, :]
    if SPLIT == 1:
        total *= tl.load(scale_ptr).to(tl.float32)
        tl.store(out_ptrs, round_to(total, out_ptr.dtype.element_ty, INTERPRETED), mask=(m < rows)[:, None])
    else:
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        part_ptrs = partial_ptr + tile * SPLIT * BM * BR + tl.arange(0, BM)[:, None] * BR + tl.arange(0, BR)[None, :]
        if store_part(total, part_ptrs + tl.program_id(2) * BM * BR, counters_ptr + tile, SPLIT):
            total = sum_parts(part_ptrs, BM * BR, SPLIT)
            total *= tl.load(scale_ptr).to(tl.float32)
            tl.store(out_ptrs, round_to(total, out_ptr.dtype.element_ty, INTERPRETED), mask=(m < rows)[:, None])
            tl.store(counters_ptr + tile, 0)
