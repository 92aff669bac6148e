"""The fused NF4 product for sm_75, where Triton makes no use of tensor cores: y = x W^T in float16.

Triton would multiply tiles by single instructions there and spill what does not fit. This kernel names the instruction
itself, mma.sync.m16n8k8: every tensor in it is one number a thread, so that a thread's place in its warp is known and
what it loads is what the instruction wants of it. No shared memory, nothing changes lanes: in the stored form of nf4.py
a lane's own words decode to its part of W (docs/nf4-kernel.md), and pairs of x lie as they are.

A program has WARPS * N_TILES * 16 rows of W and M_TILES * 8 rows of x, over its share of K. Products are added in the
order of K and the splits of K in their order, as in nf4_gemm.py; a row's bits do not depend on its batch.

Not here: bfloat16, which sm_75 has not; the choice of tiles.
"""

# Triton unrolls tuples that grow; a type checker takes the first one's length for good.
# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo.kernels import nf4
from grpo.kernels.launch import on_device
from grpo.kernels.lora_factors import LowRank
from grpo.kernels.nf4_lookup import _interpreted_bits, byte_tables
from grpo.kernels.nf4_tiles import Tile, fits
from grpo.kernels.split_k import store_part, sum_parts, workspace

DECODE = tl.constexpr(
    """{
.reg .b32 a, b, upper, lower;
prmt.b32 a, $4, $5, $2;
prmt.b32 b, $6, $7, $2;
prmt.b32 upper, a, b, $3;
prmt.b32 a, $8, $9, $2;
prmt.b32 b, $10, $11, $2;
prmt.b32 lower, a, b, $3;
prmt.b32 a, lower, upper, 0x4051;
prmt.b32 b, lower, upper, 0x6273;
mul.rn.f16x2 $0, a, $12;
mul.rn.f16x2 $1, b, $12;
}"""
)
"""Two pairs of values from the nibbles of a word's low half, times a scale: as `nf4_lookup.PRMT`, columns in order."""

MULTIPLY = tl.constexpr(
    "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {$0, $1, $2, $3}, {$4, $5}, {$6}, {$7, $8, $9, $10};"
)


def launch_turing(
    x: Tensor, packed: Tensor, absmax: Tensor, bias: Tensor | None, out: Tensor, tile: Tile, split: int,
    low_rank: LowRank | None = None, *, interpreted: bool = False,
) -> None:  # fmt: skip
    """The kernel. Arguments as `nf4_gemm.launch_gemm` takes them, in float16; x and its rows start at multiples of 4
    bytes. interpreted: the form for Triton's interpreter."""
    rows, columns = x.shape
    features = packed.shape[0]
    words, scales = nf4.stored_rows(packed, absmax, 0, features, columns)
    assert words.is_contiguous() and scales.is_contiguous(), "groups of 8 rows lie one after the other"
    assert x.dtype == absmax.dtype == out.dtype == torch.float16 and x.stride(1) == out.stride(1) == 1
    pairs = in_pairs(x)
    scratch, counters = workspace(x.device)
    assert fits(tile, split, rows, features), "the workspace holds every partial sum"
    x_lora_a, b, ranks = (x, x, 0) if low_rank is None else (low_rank.x_lora_a, low_rank.b, low_rank.b.shape[1])
    if low_rank is not None:
        assert x_lora_a.shape == (rows, ranks) and b.shape == (features, ranks) and ranks % 16 == 0
        assert x_lora_a.is_contiguous() and b.is_contiguous() and x_lora_a.dtype == b.dtype == x.dtype
        x_lora_a, b = x_lora_a.view(torch.int32), b.view(torch.int32)
    else:
        x_lora_a = b = pairs
    grid = (triton.cdiv(rows, tile.m), triton.cdiv(features, tile.n), split)
    with on_device(x):
        _turing_kernel[grid](
            pairs, words.view(torch.int32), scales.view(torch.int32), out if bias is None else bias, out,
            scratch.view(torch.float32), counters, x_lora_a, b,
            rows, features, columns, words.shape[1], 2 * pairs.stride(0), out.stride(0), *byte_tables(x.dtype),
            tile.warps, tile.n // (16 * tile.warps), tile.m // 8, split, columns % nf4.TILE != 0, bias is not None,
            ranks, interpreted, num_warps=tile.warps,
        )  # fmt: skip


