"""y = x W^T + b for W in 8 bit (eight_bit.py): codes are multiplied as they are read where that is faster.

With few rows of x one kernel decodes a tile of W in registers and multiplies it; with many W is dequantised piece by
piece and cuBLAS multiplies. A LoRA adapter's second half, (x A^T) (s B)^T, joins the sums before they are rounded, by
either way.

The kernel's result for a row of x has the same bits whatever other rows there are, up to MOST_ROWS: K is split by the
shape of W alone, each split is summed in the order of K, and the splits are added in their order.

Not here: gradients. One stream at a time per device: calls share a workspace.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo.kernels import cards, eight_bit
from grpo.kernels.cards import Card
from grpo.kernels.launch import disable_reduced_precision, on_device, round_to
from grpo.kernels.lora_factors import LowRank, with_bias
from grpo.kernels.nf4_lookup import load_rows, tile_columns
from grpo.kernels.nf4_tiles import piece_bytes
from grpo.kernels.split_k import (
    COUNTERS,
    WORKSPACE_BYTES,
    add_low_rank,
    dot,
    store_part,
    store_rounded,
    sum_parts,
    workspace,
)

MOST_ROWS = 128
"""Beyond, dequantising and cuBLAS take less time."""
TILE_FEATURES, TILE_COLUMNS, MOST_STAGES = 64, 128, 4
"""Of W in a program's tile, and how many such tiles are on their way from memory at the most."""
BUSY_PROGRAMS = 256
"""Programs below which K is split: two for each multiprocessor of a large GPU (measured on an H200)."""
LARGEST_SPLIT = 4
ORDERED_ROWS = 32
"""Rows from which x is put into the order of the words once, by a copy, and not by every program as it loads it: two
numbers at a time, which is what takes the time then."""
PIECE_ROWS = 256
"""A dequantised piece of W is a multiple of so many rows: cuBLAS takes three times as long for odd ones."""


@dataclass(frozen=True)
class Tile:
    """What a program has at once: `n` rows of W, `k` columns; `stages` tiles on their way from memory."""

    n: int = 64
    k: int = 128
    split: int = 1
    stages: int = 4
    warps: int = 4
    words: bool = False
    """Whether codes are read as words, in the order in which wgmma wants them in registers; `k` is 128 then."""


def eight_bit_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    low_rank: LowRank | None = None,
) -> Tensor:
    """x [M, K] times the transpose of W [N, K], plus bias [N], plus `low_rank`: [M, N] in x's dtype.

    codes, scales: as eight_bit.py has them. out: where to write, [M, N] with its last stride 1. Sums are float32,
    rounded once. Records no gradient. Raises ValueError for shapes or strides outside this.
    """
    rows, columns = x.shape
    features = codes.shape[0]
    if columns != codes.shape[1] or x.stride(1) != 1:
        raise ValueError(f"x is {tuple(x.shape)} with strides {x.stride()}; the weight takes [M, {codes.shape[1]}]")
    if out is None:
        out = torch.empty(rows, features, dtype=x.dtype, device=x.device)
    if out.shape != (rows, features) or out.dtype != x.dtype or out.stride(1) != 1:
        raise ValueError(f"out must be {x.dtype} [{rows}, {features}] with a last stride of 1")
    if rows == 0:
        return out
    if fused_serves(x, codes, scales):
        launch_fused(x, codes, scales, bias, out, low_rank, tile_for(cards.card(x.device), codes, scales, rows))
    else:
        dequantized_linear(x, codes, scales, bias, out, low_rank)
    return out


