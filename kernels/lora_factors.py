"""The factors of several adapters laid out for one product: all A stacked, all s B in the columns of one matrix.

    lora_a = [A_1; A_2; ...; 0]      lora_b = [s_1 B_1 |  0        | ... | 0]   rows of adapter 1
                                              [0       |  s_2 B_2  | ... | 0]   rows of adapter 2

A product with `lora_b` then serves every adapter at once, the zeros keeping them apart. A training step makes both anew
for each layer and pass, since A and B are float32 and have just been changed; it is one launch, for up to three
adapters (q, k, v), because a host that launches a dozen small ones a layer holds up the GPU.

Not here: the products (lora_linear.py), and the engine's copy of an adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo.kernels.launch import cdiv, is_interpreted, on_device, round_to, triton_supports

TILE = 64
"""Rows and columns of a program's tile."""
BIAS_COLUMNS = 8
"""Of 16-bit numbers, 16 bytes: rows stay aligned."""
MOST_ADAPTERS = 3
"""That one launch takes."""


class Adapter(NamedTuple):
    """A LoRA pair on `rows` output features from `first`. Its A [r, in] and B [rows, r] are passed beside."""

    first: int
    rows: int
    scale: float


@dataclass(frozen=True)
class LowRank:
    """An adapter's term of a product: x_lora_a [M, R], x A^T, times the transpose of b [N, R], which is s B."""

    x_lora_a: Tensor
    b: Tensor
    pending: bool = False
    """Whether the last kernel launched before the product is the `lora_shrink` that writes x_lora_a: a product that can
    begin before that has ended may do so."""

    def concat_to(self, x: Tensor) -> Tensor:
        """[x | x_lora_a] [M, K + R], of x [M, K]: what [W | s B] multiplies."""
        return torch.cat([x, self.x_lora_a], 1)


def with_bias(low_rank: LowRank | None, bias: Tensor | None, rows: int) -> LowRank | None:
    """`bias` [N] as one more column of `low_rank`, for `rows` rows of x: cuBLAS rounds before it adds a bias."""
    if bias is None:
        return low_rank
    x_lora_a, b = bias.new_zeros(rows, BIAS_COLUMNS), bias.new_zeros(bias.shape[0], BIAS_COLUMNS)
    x_lora_a[:, 0] = 1
    b[:, 0] = bias
    if low_rank is None:
        return LowRank(x_lora_a, b)
    return LowRank(torch.cat([low_rank.x_lora_a, x_lora_a], 1), torch.cat([low_rank.b, b], 1))


def pack_lora(adapters: Sequence[Adapter], factors: Sequence[Tensor], lora_a: Tensor, lora_b: Tensor) -> None:
    """Write every element of `lora_a` [R, K] and `lora_b` [N, R], R at least the sum of the ranks.

    factors: A_1, B_1, A_2, B_2, ... of `adapters`, float32 or 16 bit. `lora_a` and `lora_b` have one dtype and a last
    stride of 1; s B is multiplied in float32 and rounded once.
    """
    if triton_supports(lora_a) and 0 < len(adapters) <= MOST_ADAPTERS:
        launch_pack_lora(adapters, factors, lora_a, lora_b)
        return
    lora_a.zero_()
    lora_b.zero_()
    start = 0
    for adapter, a, b in zip(adapters, factors[0::2], factors[1::2], strict=True):
        ranks = slice(start, start + a.shape[0])
        lora_a[ranks].copy_(a)
        torch.mul(b, adapter.scale, out=lora_b[adapter.first : adapter.first + adapter.rows, ranks])
        start = ranks.stop