def in_pairs(x: Tensor) -> Tensor:
    """float16 [M, K] as int32 [M, K / 2]: a view, or a copy where rows are not pairs of neighbours in memory."""
    if x.stride(0) % 2 or x.storage_offset() % 2:
        x = x.contiguous()
    return x.view(torch.int32)


@triton.jit
def _decoded(word, scale, HALF: tl.constexpr, t0, t1, t2, t3, t4, t5, t6, t7, INTERPRETED: tl.constexpr):
    """This lane's pair of the first eight columns of 16 of block HALF, and of the next eight."""
    if INTERPRETED:
        pair = (scale & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
        first = _interpreted_pair(word, pair, HALF * 16 + 4, HALF * 16, t0, t1, t2, t3, t4, t5, t6, t7)
        second = _interpreted_pair(word, pair, HALF * 16 + 12, HALF * 16 + 8, t0, t1, t2, t3, t4, t5, t6, t7)
        return first, second
    low = word & 0x77777777
    choice = ((word >> 1) & 0x44444444) | 0x32103210
    return tl.inline_asm_elementwise(
        DECODE, "=r,=r,r,r,r,r,r,r,r,r,r,r,r",
        [low >> (16 * HALF), choice >> (16 * HALF), t0, t1, t2, t3, t4, t5, t6, t7, scale],
        dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _twice(pair, HALF: tl.constexpr):
    """One of two 16-bit numbers, in both halves of a word."""
    value = (pair >> (16 * HALF)) & 0xFFFF
    return value | (value << 16)


@triton.jit
def _interpreted_pair(word, scale, LOW: tl.constexpr, HIGH: tl.constexpr, t0, t1, t2, t3, t4, t5, t6, t7):
    low = _interpreted_bits(word, LOW, t0, t1, t2, t3, t4, t5, t6, t7).to(tl.float16, bitcast=True)
    high = _interpreted_bits(word, HIGH, t0, t1, t2, t3, t4, t5, t6, t7).to(tl.float16, bitcast=True)
    low, high = (low * scale).to(tl.int16, bitcast=True), (high * scale).to(tl.int16, bitcast=True)
    return (high.to(tl.int32) << 16) | (low.to(tl.int32) & 0xFFFF)


@triton.jit
def _multiplied(upper, lower, x, s0, s1, s2, s3, INTERPRETED: tl.constexpr):
    """Sums of 16 rows of W times 8 of x after eight more columns; upper, lower: rows 0 to 7 and 8 to 15 of W."""
    if INTERPRETED:
        return _interpreted_sums(upper, x, s0, s1) + _interpreted_sums(lower, x, s2, s3)
    return tl.inline_asm_elementwise(
        MULTIPLY, "=f,=f,=f,=f,r,r,r,f,f,f,f", [upper, lower, x, s0, s1, s2, s3],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _interpreted_sums(left, right, s0, s1):
    WARPS: tl.constexpr = left.shape[0] // 32
    a = tl.reshape(_halves(left), [WARPS, 8, 1, 4, 2]).to(tl.float32)
    b = tl.reshape(_halves(right), [WARPS, 1, 8, 4, 2]).to(tl.float32)
    product = tl.sum(tl.sum(a * b, 4), 3)
    even, odd = tl.split(tl.reshape(product, [WARPS * 32, 2]))
    return s0 + even, s1 + odd


@triton.jit
def _halves(pair):
    low = (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
    return tl.join(low, (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True))


@triton.jit
def _rows_multiplied(uppers, lowers, xs, sums, N_TILES: tl.constexpr, M_TILES: tl.constexpr, INTERPRETED: tl.constexpr):
    """Every part of W times every part of x, for eight columns."""
    new = ()
    for n in tl.static_range(N_TILES):
        for m in tl.static_range(M_TILES):
            new += _multiplied(
                uppers[n], lowers[n], xs[m], sums[4 * (n * M_TILES + m)], sums[4 * (n * M_TILES + m) + 1],
                sums[4 * (n * M_TILES + m) + 2], sums[4 * (n * M_TILES + m) + 3], INTERPRETED,
            )  # fmt: skip
    return new


@triton.jit
def _pairs_of_x(x_ptrs, m, rows, column, columns, M_TILES: tl.constexpr, TAIL: tl.constexpr):
    """Two neighbouring columns of x for every part of its rows, as int32."""
    pairs = ()
    for index in tl.static_range(M_TILES):
        mask = m + 8 * index < rows
        if TAIL:  # times a padded block of zeros, so it has to be finite
            mask = mask & (column < columns)
        pairs += (tl.load(x_ptrs[index] + column // 2, mask=mask, other=0),)
    return pairs


@triton.jit(do_not_specialize=["rows", "tiles"])
def _turing_kernel(
    x_ptr, words_ptr, scales_ptr, bias_ptr, out_ptr, partial_ptr, counters_ptr, x_lora_a_ptr, b_ptr,
    rows, features, columns, tiles, stride_x_m, stride_out_m, t0, t1, t2, t3, t4, t5, t6, t7,
    WARPS: tl.constexpr, N_TILES: tl.constexpr, M_TILES: tl.constexpr, SPLIT: tl.constexpr, HALF_TAIL: tl.constexpr,
    HAS_BIAS: tl.constexpr, RANKS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """words_ptr: [N / 8, tiles, 8, 16]; scales_ptr: pairs, [N / 8, tiles, 8]; x and x_lora_a: pairs, as int32."""
    THREADS: tl.constexpr = 32 * WARPS
    SUMS: tl.constexpr = 4 * N_TILES * M_TILES
    thread = tl.arange(0, THREADS)
    r, c = thread % 32 // 4, thread % 4
    n0 = (tl.program_id(1) * WARPS + thread // 32) * (16 * N_TILES)
    m = tl.program_id(0) * (8 * M_TILES) + r
    last_group = features // 8 - 1
    word_ptrs, scale_ptrs, x_ptrs, sums = (), (), (), ()
    for index in tl.static_range(2 * N_TILES):
        group = tl.minimum(n0 // 8 + index, last_group)
        word_ptrs += (words_ptr + (group * tiles * 8 + r) * 16 + 4 * c,)
        scale_ptrs += (scales_ptr + group * tiles * 8 + r,)
    for index in tl.static_range(M_TILES):
        x_ptrs += (x_ptr + (m + 8 * index) * (stride_x_m // 2),)
    for _ in tl.static_range(SUMS):
        sums += (tl.zeros([THREADS], tl.float32),)
    share = tl.cdiv(tiles, SPLIT)
    first = tl.program_id(2) * share
    for tile in range(first, tl.minimum(first + share, tiles)):
        word, pair = (), ()
        for index in tl.static_range(2 * N_TILES):
            pair += (tl.load(scale_ptrs[index] + tile * 8),)
            for w in tl.static_range(4):
                word += (tl.load(word_ptrs[index] + tile * 128 + w),)
        for half in tl.static_range(2):
            for w in tl.static_range(4):
                near0, near1, far0, far1 = (), (), (), ()
                for n in tl.static_range(N_TILES):
                    here, there = _decoded(
                        word[8 * n + w], _twice(pair[2 * n], half), half, t0, t1, t2, t3, t4, t5, t6, t7, INTERPRETED
                    )  # fmt: skip
                    near0 += (here,)
                    far0 += (there,)
                    here, there = _decoded(
                        word[8 * n + 4 + w], _twice(pair[2 * n + 1], half), half, t0, t1, t2, t3, t4, t5, t6, t7,
                        INTERPRETED,
                    )  # fmt: skip
                    near1 += (here,)
                    far1 += (there,)
                column = tile * 128 + half * 64 + w * 16 + 2 * c
                xs = _pairs_of_x(x_ptrs, m, rows, column, columns, M_TILES, HALF_TAIL and half == 1)
                sums = _rows_multiplied(near0, near1, xs, sums, N_TILES, M_TILES, INTERPRETED)
                xs = _pairs_of_x(x_ptrs, m, rows, column + 8, columns, M_TILES, HALF_TAIL and half == 1)
                sums = _rows_multiplied(far0, far1, xs, sums, N_TILES, M_TILES, INTERPRETED)
    if RANKS > 0:
        if tl.program_id(2) == SPLIT - 1:
            sums = _low_rank_added(
                sums, x_lora_a_ptr, b_ptr, n0 + r, m, c, rows, features, RANKS, N_TILES, M_TILES, INTERPRETED
            )  # fmt: skip
    if SPLIT == 1:
        _store(sums, out_ptr, bias_ptr, n0 + r, m - r + 2 * c, rows, features, stride_out_m, N_TILES, M_TILES, HAS_BIAS)
    else:
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        part_ptrs = partial_ptr + tile * (SPLIT * SUMS * THREADS) + thread
        own_part_ptrs = part_ptrs + tl.program_id(2) * (SUMS * THREADS)
        for index in tl.static_range(1, SUMS):
            tl.store(own_part_ptrs + index * THREADS, sums[index])
        if store_part(sums[0], own_part_ptrs, counters_ptr + tile, SPLIT):
            total = ()
            for index in tl.static_range(SUMS):
                total += (sum_parts(part_ptrs + index * THREADS, SUMS * THREADS, SPLIT),)
            _store(
                total, out_ptr, bias_ptr, n0 + r, m - r + 2 * c, rows, features, stride_out_m,
                N_TILES, M_TILES, HAS_BIAS,
            )  # fmt: skip
            tl.store(counters_ptr + tile, 0)


@triton.jit
def _low_rank_added(
    sums, x_lora_a_ptr, b_ptr, n, m, c, rows, features,
    RANKS: tl.constexpr, N_TILES: tl.constexpr, M_TILES: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """`sums` plus b times the transpose of x_lora_a; both as pairs of ranks."""
    for rank in tl.static_range(0, RANKS // 2, 4):
        uppers, lowers, xs = (), (), ()
        for index in tl.static_range(N_TILES):
            row = n + 16 * index
            uppers += (tl.load(b_ptr + row * (RANKS // 2) + rank + c, mask=row < features, other=0),)
            lowers += (tl.load(b_ptr + (row + 8) * (RANKS // 2) + rank + c, mask=row + 8 < features, other=0),)
        for index in tl.static_range(M_TILES):
            row = m + 8 * index
            xs += (tl.load(x_lora_a_ptr + row * (RANKS // 2) + rank + c, mask=row < rows, other=0),)
        sums = _rows_multiplied(uppers, lowers, xs, sums, N_TILES, M_TILES, INTERPRETED)
    return sums


@triton.jit
def _store(
    sums, out_ptr, bias_ptr, n, m, rows, features, stride_out_m, N_TILES: tl.constexpr, M_TILES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """A lane has rows n and n + 8 of W with rows m and m + 1 of x, of every 16 x 8."""
    for one in tl.static_range(N_TILES):
        for other in tl.static_range(M_TILES):
            for index in tl.static_range(4):
                row = n + 16 * one + 8 * (index // 2)
                column = m + 8 * other + index % 2
                value = sums[4 * (one * M_TILES + other) + index]
                if HAS_BIAS:
                    value += tl.load(bias_ptr + row, mask=row < features, other=0.0).to(tl.float32)
                mask = (row < features) & (column < rows)
                tl.store(out_ptr + column * stride_out_m + row, value.to(out_ptr.dtype.element_ty), mask=mask)
