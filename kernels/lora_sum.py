"""y = x W^T + b + s U^T for a dense W, rounded once: a LoRA adapter's term never meets a result already rounded.

In 16 bit a step of training moves y by less than half a unit in its last place, at first and at small learning rates
nearly everywhere. Added to a rounded y such a step is lost; added to the sum before it is rounded, it shows wherever
it carries the sum across a boundary, which over many outputs is on average its whole size (docs/algorithms.md).

Three ways, the same to rounding. With W, U and x, s beside each other one product does all, for a copy of W:

    y = [x | s | 1] [W | U | b]^T

With few rows a copy of W would take longer than the product. There the product is left in float32, and a kernel adds
the rest and rounds; with a decoding step's rows one kernel does both (dense_gemm.py). Which it is follows from device
and sizes alone.

Not here: packed weights (nf4_gemm.py, which sums in registers or fills [W | U] by dequantising), gradients, s = x A^T.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo.kernels import cards, dense_gemm
from grpo.kernels.launch import disable_reduced_precision, is_interpreted, on_device, round_to
from grpo.kernels.lora_factors import LowRank, with_bias
from grpo.kernels.split_k import dot

FLOAT32_BYTES = 64 << 20
"""Largest float32 sum that is written out and read again: beyond, copying W is faster, and takes less memory."""
PIECE_BYTES = 64 << 20
"""Of [W | U] at a time."""
MOST_ROWS, FEATURES = 64, 128
"""Tile of a program that adds and rounds; of 16 rows where there are few, which would not fill a GPU."""


def sums_in_float32(like: Tensor, rows: int, features: int) -> bool:
    """Whether a product of `rows` x `features` numbers, in `like`'s dtype and on its device, is left in float32."""
    return like.is_cuda and like.element_size() == 2 and 4 * rows * features <= FLOAT32_BYTES


def dense_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, low_rank: LowRank | None, out: Tensor | None = None
) -> Tensor:
    """x [M, K] times the transpose of weight [N, K], plus bias [N], plus `low_rank`: [M, N] in x's dtype.

    One dtype and device. out: where to write, its last stride 1. Sums are float32 (in 16 bit), rounded once. Records no
    gradient.
    """
    rows, features = x.shape[0], weight.shape[0]
    disable_reduced_precision()
    out = x.new_empty(rows, features) if out is None else out
    if low_rank is None and bias is None:
        return torch.mm(x, weight.t(), out=out)
    if low_rank is None and not x.is_cuda:
        return torch.addmm(bias, x, weight.t(), out=out)
    if dense_gemm.serves(x, weight):
        dense_gemm.dense_gemm(x, weight, bias, low_rank, out)
    elif sums_in_float32(x, rows, features):
        round_sum(torch.mm(x, weight.t(), out_dtype=torch.float32), bias, low_rank, out)
    else:
        joined = with_bias(low_rank, bias, rows)
        assert joined is not None
        joined_linear(x, weight, joined, out)
    return out


def joined_linear(x: Tensor, weight: Tensor, low_rank: LowRank, out: Tensor) -> None:
    """out = [x | x_lora_a] [W | b]^T, from PIECE_BYTES of [W | b] at a time."""
    x_and_lora = low_rank.concat_to(x)
    step = max(FEATURES, PIECE_BYTES // (x_and_lora.shape[1] * x.element_size()) // FEATURES * FEATURES)
    for start in range(0, weight.shape[0], step):
        part = slice(start, min(start + step, weight.shape[0]))
        torch.mm(x_and_lora, torch.cat([weight[part], low_rank.b[part]], 1).t(), out=out[:, part])


def round_sum(total: Tensor, bias: Tensor | None, low_rank: LowRank | None, out: Tensor) -> None:
    """out = total + bias + s U^T, rounded once. total: float32 [M, N], contiguous; out: 16 bit, its last stride 1."""
    rows, features = total.shape
    x_lora_a, b = (
        (out[:, :0], out[:0, :0].new_empty(features, 0)) if low_rank is None else (low_rank.x_lora_a, low_rank.b)
    )
    ranks = b.shape[1]
    assert total.is_contiguous() and total.dtype == torch.float32 and out.shape == total.shape and out.stride(1) == 1
    assert x_lora_a.shape == (rows, ranks) and b.shape == (features, ranks) and x_lora_a.stride(1) == 1
    assert x_lora_a.dtype == b.dtype == out.dtype and (bias is None or bias.is_contiguous())
    tile_rows = 16 if rows <= MOST_ROWS else MOST_ROWS
    grid = (triton.cdiv(rows, tile_rows), triton.cdiv(features, FEATURES))
    with on_device(total):
        _round_sum_kernel[grid](
            total, out if bias is None else bias, x_lora_a, b, out, rows, features, x_lora_a.stride(0), b.stride(0),
            b.stride(1), out.stride(0), bias is not None, ranks, min(64, triton.next_power_of_2(max(ranks, 16))),
            tile_rows, FEATURES, has_dot(total), is_interpreted(total), num_warps=4,
        )  # fmt: skip


def has_dot(tensor: Tensor) -> bool:
    """Whether a kernel on `tensor` adds the adapter by matrix products; otherwise rank by rank."""
    return not tensor.is_cuda or cards.card(tensor.device).dot_is_fast


@triton.jit(do_not_specialize=["rows"])
def _round_sum_kernel(
    total_ptr, bias_ptr, x_lora_a_ptr, b_ptr, out_ptr, rows, features,
    stride_x_lora_a_m, stride_b_n, stride_b_r, stride_out_m,
    HAS_BIAS: tl.constexpr, RANKS: tl.constexpr, BR: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    HAS_DOT: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A [BM, BN] tile of the result."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    r = tl.arange(0, BR)
    inside = (m < rows)[:, None] & (n < features)[None, :]
    row = m.to(tl.int64)[:, None]
    value = tl.load(total_ptr + row * features + n[None, :], mask=inside, other=0.0)
    if HAS_BIAS:
        value += tl.load(bias_ptr + n, mask=n < features, other=0.0).to(tl.float32)[None, :]
    if not HAS_DOT:
        for rank in range(RANKS):
            left_ptrs = x_lora_a_ptr + row * stride_x_lora_a_m + rank
            left = tl.load(left_ptrs, mask=(m < rows)[:, None], other=0.0).to(tl.float32)
            b_ptrs = b_ptr + n.to(tl.int64) * stride_b_n + rank * stride_b_r
            value += left * tl.load(b_ptrs, mask=n < features, other=0.0).to(tl.float32)[None, :]
    for start in tl.static_range(0, RANKS if HAS_DOT else 0, BR):
        known = start + r < RANKS
        left_mask, right_mask = (m < rows)[:, None] & known[None, :], known[:, None] & (n < features)[None, :]
        left = tl.load(x_lora_a_ptr + row * stride_x_lora_a_m + start + r[None, :], mask=left_mask, other=0.0)
        b_ptrs = b_ptr + n[None, :].to(tl.int64) * stride_b_n + (start + r[:, None]) * stride_b_r
        right = tl.load(b_ptrs, mask=right_mask, other=0.0)
        value = dot(left, right, value, INTERPRETED)
    out_ptrs = out_ptr + row * stride_out_m + n[None, :]
    tl.store(out_ptrs, round_to(value, out_ptr.dtype.element_ty, INTERPRETED), mask=inside)