def launch_pack_lora(adapters: Sequence[Adapter], factors: Sequence[Tensor], lora_a: Tensor, lora_b: Tensor) -> None:
    """The Triton form of `pack_lora`."""
    (width, columns), rows = lora_a.shape, lora_b.shape[0]
    assert lora_b.shape[1] == width and lora_a.dtype == lora_b.dtype and lora_a.stride(1) == lora_b.stride(1) == 1
    pointers: list[Tensor] = []
    numbers: list[int | float] = []
    rank = 0
    for adapter, a, b in zip(adapters, factors[0::2], factors[1::2], strict=True):
        assert a.shape[1] == columns and b.shape == (adapter.rows, a.shape[0]), (a.shape, b.shape, adapter)
        pointers += [a.contiguous(), b.contiguous()]
        numbers += [rank, a.shape[0], adapter.first, adapter.rows, float(adapter.scale)]
        rank += a.shape[0]
    assert rank <= width, (rank, width)
    for _ in range(len(adapters), MOST_ADAPTERS):
        pointers += pointers[:2]
        numbers += [0, 0, 0, 0, 0.0]
    tiles = cdiv(columns, TILE)
    with on_device(lora_a):
        _pack_lora_kernel[(tiles + cdiv(rows, TILE), cdiv(width, TILE))](
            *pointers, *numbers, lora_a, lora_b, width, columns, rows, lora_a.stride(0), lora_b.stride(0), tiles,
            TILE, is_interpreted(lora_a), num_warps=4,
        )  # fmt: skip


NUMBERS = [f"{name}{index}" for index in range(MOST_ADAPTERS) for name in ("start", "rank", "first", "count", "scale")]


@triton.jit(do_not_specialize=[*NUMBERS, "width", "columns", "rows", "tiles"])
def _pack_lora_kernel(
    a0_ptr, b0_ptr, a1_ptr, b1_ptr, a2_ptr, b2_ptr,
    start0, rank0, first0, count0, scale0, start1, rank1, first1, count1, scale1,
    start2, rank2, first2, count2, scale2,
    lora_a_ptr, lora_b_ptr, width, columns, rows, stride_lora_a_m, stride_lora_b_m, tiles,
    TILE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A tile of lora_a (the first `tiles` programs) or of lora_b."""
    DTYPE: tl.constexpr = lora_a_ptr.dtype.element_ty
    tile = tl.program_id(0)
    rank = tl.program_id(1) * TILE + tl.arange(0, TILE)
    if tile < tiles:
        row = rank.to(tl.int64)[:, None]
        column = (tile * TILE + tl.arange(0, TILE))[None, :]
        value = _part_of_a(a0_ptr, row, column, start0, rank0, columns)
        value += _part_of_a(a1_ptr, row, column, start1, rank1, columns)
        value += _part_of_a(a2_ptr, row, column, start2, rank2, columns)
        inside = (row < width) & (column < columns)
        tl.store(lora_a_ptr + row * stride_lora_a_m + column, round_to(value, DTYPE, INTERPRETED), mask=inside)
    else:
        row = ((tile - tiles) * TILE + tl.arange(0, TILE)).to(tl.int64)[:, None]
        column = rank[None, :]
        value = _part_of_b(b0_ptr, row, column, start0, rank0, first0, count0, scale0)
        value += _part_of_b(b1_ptr, row, column, start1, rank1, first1, count1, scale1)
        value += _part_of_b(b2_ptr, row, column, start2, rank2, first2, count2, scale2)
        inside = (row < rows) & (column < width)
        tl.store(lora_b_ptr + row * stride_lora_b_m + column, round_to(value, DTYPE, INTERPRETED), mask=inside)


@triton.jit
def _part_of_a(a_ptr, row, column, start, ranks, columns):
    """A [ranks, columns], whose first row is row `start` of the result; zeros around it."""
    own = row - start
    inside = (own >= 0) & (own < ranks) & (column < columns)
    return tl.load(a_ptr + own * columns + column, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _part_of_b(b_ptr, row, column, start, ranks, first, count, scale):
    """scale * B [count, ranks], whose first element is (`first`, `start`) of the result; zeros around it."""
    own_row, own_column = row - first, column - start
    inside = (own_row >= 0) & (own_row < count) & (own_column >= 0) & (own_column < ranks)
    value = tl.load(b_ptr + own_row * ranks + own_column, mask=inside, other=0.0).to(tl.float32)
    return value * scale