def dequantized_linear(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, out: Tensor, low_rank: LowRank | None = None
) -> None:
    """`eight_bit_linear` by dequantising W piece by piece into the workspace, with the adapter's b, and a bias, in
    further columns: one product a piece, rounded once."""
    disable_reduced_precision()
    features, columns = codes.shape
    low_rank = with_bias(low_rank, bias, x.shape[0])
    wide = columns + (0 if low_rank is None else low_rank.b.shape[1])
    scratch, _ = workspace(x.device)
    most = min(piece_bytes(cards.card(x.device)) if x.is_cuda else WORKSPACE_BYTES, WORKSPACE_BYTES)
    shared = features // scales.shape[0]
    if (common := math.gcd(shared, PIECE_ROWS)) != shared:  # so that a piece ends where a scale does
        scales = scales.repeat_interleave(shared // common, 0)
    step = max(1, most // (wide * x.element_size()) // PIECE_ROWS) * PIECE_ROWS
    x_and_lora = x if low_rank is None else low_rank.concat_to(x)
    for start in range(0, features, step):
        part = slice(start, min(start + step, features))
        matrix = scratch.view(x.dtype)[: (part.stop - start) * wide].view(-1, wide)
        eight_bit.dequantize(codes[part], eight_bit.row_scales(scales, codes, part), x.dtype, out=matrix[:, :columns])
        if low_rank is not None:
            matrix[:, columns:].copy_(low_rank.b[part])
        torch.mm(x_and_lora, matrix.t(), out=out[:, part])


def fused_serves(x: Tensor, codes: Tensor, scales: Tensor) -> bool:
    """Whether the kernel takes these: 16 bit, few rows, a GPU on which Triton multiplies, and groups as wide as a
    tile."""
    return (
        x.is_cuda
        and x.dtype in (torch.bfloat16, torch.float16)
        and x.shape[0] <= MOST_ROWS
        and cards.card(x.device).dot_is_fast
        and (scales.shape[1] == 1 or eight_bit.group_width(codes.shape[1], scales.shape[1]) >= 32)
        and codes.shape[1] % 16 == 0
    )


def tile_for(card: Card, codes: Tensor, scales: Tensor, rows: int) -> Tile:
    """The tile for a product of `rows`. `k`, `split` and `words`, which decide a result's bits, follow from W and the
    card alone."""
    features, columns = codes.shape
    width = eight_bit.group_width(columns, scales.shape[1])
    k = TILE_COLUMNS if scales.shape[1] == 1 else min(TILE_COLUMNS, width)
    words = card.unit == "wgmma" and k == TILE_COLUMNS and columns % TILE_COLUMNS == 0
    split = 1
    while (
        split < LARGEST_SPLIT
        and triton.cdiv(features, TILE_FEATURES) * split < BUSY_PROGRAMS
        and columns >= 1024 * split
    ):
        split *= 2
    tile_rows = max(16, triton.next_power_of_2(rows))
    # Codes and x of every stage, and once the decoded values, which Triton may put in shared memory too.
    n = 2 * TILE_FEATURES if words and split == 1 and tile_rows == 16 else TILE_FEATURES
    stage, once = n * k + 2 * tile_rows * k, 2 * n * k
    return Tile(n, k, split, max(1, min(MOST_STAGES, (card.shared_memory - once) // stage)), words=words)


def launch_fused(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, out: Tensor, low_rank: LowRank | None, tile: Tile,
    *, interpreted: bool = False,
) -> None:  # fmt: skip
    """The fused kernel. Arguments as `eight_bit_linear` has checked them; interpreted: for Triton's interpreter."""
    (rows, columns), features = x.shape, codes.shape[0]
    width, groups = eight_bit.group_width(columns, scales.shape[1]), scales.shape[1]
    assert codes.stride(1) == x.stride(1) == out.stride(1) == 1 and scales.is_contiguous()
    assert x.dtype == out.dtype and x.element_size() == 2 and (bias is None or bias.is_contiguous())
    assert groups == 1 or width % tile.k == 0, "a tile lies in one group of columns"
    assert not tile.words or (tile.k == TILE_COLUMNS and columns % tile.k == 0 and codes.stride(0) % 4 == 0)
    x_lora_a, b, ranks = (x, x, 0) if low_rank is None else (low_rank.x_lora_a, low_rank.b, low_rank.b.shape[1])
    assert low_rank is None or (x_lora_a.shape == (rows, ranks) and b.shape == (features, ranks))
    tile_rows = max(16, triton.next_power_of_2(rows))
    tiles = triton.cdiv(features, tile.n)
    assert tile.split == 1 or (tiles <= COUNTERS and 4 * tiles * tile.split * tile.n * tile_rows <= WORKSPACE_BYTES)
    scratch, counters = workspace(x.device)
    ordered = tile.words and tile_rows >= ORDERED_ROWS
    if ordered:
        x = in_words_order(x)
    with on_device(x):
        _gemm_8bit_kernel[(tiles, tile.split)](
            x, codes.view(torch.int8), scales, x if bias is None else bias, x_lora_a, b, out,
            scratch.view(torch.float32), counters, rows, features, columns, x.stride(0), codes.stride(0),
            x_lora_a.stride(0), b.stride(0), b.stride(1), out.stride(0), features // scales.shape[0], groups, width,
            codes.dtype == eight_bit.FP8, groups > 1, tile.n, tile_rows, tile.k, tile.split, tile.stages,
            columns % tile.k == 0, bias is not None, ranks, min(64, triton.next_power_of_2(max(ranks, 16))),
            tile.words, ordered, tile.warps, interpreted, num_warps=tile.warps,
        )  # fmt: skip


def in_words_order(x: Tensor) -> Tensor:
    """x [M, K] with every 64 columns in the order in which a matrix unit meets the codes of words: where 16 codes lie
    beside each other in memory, and so in one thread, the unit wants two of each thread after two of the one before."""
    return x.unflatten(1, (-1, 4, 4, 2, 2)).permute(0, 1, 3, 4, 2, 5).reshape(x.shape)


@triton.jit(do_not_specialize=["rows"])
def _gemm_8bit_kernel(
    x_ptr, codes_ptr, scales_ptr, bias_ptr, x_lora_a_ptr, b_ptr, out_ptr, partial_ptr, counters_ptr,
    rows, features, columns, stride_x_m, stride_codes_n, stride_x_lora_a_m, stride_b_n, stride_b_r, stride_out_m,
    shared, groups, width,
    IS_FP8: tl.constexpr, GROUPED: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    SPLIT: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr, HAS_BIAS: tl.constexpr, RANKS: tl.constexpr,
    BR: tl.constexpr, WORDS: tl.constexpr, ORDERED: tl.constexpr, WARPS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """out^T [BN, BM] = W [BN, part of K] x^T: the long side of the tile is W's, which a matrix unit wants."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    known = tl.minimum(n, features - 1)
    m = tl.arange(0, BM)
    k = tl.arange(0, BK)
    steps = tl.cdiv(columns, BK)
    share = tl.cdiv(steps, SPLIT)
    first = tl.program_id(1) * share
    code_ptrs = codes_ptr + known.to(tl.int64)[:, None] * stride_codes_n + k[None, :]
    scale_ptrs = scales_ptr + known // shared * groups
    x_ptrs = x_ptr + (m * stride_x_m)[None, :] + k[:, None]
    inside = (m < rows)[None, :]
    total = tl.zeros([BN, BM], tl.float32)
    if not GROUPED:
        scale = tl.load(scale_ptrs)
    if WORDS:
        loaded = tl.minimum(tl.program_id(0) * BN + load_rows(BN, WARPS), features - 1)
        word_ptrs = codes_ptr.to(tl.pointer_type(tl.int32)) + (loaded * (stride_codes_n // 4))[:, None]
        word_ptrs += tl.arange(0, 16)[None, :]
        slot = tl.arange(0, 64)
        if ORDERED:
            order = slot
        else:
            order = slot // 2 % 4 * 16 + slot // 16 * 4 + slot // 8 % 2 * 2 + slot % 2
            order = tl.max_contiguous(tl.multiple_of(order, [2]), [2])
        ordered_ptrs = x_ptr + (m * stride_x_m)[None, :] + order[:, None]
    for step in tl.range(first, tl.minimum(first + share, steps), num_stages=STAGES):
        column = step * BK
        if GROUPED:
            scale = tl.load(scale_ptrs + column // width)
        if WORDS:
            for half in tl.static_range(2):
                word = tl.load(word_ptrs + (step * 32 + half * 16))
                value = tile_columns(eight_bit.decoded_words(word, IS_FP8, INTERPRETED), BN, WARPS)
                factor = scale * 256.0 if IS_FP8 else scale
                left = round_to(value * factor[:, None], DTYPE, INTERPRETED)
                right = tl.load(ordered_ptrs + column + half * 64, mask=inside, other=0.0)
                total = dot(left, right, total, INTERPRETED)
        elif EVEN:
            code = tl.load(code_ptrs + column)
            right = tl.load(x_ptrs + column, mask=inside, other=0.0)
        else:
            code = tl.load(code_ptrs + column, mask=(column + k < columns)[None, :], other=0)
            right = tl.load(x_ptrs + column, mask=inside & (column + k < columns)[:, None], other=0.0)
        if not WORDS:
            left = eight_bit.decoded(code, scale[:, None], DTYPE, IS_FP8, INTERPRETED)
            total = dot(left, right, total, INTERPRETED)
    if RANKS > 0:
        if tl.program_id(1) == SPLIT - 1:
            total = add_low_rank(
                total, x_lora_a_ptr, b_ptr, m, n, rows, features, stride_x_lora_a_m, stride_b_n, stride_b_r,
                RANKS, BR, INTERPRETED,
            )  # fmt: skip
    if SPLIT == 1:
        store_rounded(total, out_ptr, bias_ptr, m, n, rows, features, stride_out_m, HAS_BIAS, INTERPRETED)
    else:
        tile = tl.program_id(0)
        part_ptrs = partial_ptr + tile * SPLIT * BN * BM + tl.arange(0, BN)[:, None] * BM + m[None, :]
        if store_part(total, part_ptrs + tl.program_id(1) * BN * BM, counters_ptr + tile, SPLIT):
            total = sum_parts(part_ptrs, BN * BM, SPLIT)
            store_rounded(total, out_ptr, bias_ptr, m, n, rows, features, stride_out_m, HAS_BIAS, INTERPRETED)
            tl.store(counters_ptr + tile, 0)
