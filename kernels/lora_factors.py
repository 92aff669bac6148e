"""The factors of several adapters laid out for one product: all A stacked, all s B in the columns of one matrix.

    down = [A_1; A_2; ...; 0]        up = [s_1 B_1 |  0        | ... | 0]   rows of adapter 1
                                          [0       |  s_2 B_2  | ... | 0]   rows of adapter 2

A product with `up` then serves every adapter at once, the zeros keeping them apart. A training step makes both anew
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

from grpo.kernels.launch import on_device, portable, round_to, triton_serves

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
    """An adapter's term of a product: shrunk [M, R], which is x A^T, times the transpose of b [N, R], which is s B."""

    shrunk: Tensor
    b: Tensor

    def beside(self, x: Tensor) -> Tensor:
        """[x | shrunk] [M, K + R], of x [M, K]: what [W | s B] multiplies."""
        return torch.cat([x, self.shrunk], 1)


def with_bias(low_rank: LowRank | None, bias: Tensor | None, rows: int) -> LowRank | None:
    """`bias` [N] as one more column of `low_rank`, for `rows` rows of x: cuBLAS rounds before it adds a bias."""
    if bias is None:
        return low_rank
    shrunk, b = bias.new_zeros(rows, BIAS_COLUMNS), bias.new_zeros(bias.shape[0], BIAS_COLUMNS)
    shrunk[:, 0] = 1
    b[:, 0] = bias
    if low_rank is None:
        return LowRank(shrunk, b)
    return LowRank(torch.cat([low_rank.shrunk, shrunk], 1), torch.cat([low_rank.b, b], 1))


def lay_out(adapters: Sequence[Adapter], factors: Sequence[Tensor], down: Tensor, up: Tensor) -> None:
    """Write every element of `down` [R, K] and `up` [N, R], R at least the sum of the ranks.

    factors: A_1, B_1, A_2, B_2, ... of `adapters`, float32 or 16 bit. `down` and `up` have one dtype and a last stride
    of 1; s B is multiplied in float32 and rounded once.
    """
    if triton_serves(down) and 0 < len(adapters) <= MOST_ADAPTERS:
        launch_lay_out(adapters, factors, down, up)
        return
    down.zero_()
    up.zero_()
    start = 0
    for adapter, a, b in zip(adapters, factors[0::2], factors[1::2], strict=True):
        ranks = slice(start, start + a.shape[0])
        down[ranks].copy_(a)
        torch.mul(b, adapter.scale, out=up[adapter.first : adapter.first + adapter.rows, ranks])
        start = ranks.stop


def launch_lay_out(adapters: Sequence[Adapter], factors: Sequence[Tensor], down: Tensor, up: Tensor) -> None:
    """The Triton form of `lay_out`."""
    (width, columns), rows = down.shape, up.shape[0]
    assert up.shape[1] == width and down.dtype == up.dtype and down.stride(1) == up.stride(1) == 1
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
    tiles = triton.cdiv(columns, TILE)
    with on_device(down):
        _lay_out_kernel[(tiles + triton.cdiv(rows, TILE), triton.cdiv(width, TILE))](
            *pointers, *numbers, down, up, width, columns, rows, down.stride(0), up.stride(0), tiles,
            TILE, portable(down), num_warps=4,
        )  # fmt: skip


NUMBERS = [f"{name}{index}" for index in range(MOST_ADAPTERS) for name in ("start", "rank", "first", "count", "scale")]


@triton.jit(do_not_specialize=[*NUMBERS, "width", "columns", "rows", "tiles"])
def _lay_out_kernel(
    a0, b0, a1, b1, a2, b2,
    start0, rank0, first0, count0, scale0, start1, rank1, first1, count1, scale1,
    start2, rank2, first2, count2, scale2,
    down, up, width, columns, rows, down_stride, up_stride, tiles, TILE: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    """A tile of `down` (the first `tiles` programs) or of `up`."""
    DTYPE: tl.constexpr = down.dtype.element_ty
    tile = tl.program_id(0)
    rank = tl.program_id(1) * TILE + tl.arange(0, TILE)
    if tile < tiles:
        row = rank.to(tl.int64)[:, None]
        column = (tile * TILE + tl.arange(0, TILE))[None, :]
        value = _part_of_a(a0, row, column, start0, rank0, columns)
        value += _part_of_a(a1, row, column, start1, rank1, columns)
        value += _part_of_a(a2, row, column, start2, rank2, columns)
        inside = (row < width) & (column < columns)
        tl.store(down + row * down_stride + column, round_to(value, DTYPE, PORTABLE), mask=inside)
    else:
        row = ((tile - tiles) * TILE + tl.arange(0, TILE)).to(tl.int64)[:, None]
        column = rank[None, :]
        value = _part_of_b(b0, row, column, start0, rank0, first0, count0, scale0)
        value += _part_of_b(b1, row, column, start1, rank1, first1, count1, scale1)
        value += _part_of_b(b2, row, column, start2, rank2, first2, count2, scale2)
        inside = (row < rows) & (column < width)
        tl.store(up + row * up_stride + column, round_to(value, DTYPE, PORTABLE), mask=inside)


@triton.jit
def _part_of_a(a, row, column, start, ranks, columns):
    """A [ranks, columns], whose first row is row `start` of the result; zeros around it."""
    own = row - start
    inside = (own >= 0) & (own < ranks) & (column < columns)
    return tl.load(a + own * columns + column, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _part_of_b(b, row, column, start, ranks, first, count, scale):
    """scale * B [count, ranks], whose first element is (`first`, `start`) of the result; zeros around it."""
    own_row, own_column = row - first, column - start
    inside = (own_row >= 0) & (own_row < count) & (own_column >= 0) & (own_column < ranks)
    value = tl.load(b + own_row * ranks + own_column, mask=inside, other=0.0).to(tl.float32)
    return value * scale
