"""Products of sorted rows with their experts' weights in NF4 or MXFP4: the fused kernel of nf4_gemm.py, grouped.

The stored matrices of the experts lie one below the other. A program multiplies a tile of one expert's rows of x with
some rows of that expert's W, which it looks up and scales in registers; experts without rows are not read. Tiles come
from routing.py, on the device, so nothing depends on the host and the launch can stand in a CUDA graph.

With an adapter the sums stay in float32, and a kernel of their size adds (x A^T) (s B)^T, with factors of each expert,
and rounds once; where it has gates and ups it applies the activation too. Within the product itself, whose operand in
registers the compiler then takes through shared memory, that took half as long again. x A^T, which the product does not
need, is computed by further programs of its launch. The columns of W are not split, so a row's bits do not depend on
other rows.

Not here: gradients and many rows (experts.py dequantises, and torch multiplies), routing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo.kernels import cards, mxfp4, nf4, routing
from grpo.kernels.expert_rows import launch_sum
from grpo.kernels.experts import ExpertAdapter, ExpertAdapters, ExpertMatrix, Experts, multiply
from grpo.kernels.glu import ACTIVATIONS, gated, glu_forward
from grpo.kernels.launch import is_interpreted, on_device, round_to
from grpo.kernels.mxfp4 import mx_scaled
from grpo.kernels.nf4_lookup import (
    CODE,
    byte_tables,
    fenced,
    lane_table,
    load_rows,
    lookup_half,
    scaled,
    shuffled_half,
    tile_columns,
)  # fmt: skip
from grpo.kernels.nf4_tiles import Tile
from grpo.kernels.routing import Record, Routes
from grpo.kernels.split_k import dot

SHRINK_COLUMNS = 128
"""Of x, a step of the product with A."""


class DecodeTiles(NamedTuple):
    """How the two products of experts are cut up; both have the same rows of x in a tile."""

    gate_up: Tile
    down: Tile


FEW = (Tile(128, 16, 4, 3, 1), Tile(256, 16, 8, 3, 2), Tile(64, 16, 4, 4, 1), Tile(64, 16, 4, 4, 2))
MANY = (Tile(128, 32, 4, 3, 2), Tile(64, 32, 4, 4, 2))
"""Tiles for up to FEW_ROWS rows an expert on average, and for more: the first is taken that computes what a plain
product does. Triton 3.6 compiles some wrongly: on an H200 Tile(128, 16, 4, 3, 2) lost rows from 8 sequences on."""
FEW_ROWS = 10
SHUFFLED_HALVES = 1
"""Of the two blocks of a word, how many are looked up by asking other lanes: 1 divides the work between two units. In
tiles of up to 16 rows alone: with 32 Triton 3.6 compiled it wrongly on an H200."""
MOST_REGISTERS: int | None = 128
"""Of a thread, with which 16 warps share a multiprocessor."""
FINISHED_COLUMNS = 64
"""Of a program that adds an adapter's term."""
CHECKED_TOKENS, CHECKED_EXPERTS = (1, 8, 32, 128), 32
AGREES = 0.01
"""Largest relative difference of a product from torch's, where both round once."""


class Tiles(NamedTuple):
    """What to take for few rows an expert and for many, on one GPU."""

    few: Tile
    many: Tile

    def of(self, pairs: int, experts: int) -> Tile:
        """For so many pairs of a token and an expert."""
        return self.few if pairs <= FEW_ROWS * experts else self.many


_tiles: dict[torch.device, Tiles | None] = {}
_shuffled: dict[torch.device, int] = {}
"""Of a GPU, what took the place of SHUFFLED_HALVES."""


def serves(x: Tensor, experts: Experts, top_k: int) -> bool:
    """Whether `decode` takes x [tokens, hidden]: packed experts, few rows, a GPU on which `find_tiles` found some."""
    packed = experts.gate_up.absmax is not None and x.element_size() == 2
    return packed and routing.serves(len(x), top_k) and _tiles.get(x.device) is not None


