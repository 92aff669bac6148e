"""Products of sorted rows with their experts' weights in NF4 or MXFP4: the fused kernel of nf4_gemm.py, grouped.

The stored matrices of the experts lie one below the other. A program multiplies a tile of one expert's rows of x with
some rows of that expert's W, which it looks up and scales in registers; experts without rows are not read. Tiles come
from routing.py, on the device, so nothing depends on the host and the launch can stand in a CUDA graph.

An adapter's second half, (x A^T) (s B)^T with factors of each expert, is added to the sums before they are rounded, as
a bias of each expert is; its first half is the same product with a small dense matrix. The columns of W are not split,
so a row's bits do not depend on other rows.

Not here: gradients and many rows (experts.py dequantises, and torch multiplies), routing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo.kernels import cards, mxfp4, nf4, routing
from grpo.kernels.experts import ExpertAdapter, ExpertAdapters, ExpertMatrix, Experts, multiply
from grpo.kernels.glu import glu_forward
from grpo.kernels.launch import is_interpreted, on_device, round_to
from grpo.kernels.mxfp4 import mx_scaled
from grpo.kernels.nf4_lookup import CODE, byte_tables, fenced, load_rows, lookup_half, scaled, tile_columns
from grpo.kernels.nf4_tiles import Tile
from grpo.kernels.routing import Record, Routes
from grpo.kernels.split_k import dot

SHRINK_COLUMNS = 128
"""Of x, a step of the product with A."""


class DecodeTiles(NamedTuple):
    """How the two products of experts are cut up; both have the same rows of x in a tile."""

    gate_up: Tile
    down: Tile


CANDIDATES = (Tile(128, 32, 4, 3, 2), Tile(64, 32, 4, 4, 2), Tile(128, 16, 4, 3, 1), Tile(64, 16, 4, 4, 1))
"""Tiles to take, the first that computes what a plain product does. Triton 3.6 compiles some wrongly: on an H200
Tile(128, 16, 4, 3, 2) lost rows from 8 sequences on, but not with an adapter."""
CHECKED_TOKENS, CHECKED_EXPERTS = (1, 8, 32, 128), 32
AGREES = 0.01
"""Largest relative difference of a product from torch's, where both round once."""

_tiles: dict[torch.device, Tile | None] = {}


class ExpertLowRank(NamedTuple):
    """An adapter's term for sorted rows: x_lora_a [rows, R], and b [experts, out, R], which is s B of each."""

    x_lora_a: Tensor
    b: Tensor


def serves(x: Tensor, experts: Experts, top_k: int) -> bool:
    """Whether `decode` takes x [tokens, hidden]: packed experts, few rows, a GPU on which `find_tile` found one."""
    packed = experts.gate_up.absmax is not None and x.element_size() == 2
    return packed and routing.serves(len(x), top_k) and _tiles.get(x.device) is not None


def find_tile(experts: Experts, top_k: int, ranks: int = 0) -> Tile | None:
    """The first of CANDIDATES that computes what torch does on this GPU, with some of `experts` and, where `ranks` is
    not 0, with adapters too; `serves` and `decode` go by it. None: the kernels are not used."""
    device = experts.gate_up.weight.device
    _tiles[device] = None
    if experts.gate_up.absmax is None or not cards.card(device).dot_is_fast:
        return None
    few = [first_experts(matrix, max(top_k, CHECKED_EXPERTS)) for matrix in (experts.gate_up, experts.down)]
    _tiles[device] = next(
        (tile for tile in CANDIDATES if all(agrees(matrix, top_k, tile, ranks) for matrix in few)), None
    )
    return _tiles[device]


def first_experts(matrix: ExpertMatrix, count: int) -> ExpertMatrix:
    """The first `count` of the experts."""
    experts, out, _ = matrix.shape
    count = min(count, experts)
    absmax = None if matrix.absmax is None else matrix.absmax[: count * out]
    return ExpertMatrix(
        matrix.weight[: count * out], absmax, count, None if matrix.bias is None else matrix.bias[:count]
    )