def find_tiles(experts: Experts, top_k: int, ranks: int = 0) -> Tiles | None:
    """The first of FEW and of MANY that compute what torch does on this GPU, with some of `experts` and, where `ranks`
    is not 0, with adapters too; `serves` and `decode` go by it. Lookups by shuffles are given up where none is right
    with them. None: the kernels are not used."""
    device = experts.gate_up.weight.device
    _tiles[device] = None
    if experts.gate_up.absmax is None or not cards.card(device).dot_is_fast:
        return None
    few = [first_experts(matrix, max(top_k, CHECKED_EXPERTS)) for matrix in (experts.gate_up, experts.down)]

    def first(candidates: tuple[Tile, ...]) -> Tile | None:
        # With a bias the compiler waits for each of several products between one wait and the next.
        ordered = sorted(candidates, key=lambda tile: tile.dots == 1 and experts.gate_up.bias is not None)

        def right(tile: Tile) -> bool:
            above, below = few
            return agrees(above, top_k, tile, ranks, experts.activation) and agrees(below, top_k, tile, ranks)

        return next((tile for tile in ordered if right(tile)), None)

    for halves in (SHUFFLED_HALVES, 0):
        _shuffled[device] = halves
        found = [tile for tile in (first(FEW), first(MANY)) if tile is not None]
        if found:
            _tiles[device] = Tiles(found[0], found[-1])
            break
    return _tiles[device]


def first_experts(matrix: ExpertMatrix, count: int) -> ExpertMatrix:
    """The first `count` of the experts."""
    experts, out, _ = matrix.shape
    count = min(count, experts)
    absmax = None if matrix.absmax is None else matrix.absmax[: count * out]
    return ExpertMatrix(
        matrix.weight[: count * out], absmax, count, None if matrix.bias is None else matrix.bias[:count]
    )


def agrees(matrix: ExpertMatrix, top_k: int, tile: Tile, ranks: int, glu: str = "") -> bool:
    """Whether products by `tile`, `glu` of them too, are torch's, for several numbers of tokens, without adapters and
    with some."""
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
        wanted = multiply(rows, matrix.dense(), routes.ends, transposed=False).float()
        if matrix.bias is not None:
            wanted += matrix.bias.float()[expert]
        for rank in {0, ranks}:
            adapter, whole = None, wanted
            if rank:
                adapter = ExpertAdapter(random(experts, rank, columns) / columns**0.5, random(experts, out, rank))
                shrunk = multiply(rows, adapter.a, routes.ends, transposed=False).float()
                whole = wanted + torch.einsum("mr,mor->mo", shrunk, adapter.b.float()[expert])
            for activation in {"", glu}:
                one = torch.ones((), dtype=dtype, device=device)
                ours = product(x, matrix, adapter, one, routes, tile, top_k=top_k, glu=activation)
                right = glu_forward(whole.to(dtype), activation).float() if activation else whole
                if not float((ours.float() - right).norm()) <= AGREES * float(right.norm()):
                    return False
    return True


def decode(
    x: Tensor, logits: Tensor, experts: Experts, top_k: int, renormalize: bool,
    adapters: ExpertAdapters | None = None, tiles: DecodeTiles | None = None, record: Record | None = None,
) -> Tensor:  # fmt: skip
    """x [tokens, hidden] through the experts that its router's logits choose, which `record` keeps; rounded once. Five
    launches, six with adapters, none of which the host waits for."""
    if tiles is None:
        tile = (_tiles.get(x.device) or Tiles(FEW[0], MANY[0])).of(len(x) * top_k, experts.gate_up.experts)
        tiles = DecodeTiles(tile, tile)
    routes = routing.choose(logits, top_k, renormalize, tiles.gate_up.m, record)
    above, below, on = adapters or (None, None, None)
    inner = product(x, experts.gate_up, above, on, routes, tiles.gate_up, top_k=top_k, glu=experts.activation)
    return combine(product(inner, experts.down, below, on, routes, tiles.down), routes)


def product(
    x: Tensor, matrix: ExpertMatrix, adapter: ExpertAdapter | None, on: Tensor | None, routes: Routes, tile: Tile, *,
    top_k: int = 1, glu: str = "",
) -> Tensor:  # fmt: skip
    """[rows, out] in x's dtype: x, as for `experts_linear`, times W^T plus bias plus on * x A^T (s B)^T, rounded once;
    with `glu` [rows, out / 2], gates and ups after that activation. Without `on` there is no adapter."""
    assert matrix.absmax is not None
    if adapter is None or on is None:
        return experts_linear(x, matrix.weight, matrix.absmax, routes, tile, top_k=top_k, bias=matrix.bias, glu=glu)
    sums, x_lora_a = experts_sums(x, matrix.weight, matrix.absmax, adapter.a, on, routes, tile, top_k=top_k)
    return finish(sums, x_lora_a, adapter.b, matrix.bias, routes, tile.m, glu)


def experts_linear(
    x: Tensor, packed: Tensor, absmax: Tensor, routes: Routes, tile: Tile, *, top_k: int = 1,
    bias: Tensor | None = None, glu: str = "",
) -> Tensor:  # fmt: skip
    """[rows, out] in x's dtype: x of each place times the transpose of its expert's W, plus bias [experts, out]; with
    `glu` [rows, out / 2], gates and ups, rounded, after that activation.

    packed, absmax: the experts' matrices [experts * out, K] as `nf4.allocate` or `mxfp4.allocate` made them. `top_k`
    above 1: x [tokens, K] is unsorted, and the token of a place is `order // top_k`; else x [rows, K] is sorted. tile.m
    is the number of rows that the routes were cut into. Records no gradient.
    """
    features = packed.shape[0] // len(routes.ends) // (2 if glu else 1)
    out = torch.empty(len(routes.order), features, dtype=x.dtype, device=x.device)
    _launch(x, packed, absmax, bias, out, None, routes, tile, top_k, glu)
    return out


def experts_sums(
    x: Tensor, packed: Tensor, absmax: Tensor, a: Tensor, scale: Tensor, routes: Routes, tile: Tile, *, top_k: int = 1
) -> tuple[Tensor, Tensor]:
    """`experts_linear` without bias in float32, not rounded, and scale * x A^T of each place, [rows, R] in x's dtype.

    a [experts, R, K], R a power of two from 16 on; scale: one number, read on the device.
    """
    rows, (experts, ranks, columns) = len(routes.order), a.shape
    out = torch.empty(rows, packed.shape[0] // experts, dtype=torch.float32, device=x.device)
    x_lora_a = torch.empty(rows, ranks, dtype=x.dtype, device=x.device)
    assert a.is_contiguous() and a.dtype == x.dtype and x.shape[1] == columns
    assert ranks >= 16 and ranks & (ranks - 1) == 0
    _launch(x, packed, absmax, None, out, (a, scale, x_lora_a), routes, tile, top_k)
    return out, x_lora_a


def _launch(
    x: Tensor, packed: Tensor, absmax: Tensor, bias: Tensor | None, out: Tensor,
    shrink: tuple[Tensor, Tensor, Tensor] | None, routes: Routes, tile: Tile, top_k: int, glu: str = "",
) -> None:  # fmt: skip
    """The product, or what `glu` makes of it, into `out`; `shrink`: A, its scale, and where x A^T goes."""
    experts, mx = len(routes.ends), mxfp4.is_stored(absmax)
    features, columns = packed.shape[0] // experts, packed.shape[1] * 2
    assert out.shape[1] * (2 if glu else 1) == features and (not glu or (glu in ACTIVATIONS and out.shape[1] % 8 == 0))
    words, scales = nf4.stored_rows(packed, absmax, 0, packed.shape[0], columns)
    assert features % 8 == 0 and x.stride(1) == 1 and x.shape[1] == columns and x.element_size() == 2
    assert x.dtype == (torch.bfloat16 if mx else absmax.dtype) and (bias is None or bias.is_contiguous())
    across, tiles = triton.cdiv(features, tile.n), len(routes.expert)
    a, scale, x_lora_a = (x, x, x) if shrink is None else shrink
    unit = cards.card(x.device).unit if x.is_cuda else ""
    shuffled = _shuffled.get(x.device, SHUFFLED_HALVES) if unit == "wgmma" and tile.m <= 16 else 0
    overlapped = x.is_cuda and cards.card(x.device).overlaps
    registers = most_registers(tile) if unit == "wgmma" else None
    shrinking = 0 if shrink is None else triton.cdiv(tiles, across)
    with on_device(x):
        _experts_kernel[(across, shrinking + tiles)](
            x, words.view(torch.int32), scales.view(torch.int32), x if bias is None else bias, out,
            routes.order, routes.ends, routes.expert, routes.start, a, scale, x_lora_a, shrinking, tiles, experts,
            features, columns, words.shape[1], x.stride(0), *byte_tables(x.dtype, mxfp4.VALUES if mx else CODE),
            tile.n, tile.m, tile.warps, tile.stages, tile.dots, columns % nf4.TILE != 0, top_k, bias is not None, mx,
            0 if shrink is None else a.shape[1], SHRINK_COLUMNS, columns % SHRINK_COLUMNS != 0, glu, shuffled,
            is_interpreted(x), unit == "mma", overlapped, num_warps=tile.warps, maxnreg=registers,
            launch_pdl=overlapped,
        )  # fmt: skip


def finish(
    sums: Tensor, x_lora_a: Tensor, b: Tensor, bias: Tensor | None, routes: Routes, tile_rows: int, glu: str = ""
) -> Tensor:
    """sums [rows, out] in float32 plus x_lora_a [rows, R] times b^T [experts, out, R] plus bias [experts, out], rounded
    to the dtype of the factors; with `glu` gates and ups through that activation, [rows, out / 2]."""
    (rows, features), (experts, _, ranks) = sums.shape, b.shape
    columns = features // 2 if glu else features
    out = torch.empty(rows, columns, dtype=b.dtype, device=b.device)
    assert sums.is_contiguous() and x_lora_a.is_contiguous() and b.is_contiguous() and x_lora_a.dtype == b.dtype
    assert x_lora_a.shape == (rows, ranks) and b.shape == (experts, features, ranks) and (not glu or glu in ACTIVATIONS)
    assert ranks >= 16 and ranks & (ranks - 1) == 0
    overlapped = b.is_cuda and cards.card(b.device).overlaps
    with on_device(b):
        _finish_kernel[(triton.cdiv(columns, FINISHED_COLUMNS), len(routes.expert))](
            sums, x_lora_a, b, b if bias is None else bias, out, routes.ends, routes.expert, routes.start, experts,
            features, columns, ranks, tile_rows, FINISHED_COLUMNS, bias is not None, glu, is_interpreted(b),
            overlapped, num_warps=4, launch_pdl=overlapped,
        )  # fmt: skip
    return out


def combine(rows: Tensor, routes: Routes) -> Tensor:
    """Every token's rows times their weights, added up in float32 and rounded once: [tokens, columns]."""
    out = torch.empty(len(routes.weights), rows.shape[1], dtype=rows.dtype, device=rows.device)
    launch_sum(rows, routes.weights, routes.place, out)
    return out


def most_registers(tile: Tile) -> int | None:
    """Of a thread, on Hopper; None: as many as the compiler takes."""
    return MOST_REGISTERS if tile.m <= 16 else None


@triton.jit(do_not_specialize=["shrinking", "row_tiles", "tiles"])
def _experts_kernel(
    x_ptr, words_ptr, scales_ptr, bias_ptr, out_ptr, order_ptr, ends_ptr, expert_ptr, start_ptr, a_ptr, scale_ptr,
    x_lora_a_ptr, shrinking, row_tiles, experts, features, columns, tiles, stride_x_m, t0, t1, t2, t3, t4, t5, t6, t7,
    BN: tl.constexpr, BM: tl.constexpr, WARPS: tl.constexpr, STAGES: tl.constexpr, DOTS: tl.constexpr,
    HALF_TAIL: tl.constexpr, TOP_K: tl.constexpr, HAS_BIAS: tl.constexpr, MX: tl.constexpr, RANKS: tl.constexpr,
    BK: tl.constexpr, TAIL: tl.constexpr, GLU: tl.constexpr, SHUFFLED: tl.constexpr, INTERPRETED: tl.constexpr,
    FENCED: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """The first `shrinking` rows of programs compute x A^T, a tile of rows each; the others a tile of the product."""
    if OVERLAPPED:
        tl.extra.cuda.gdc_wait()  # this may be launched while what is in front of it runs
        tl.extra.cuda.gdc_launch_dependents()
    number = tl.program_id(1) - shrinking
    if RANKS > 0:
        if number < 0:
            row_tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
            if row_tile < row_tiles:
                _shrink_tile(
                    row_tile, x_ptr, a_ptr, scale_ptr, x_lora_a_ptr, order_ptr, ends_ptr, expert_ptr, start_ptr,
                    experts, columns, stride_x_m, RANKS, BM, BK, TAIL, TOP_K, INTERPRETED,
                )  # fmt: skip
    if number >= 0:
        _product_tile(
            number, x_ptr, words_ptr, scales_ptr, bias_ptr, out_ptr, order_ptr, ends_ptr, expert_ptr, start_ptr,
            experts, features, columns, tiles, stride_x_m, t0, t1, t2, t3, t4, t5, t6, t7, BN, BM, WARPS, STAGES,
            DOTS, HALF_TAIL, TOP_K, HAS_BIAS, MX, GLU, SHUFFLED, INTERPRETED, FENCED,
        )  # fmt: skip


@triton.jit
def _product_tile(
    number, x_ptr, words_ptr, scales_ptr, bias_ptr, out_ptr, order_ptr, ends_ptr, expert_ptr, start_ptr, experts,
    features, columns, tiles, stride_x_m, t0, t1, t2, t3, t4, t5, t6, t7,
    BN: tl.constexpr, BM: tl.constexpr, WARPS: tl.constexpr, STAGES: tl.constexpr, DOTS: tl.constexpr,
    HALF_TAIL: tl.constexpr, TOP_K: tl.constexpr, HAS_BIAS: tl.constexpr, MX: tl.constexpr, GLU: tl.constexpr,
    SHUFFLED: tl.constexpr, INTERPRETED: tl.constexpr, FENCED: tl.constexpr,
):  # fmt: skip
    """out^T [BN, BM] = W of one expert [BN, K] x^T. Words: [N / 8, tiles, 8, 16]; scales: pairs, [N / 8, tiles, 8].
    With GLU the tile's rows are BN / 2 of gates and those of their ups, and out^T is [BN / 2, BM]."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    WIDTH: tl.constexpr = 128 // DOTS
    expert = tl.load(expert_ptr + number)
    if expert < experts:
        m = tl.load(start_ptr + number) + tl.arange(0, BM)
        known = m < tl.load(ends_ptr + expert)
        row = m
        if TOP_K > 1:
            row = tl.load(order_ptr + m, mask=known, other=0) // TOP_K
        groups = features // 8
        first_group = expert.to(tl.int64) * groups
        n, inside = _tile_rows(tl.program_id(0), load_rows(BN, WARPS), features, BN, GLU)
        group = first_group + tl.minimum(n // 8, groups - 1)
        word_ptrs = words_ptr + (group * tiles * 128 + n % 8 * 16)[:, None] + tl.arange(0, 16)[None, :]
        n, inside = _tile_rows(tl.program_id(0), tl.arange(0, BN), features, BN, GLU)
        scale_ptrs = scales_ptr + (first_group + tl.minimum(n // 8, groups - 1)) * tiles * 8 + n % 8
        k = tl.arange(0, WIDTH)
        x_ptrs = x_ptr + (row.to(tl.int64) * stride_x_m)[None, :] + k[:, None]
        x_mask = known[None, :]
        total = tl.zeros([BN, BM], tl.float32)
        if SHUFFLED > 0:
            table = lane_table(t0, t1, t2, t3, t4, t5, t6, t7)
        for tile in tl.range(0, tiles, num_stages=STAGES):
            word = tl.load(word_ptrs + tile * 128)
            pair = tl.load(scale_ptrs + tile * 8)
            if SHUFFLED > 1:
                low = tile_columns(shuffled_half(word, 0, table, DTYPE), BN, WARPS)
            else:
                low = tile_columns(lookup_half(word, 0, t0, t1, t2, t3, t4, t5, t6, t7, DTYPE, INTERPRETED), BN, WARPS)
            low = _block_scaled(low, pair, 0, MX, DTYPE, INTERPRETED)
            low = fenced(low, FENCED)
            if SHUFFLED > 0:
                high = tile_columns(shuffled_half(word, 1, table, DTYPE), BN, WARPS)
            else:
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
        if HAS_BIAS:
            total += tl.load(bias_ptr + expert * features + n, mask=inside, other=0.0).to(tl.float32)[:, None]
        if GLU != "":
            halves = tl.reshape(round_to(total, DTYPE, INTERPRETED), [2, BN // 2, BM])
            gate, up = tl.split(tl.permute(halves, [1, 2, 0]))
            value = gated(gate.to(tl.float32), up.to(tl.float32), GLU, DTYPE, INTERPRETED)
            column = tl.program_id(0) * (BN // 2) + tl.arange(0, BN // 2)
            out_ptrs = out_ptr + m[None, :].to(tl.int64) * (features // 2) + column[:, None]
            tl.store(out_ptrs, value, mask=x_mask & (column < features // 2)[:, None])
        else:
            out_ptrs = out_ptr + m[None, :].to(tl.int64) * features + n[:, None]
            if out_ptr.dtype.element_ty == tl.float32:
                tl.store(out_ptrs, total, mask=x_mask & inside[:, None])
            else:
                tl.store(out_ptrs, round_to(total, DTYPE, INTERPRETED), mask=x_mask & inside[:, None])


@triton.jit
def _tile_rows(tile, position, features, BN: tl.constexpr, GLU: tl.constexpr):
    """(Rows of W at `position` of a tile, whether the tile has them)."""
    if GLU == "":
        n = tile * BN + position
        return n, n < features
    half = features // 2
    column = tile * (BN // 2) + position % (BN // 2)
    return position // (BN // 2) * half + tl.minimum(column, half - 1), column < half


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
def _shrink_tile(
    number, x_ptr, a_ptr, scale_ptr, out_ptr, order_ptr, ends_ptr, expert_ptr, start_ptr, experts, columns, stride_x_m,
    RANKS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, TAIL: tl.constexpr, TOP_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """out [BM, RANKS] = scale * x [BM, K] A of one expert [RANKS, K]^T."""
    expert = tl.load(expert_ptr + number)
    if expert < experts:
        m = tl.load(start_ptr + number) + tl.arange(0, BM)
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
def _finish_kernel(
    sums_ptr, x_lora_a_ptr, b_ptr, bias_ptr, out_ptr, ends_ptr, expert_ptr, start_ptr, experts, features, columns,
    RANKS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, HAS_BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    INTERPRETED: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """BN columns of a tile's rows."""
    if OVERLAPPED:
        tl.extra.cuda.gdc_wait()  # this may be launched while what is in front of it runs
        tl.extra.cuda.gdc_launch_dependents()
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    expert = tl.load(expert_ptr + tl.program_id(1))
    if expert < experts:
        m = tl.load(start_ptr + tl.program_id(1)) + tl.arange(0, BM)
        known = (m < tl.load(ends_ptr + expert))[:, None]
        r, n = tl.arange(0, RANKS), tl.program_id(0) * BN + tl.arange(0, BN)
        x_lora_a = tl.load(x_lora_a_ptr + m[:, None] * RANKS + r[None, :], mask=known, other=0.0)
        row = m.to(tl.int64)[:, None]
        mask = known & (n < columns)[None, :]
        value = _finished(
            sums_ptr + row * features, x_lora_a, b_ptr, bias_ptr, expert, n, n < columns, features, mask, RANKS,
            HAS_BIAS, DTYPE, INTERPRETED,
        )  # fmt: skip
        if ACTIVATION != "":
            up = _finished(
                sums_ptr + row * features, x_lora_a, b_ptr, bias_ptr, expert, columns + n, n < columns, features, mask,
                RANKS, HAS_BIAS, DTYPE, INTERPRETED,
            )  # fmt: skip
            value = gated(value.to(tl.float32), up.to(tl.float32), ACTIVATION, DTYPE, INTERPRETED)
        tl.store(out_ptr + row * columns + n[None, :], value, mask=mask)


@triton.jit
def _finished(
    sums_ptrs, x_lora_a, b_ptr, bias_ptr, expert, n, inside, features, mask, RANKS: tl.constexpr,
    HAS_BIAS: tl.constexpr, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Columns n of the sums with all that is added to them, rounded."""
    r = tl.arange(0, RANKS)
    b_ptrs = b_ptr + (expert.to(tl.int64) * features + n)[None, :] * RANKS + r[:, None]
    total = tl.load(sums_ptrs + n[None, :], mask=mask, other=0.0)
    total = dot(x_lora_a, tl.load(b_ptrs, mask=inside[None, :], other=0.0), total, INTERPRETED)
    if HAS_BIAS:
        total += tl.load(bias_ptr + expert * features + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    return round_to(total, DTYPE, INTERPRETED)