def agrees(matrix: ExpertMatrix, top_k: int, tile: Tile, ranks: int) -> bool:
    """Whether products by `tile` are torch's, for several numbers of tokens, without adapters and with some."""
    experts, out, columns = matrix.shape
    assert matrix.absmax is not None
    dtype, device = matrix.dtype, matrix.absmax.device
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device).to(dtype)

    for tokens in CHECKED_TOKENS:
        x, logits = random(tokens, columns), random(tokens, experts)
        routes = routing.choose(logits, top_k, True, tile.m)
        expert = routes.chosen.reshape(-1)[routes.order.long()].long()
        rows = x[routes.order.long() // top_k]
        for rank in {0, ranks}:
            low_rank = ExpertLowRank(random(len(rows), rank), random(experts, out, rank)) if rank else None
            wanted = multiply(rows, matrix.dense(), routes.ends, transposed=False).float()
            if matrix.bias is not None:
                wanted += matrix.bias.float()[expert]
            if low_rank is not None:
                wanted += torch.einsum("mr,mor->mo", low_rank.x_lora_a.float(), low_rank.b.float()[expert])
            ours = experts_linear(
                x, matrix.weight, matrix.absmax, routes, tile, top_k=top_k, bias=matrix.bias, low_rank=low_rank
            )
            if not float((ours.float() - wanted).norm()) <= AGREES * float(wanted.norm()):
                return False
    return True


def decode(
    x: Tensor, logits: Tensor, experts: Experts, top_k: int, renormalize: bool,
    adapters: ExpertAdapters | None = None, tiles: DecodeTiles | None = None, record: Record | None = None,
) -> Tensor:  # fmt: skip
    """x [tokens, hidden] through the experts that its router's logits choose, which `record` keeps; rounded once. Five
    launches, seven with adapters, none of which the host waits for."""
    tile = _tiles.get(x.device) or CANDIDATES[0]
    tiles = tiles or DecodeTiles(tile, tile)
    routes = routing.choose(logits, top_k, renormalize, tiles.gate_up.m, record)

    def product(rows: Tensor, matrix: ExpertMatrix, adapter: ExpertAdapter | None, tile: Tile, top_k: int) -> Tensor:
        low_rank = None
        if adapter is not None and adapters is not None and adapters.on is not None:
            shrunk = experts_shrink(rows, adapter.a, adapters.on, routes, tile.m, top_k=top_k)
            low_rank = ExpertLowRank(shrunk, adapter.b)
        assert matrix.absmax is not None
        return experts_linear(
            rows, matrix.weight, matrix.absmax, routes, tile, top_k=top_k, bias=matrix.bias, low_rank=low_rank
        )

    above, below = (None, None) if adapters is None else (adapters.gate_up, adapters.down)
    inner = glu_forward(product(x, experts.gate_up, above, tiles.gate_up, top_k), experts.activation)
    return combine(product(inner, experts.down, below, tiles.down, 1), routes)


def experts_linear(
    x: Tensor, packed: Tensor, absmax: Tensor, routes: Routes, tile: Tile, *, top_k: int = 1,
    bias: Tensor | None = None, low_rank: ExpertLowRank | None = None,
) -> Tensor:  # fmt: skip
    """[rows, out] in x's dtype: x of each place times the transpose of its expert's W, plus bias [experts, out].

    packed, absmax: the experts' matrices [experts * out, K] as `nf4.allocate` or `mxfp4.allocate` made them. `top_k`
    above 1: x [tokens, K] is unsorted, and the token of a place is `order // top_k`; else x [rows, K] is sorted. tile.m
    is the number of rows that the routes were cut into. Records no gradient.
    """
    experts, rows = len(routes.ends), len(routes.order)
    features, columns = packed.shape[0] // experts, packed.shape[1] * 2
    words, scales = nf4.stored_rows(packed, absmax, 0, packed.shape[0], columns)
    out = torch.empty(rows, features, dtype=x.dtype, device=x.device)
    assert features % 8 == 0 and x.stride(1) == 1 and x.shape[1] == columns and x.element_size() == 2
    mx = mxfp4.is_stored(absmax)
    assert x.dtype == (torch.bfloat16 if mx else absmax.dtype) and (bias is None or bias.is_contiguous())
    x_lora_a, b, ranks = (x, x, 0) if low_rank is None else (*low_rank, low_rank.b.shape[2])
    if low_rank is not None:
        assert x_lora_a.shape == (rows, ranks) and b.shape == (experts, features, ranks) and ranks % 16 == 0
        assert x_lora_a.is_contiguous() and b.is_contiguous() and x_lora_a.dtype == b.dtype == x.dtype
    grid = (triton.cdiv(features, tile.n), len(routes.expert))
    with on_device(x):
        _experts_kernel[grid](
            x, words.view(torch.int32), scales.view(torch.int32), x if bias is None else bias, out, x_lora_a, b,
            routes.order, routes.ends, routes.expert, routes.start, experts, features, columns, words.shape[1],
            x.stride(0), *byte_tables(x.dtype, mxfp4.VALUES if mx else CODE), tile.n, tile.m, tile.warps, tile.stages,
            tile.dots, columns % nf4.TILE != 0, top_k, bias is not None, ranks,
            min(64, triton.next_power_of_2(max(ranks, 16))), mx, is_interpreted(x),
            x.is_cuda and cards.card(x.device).unit == "mma", num_warps=tile.warps,
        )  # fmt: skip
    return out


def experts_shrink(x: Tensor, a: Tensor, scale: Tensor, routes: Routes, tile_rows: int, *, top_k: int = 1) -> Tensor:
    """scale * x A^T of each place: [rows, R] in x's dtype. a [experts, R, K], R a power of two from 16 on; scale: one
    number, read on the device. x and top_k as for `experts_linear`."""
    experts, ranks, columns = a.shape
    out = torch.empty(len(routes.order), ranks, dtype=x.dtype, device=x.device)
    assert a.is_contiguous() and x.stride(1) == 1 and x.shape[1] == columns and a.dtype == x.dtype
    assert ranks >= 16 and ranks & (ranks - 1) == 0
    with on_device(x):
        _shrink_experts_kernel[(len(routes.expert),)](
            x, a, scale, out, routes.order, routes.ends, routes.expert, routes.start, experts, columns, x.stride(0),
            ranks, tile_rows, SHRINK_COLUMNS, columns % SHRINK_COLUMNS != 0, top_k, is_interpreted(x), num_warps=4,
        )  # fmt: skip
    return out


def combine(rows: Tensor, routes: Routes) -> Tensor:
    """Every token's rows times their weights, added up in float32 and rounded once: [tokens, columns]."""
    tokens, top_k = routes.weights.shape
    columns = rows.shape[1]
    out = torch.empty(tokens, columns, dtype=rows.dtype, device=rows.device)
    block = min(1024, triton.next_power_of_2(columns))
    assert rows.is_contiguous() and routes.weights.is_contiguous()
    with on_device(rows):
        _combine_kernel[(tokens, triton.cdiv(columns, block))](
            rows, routes.weights, routes.place, out, columns, top_k, block, is_interpreted(rows), num_warps=4
        )
    return out


@triton.jit(do_not_specialize=["tiles"])
def _experts_kernel(
    x_ptr, words_ptr, scales_ptr, bias_ptr, out_ptr, x_lora_a_ptr, b_ptr, order_ptr, ends_ptr, expert_ptr, start_ptr,
    experts, features, columns, tiles, stride_x_m, t0, t1, t2, t3, t4, t5, t6, t7,
    BN: tl.constexpr, BM: tl.constexpr, WARPS: tl.constexpr, STAGES: tl.constexpr, DOTS: tl.constexpr,
    HALF_TAIL: tl.constexpr, TOP_K: tl.constexpr, HAS_BIAS: tl.constexpr, RANKS: tl.constexpr, BR: tl.constexpr,
    MX: tl.constexpr, INTERPRETED: tl.constexpr, FENCED: tl.constexpr,
):  # fmt: skip
    """out^T [BN, BM] = W of one expert [BN, K] x^T. Words: [N / 8, tiles, 8, 16]; scales: pairs, [N / 8, tiles, 8]."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    WIDTH: tl.constexpr = 128 // DOTS
    expert = tl.load(expert_ptr + tl.program_id(1))
    if expert < experts:
        m = tl.load(start_ptr + tl.program_id(1)) + tl.arange(0, BM)
        known = m < tl.load(ends_ptr + expert)
        row = m
        if TOP_K > 1:
            row = tl.load(order_ptr + m, mask=known, other=0) // TOP_K
        groups = features // 8
        first_group = expert.to(tl.int64) * groups
        n = tl.program_id(0) * BN + load_rows(BN, WARPS)
        group = first_group + tl.minimum(n // 8, groups - 1)
        word_ptrs = words_ptr + (group * tiles * 128 + n % 8 * 16)[:, None] + tl.arange(0, 16)[None, :]
        n = tl.program_id(0) * BN + tl.arange(0, BN)
        scale_ptrs = scales_ptr + (first_group + tl.minimum(n // 8, groups - 1)) * tiles * 8 + n % 8
        k = tl.arange(0, WIDTH)
        x_ptrs = x_ptr + (row.to(tl.int64) * stride_x_m)[None, :] + k[:, None]
        x_mask = known[None, :]
        total = tl.zeros([BN, BM], tl.float32)
        for tile in tl.range(0, tiles, num_stages=STAGES):
            word = tl.load(word_ptrs + tile * 128)
            pair = tl.load(scale_ptrs + tile * 8)
            low = tile_columns(lookup_half(word, 0, t0, t1, t2, t3, t4, t5, t6, t7, DTYPE, INTERPRETED), BN, WARPS)
            low = _block_scaled(low, pair, 0, MX, DTYPE, INTERPRETED)
            low = fenced(low, FENCED)
            high = tile_columns(lookup_half(word, 1, t0, t1, t2, t3, t4, t5, t6, t7, DTYPE, INTERPRETED), BN, WARPS)
            high = _block_scaled(high, pair, 1, MX, DTYPE, INTERPRETED)
            high = fenced(high, FENCED)
            last = x_mask
            if HALF_TAIL:  # times a padded block of zeros, so it has to be finite
                last = last & (tile * 128 + 128 - WIDTH + k < columns)[:, None]
            if DOTS == 2:
                total = dot(low, tl.load(x_ptrs + tile * 128, mask=x_mask, other=0.0), total, INTERPRETED)
                total = dot(high, tl.load(x_ptrs + tile * 128 + 64, mask=last, other=0.0), total, INTERPRETED)
            else:
                both = fenced(tl.reshape(tl.permute(tl.join(low, high), [0, 2, 1]), [BN, 128]), FENCED)
                total = dot(both, tl.load(x_ptrs + tile * 128, mask=last, other=0.0), total, INTERPRETED)
        inside = n < features
        if RANKS > 0:
            r = tl.arange(0, BR)
            left_ptrs = b_ptr + (expert.to(tl.int64) * features + n)[:, None] * RANKS
            right_ptrs = x_lora_a_ptr + m[None, :] * RANKS
            for begin in tl.static_range(0, RANKS, BR):
                ranks = begin + r < RANKS
                left = tl.load(left_ptrs + begin + r[None, :], mask=inside[:, None] & ranks[None, :], other=0.0)
                right = tl.load(right_ptrs + begin + r[:, None], mask=x_mask & ranks[:, None], other=0.0)
                total = dot(left, right, total, INTERPRETED)
        if HAS_BIAS:
            total += tl.load(bias_ptr + expert * features + n, mask=inside, other=0.0).to(tl.float32)[:, None]
        out_ptrs = out_ptr + m[None, :].to(tl.int64) * features + n[:, None]
        tl.store(out_ptrs, round_to(total, DTYPE, INTERPRETED), mask=x_mask & inside[:, None])


@triton.jit
def _block_scaled(
    values, pair, HALF: tl.constexpr, MX: tl.constexpr, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr
):  # fmt: skip
    """values [R, 64], half HALF of a tile, times their scales; pair int32 [R] holds those of the whole tile."""
    if MX:
        return mx_scaled(values, pair, HALF, INTERPRETED)
    elif HALF == 0:
        return scaled(values, (pair & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True), DTYPE, INTERPRETED)
    return scaled(values, (pair >> 16).to(tl.int16).to(DTYPE, bitcast=True), DTYPE, INTERPRETED)


@triton.jit
def _shrink_experts_kernel(
    x_ptr, a_ptr, scale_ptr, out_ptr, order_ptr, ends_ptr, expert_ptr, start_ptr, experts, columns, stride_x_m,
    RANKS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, TAIL: tl.constexpr, TOP_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """out [BM, RANKS] = scale * x [BM, K] A of one expert [RANKS, K]^T."""
    expert = tl.load(expert_ptr + tl.program_id(0))
    if expert < experts:
        m = tl.load(start_ptr + tl.program_id(0)) + tl.arange(0, BM)
        known = (m < tl.load(ends_ptr + expert))[:, None]
        row = m
        if TOP_K > 1:
            row = tl.load(order_ptr + m, mask=m < tl.load(ends_ptr + expert), other=0) // TOP_K
        k, r = tl.arange(0, BK), tl.arange(0, RANKS)
        x_ptrs = x_ptr + (row.to(tl.int64) * stride_x_m)[:, None] + k[None, :]
        a_ptrs = a_ptr + (expert.to(tl.int64) * RANKS + r)[None, :] * columns + k[:, None]
        total = tl.zeros([BM, RANKS], tl.float32)
        for begin in tl.range(0, columns, BK, num_stages=4):
            inside = begin + k < columns
            x_mask = known & inside[None, :] if TAIL else known
            x = tl.load(x_ptrs + begin, mask=x_mask, other=0.0)
            a = tl.load(a_ptrs + begin, mask=inside[:, None], other=0.0) if TAIL else tl.load(a_ptrs + begin)
            total = dot(x, a, total, INTERPRETED)
        total *= tl.load(scale_ptr).to(tl.float32)
        out_ptrs = out_ptr + m[:, None] * RANKS + r[None, :]
        tl.store(out_ptrs, round_to(total, out_ptr.dtype.element_ty, INTERPRETED), mask=known)


@triton.jit
def _combine_kernel(
    rows_ptr, weights_ptr, place_ptr, out_ptr, columns, TOP_K: tl.constexpr, BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of one token."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(TOP_K):
        place = tl.load(place_ptr + token * TOP_K + k).to(tl.int64)
        weight = tl.load(weights_ptr + token * TOP_K + k).to(tl.float32)
        total += weight * tl.load(rows_ptr + place * columns + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * columns + column, round_to(total, out_ptr.dtype.element_ty, INTERPRETED), mask=mask)
