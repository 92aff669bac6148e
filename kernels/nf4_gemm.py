"""y = x W^T + b for W in the stored form of nf4.py: one call, which multiplies packed weights where that is faster.

`nf4_linear` chooses between a fused Triton kernel and dequantise + cuBLAS by the card's plan (nf4_plans.py).
docs/nf4-kernel.md explains the kernel.

The fused kernel's result for a row of x has the same bits whatever other rows there are: K is split by the shape of W
alone, each split is summed in the order of K, and the splits are added in their order by whichever program finishes
last. Tile sizes, which do depend on the number of rows, do not enter. Two limits: above a shape's largest number of
rows in its plan (128 to 512 on an H100) the product is cuBLAS's, with cuBLAS's bits; and another shape, GPU model or
measurement may split otherwise.

A LoRA adapter's second half, (x A^T) (s B)^T, is added to the sums before they are rounded, by either way; for its
first half see lora_shrink.py.

Not here: gradients, products of W with anything on the other side. One stream at a time per device: calls share a
workspace.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo.kernels import cards, nf4
from grpo.kernels.launch import disable_reduced_precision, on_device
from grpo.kernels.lora_factors import LowRank, with_bias
from grpo.kernels.nf4_lookup import byte_tables, fenced, load_rows, lookup_half, scaled, tile_columns
from grpo.kernels.nf4_plans import find_plan, load_table
from grpo.kernels.nf4_tiles import LARGEST_PIECE, Tile, fits, piece_bytes
from grpo.kernels.split_k import SHRINK_BYTES, add_low_rank, dot, store_part, store_rounded, sum_parts, workspace


def nf4_linear(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    low_rank: LowRank | None = None,
) -> Tensor:
    """x [M, K] times the transpose of W [N, K], plus bias [N], plus `low_rank`: [M, N] in x's dtype.

    packed, absmax: rows of a weight made by `nf4.allocate`; absmax has x's dtype (bfloat16, float16; float32 without
    the fused kernel). out: where to write, [M, N] with its last stride 1. low_rank: both tensors contiguous, R a
    multiple of 16. Sums are float32, rounded once. Records no gradient.
    Safe in CUDA graphs and under torch.inference_mode; in a graph only after `prepare(device)` or an earlier call.
    Raises ValueError for shapes, dtypes or strides outside this.
    """
    rows, columns = x.shape
    features = packed.shape[0]
    if columns != packed.shape[1] * 2 or x.dtype != absmax.dtype or x.stride(1) != 1:
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)} with strides {x.stride()}; the weight takes {absmax.dtype} "
                         f"[M, {packed.shape[1] * 2}] with a last stride of 1")  # fmt: skip
    if out is None:
        out = torch.empty(rows, features, dtype=x.dtype, device=x.device)
    if out.shape != (rows, features) or out.dtype != x.dtype or out.stride(1) != 1:
        raise ValueError(f"out must be {x.dtype} [{rows}, {features}] with a last stride of 1")
    plan = find_plan(x.device, features, columns) if x.is_cuda and fused_serves(x.dtype, x.device) else None
    tile = plan.tile(rows) if plan else None
    if rows == 0:
        return out
    if plan and tile:
        launch_fused(x, packed, absmax, bias, out, tile, plan.split, low_rank)
        return out
    if x.is_cuda:
        dequantized_linear(x, packed, absmax, bias, out, low_rank)
    else:
        joined = with_bias(low_rank, bias, rows)
        matrix = nf4.dequantize(packed, absmax)
        if joined is None:
            torch.mm(x, matrix.t(), out=out)
        else:
            torch.mm(joined.concat_to(x), torch.cat([matrix, joined.b], 1).t(), out=out)
    return out


def dequantized_linear(
    x: Tensor, packed: Tensor, absmax: Tensor, bias: Tensor | None, out: Tensor, low_rank: LowRank | None = None
) -> None:
    """`nf4_linear` by dequantising W piece by piece into the workspace and multiplying each piece by cuBLAS.

    With `low_rank` or a bias a piece has its b in further columns, and x its x_lora_a: one product, rounded once.
    """
    disable_reduced_precision()
    features, columns = packed.shape[0], packed.shape[1] * 2
    low_rank = with_bias(low_rank, bias, x.shape[0])
    ranks = 0 if low_rank is None else low_rank.b.shape[1]
    wide = columns + ranks
    most = max(256, dense_bytes(x.device) // (wide * x.element_size()) // 256 * 256)
    step = math.ceil(features / math.ceil(features / most) / 256) * 256
    scratch, _ = workspace(x.device)
    x_and_lora = x if low_rank is None else low_rank.concat_to(x)
    for start in range(0, features, step):
        part = slice(start, min(start + step, features))
        matrix = scratch.view(x.dtype)[: (part.stop - start) * wide].view(-1, wide)
        nf4.dequantize(packed[part], absmax[part], out=matrix[:, :columns])
        if low_rank is not None:
            matrix[:, columns:].copy_(low_rank.b[part])
        torch.mm(x_and_lora, matrix.t(), out=out[:, part])


def fused_serves(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a fused kernel takes `dtype` on `device`, a GPU: sm_75 has no bfloat16."""
    return dtype == torch.float16 or (dtype == torch.bfloat16 and cards.card(device).unit != "m16n8k8")


def launch_fused(
    x: Tensor, packed: Tensor, absmax: Tensor, bias: Tensor | None, out: Tensor, tile: Tile, split: int,
    low_rank: LowRank | None = None,
) -> None:  # fmt: skip
    """The fused kernel of x's device. Arguments as for `launch_gemm`."""
    if cards.card(x.device).unit == "m16n8k8":
        from grpo.kernels.nf4_turing import launch_turing

        launch_turing(x, packed, absmax, bias, out, tile, split, low_rank)
    else:
        launch_gemm(x, packed, absmax, bias, out, tile, split, low_rank)


def dense_bytes(device: torch.device) -> int:
    """Size of a dequantised piece of a weight."""
    return piece_bytes(cards.card(device)) if device.type == "cuda" else LARGEST_PIECE


def prepare(device: torch.device) -> None:
    """Allocate what calls on `device` share, and read the table. Later calls allocate only their result."""
    workspace(device)
    workspace(device, SHRINK_BYTES)
    load_table()


def launch_gemm(
    x: Tensor, packed: Tensor, absmax: Tensor, bias: Tensor | None, out: Tensor, tile: Tile, split: int,
    low_rank: LowRank | None = None, *, interpreted: bool = False,
) -> None:  # fmt: skip
    """The fused kernel. Arguments as `nf4_linear` has checked them; interpreted: the form for Triton's interpreter."""
    rows, columns = x.shape
    features = packed.shape[0]
    words, scales = nf4.stored_rows(packed, absmax, 0, features, columns)
    assert words.is_contiguous() and scales.is_contiguous(), "groups of 8 rows lie one after the other"
    assert x.stride(1) == 1 and out.stride(1) == 1 and (bias is None or bias.is_contiguous())
    assert x.dtype == absmax.dtype == out.dtype and x.element_size() == 2, "two scales are read as one word"
    grid = (triton.cdiv(rows, tile.m), triton.cdiv(features, tile.n), split)
    scratch, counters = workspace(x.device)
    assert fits(tile, split, rows, features), "the workspace holds every partial sum"
    x_lora_a, b, ranks = (x, x, 0) if low_rank is None else (low_rank.x_lora_a, low_rank.b, low_rank.b.shape[1])
    if low_rank is not None:
        assert x_lora_a.shape == (rows, ranks) and b.shape == (features, ranks) and ranks % 16 == 0
        assert x_lora_a.is_contiguous() and b.is_contiguous() and x_lora_a.dtype == b.dtype == x.dtype
    pending = low_rank is not None and low_rank.pending and x.is_cuda and cards.card(x.device).overlaps
    with on_device(x):
        _gemm_kernel[grid](
            x, words.view(torch.int32), scales.view(torch.int32), x if bias is None else bias, out,
            scratch.view(torch.float32), counters, x_lora_a, b,
            rows, features, columns, words.shape[1], x.stride(0), out.stride(0),
            *byte_tables(x.dtype), tile.n, tile.m, split, tile.warps, tile.stages, tile.dots, rows % tile.m != 0,
            columns % nf4.TILE != 0, bias is not None, ranks, ranks_at_once(ranks), interpreted,
            x.is_cuda and cards.card(x.device).unit == "mma", pending, num_warps=tile.warps, launch_pdl=pending,
        )  # fmt: skip


def ranks_at_once(ranks: int) -> int:
    """Of an adapter, in one matrix product."""
    return min(64, triton.next_power_of_2(max(ranks, 16)))


@triton.jit(do_not_specialize=["rows", "tiles"])
def _gemm_kernel(
    x_ptr, words_ptr, scales_ptr, bias_ptr, out_ptr, partial_ptr, counters_ptr, x_lora_a_ptr, b_ptr,
    rows, features, columns, tiles, stride_x_m, stride_out_m, t0, t1, t2, t3, t4, t5, t6, t7,
    BN: tl.constexpr, BM: tl.constexpr, SPLIT: tl.constexpr, WARPS: tl.constexpr, STAGES: tl.constexpr,
    DOTS: tl.constexpr, RAGGED: tl.constexpr, HALF_TAIL: tl.constexpr, HAS_BIAS: tl.constexpr, RANKS: tl.constexpr,
    BR: tl.constexpr, INTERPRETED: tl.constexpr, FENCED: tl.constexpr, PENDING: tl.constexpr,
):  # fmt: skip
    """out^T [BN, BM] = W [BN, part of K] x^T. Words: [N / 8, tiles, 8, 16]; scales: pairs, [N / 8, tiles, 8]."""
    if PENDING:
        tl.extra.cuda.gdc_launch_dependents()  # what waits for this at its beginning may be launched
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    WIDTH: tl.constexpr = 128 // DOTS
    n0 = tl.program_id(1) * BN
    last_group = features // 8 - 1
    n = n0 + load_rows(BN, WARPS)
    word_ptrs = (
        words_ptr + (tl.minimum(n // 8, last_group) * tiles * 128 + n % 8 * 16)[:, None] + tl.arange(0, 16)[None, :]
    )
    n = n0 + tl.arange(0, BN)
    scale_ptrs = scales_ptr + tl.minimum(n // 8, last_group) * tiles * 8 + n % 8
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    k = tl.arange(0, WIDTH)
    x_ptrs = x_ptr + (m * stride_x_m)[None, :] + k[:, None]
    # Rows past the last are not read. Reading the last row in their place makes every program ask for the same lines
    # of the L2 cache: one row of x then takes longer than sixteen.
    x_mask = (m < rows)[None, :]
    share = tl.cdiv(tiles, SPLIT)
    first = tl.program_id(2) * share
    total = tl.zeros([BN, BM], tl.float32)
    for tile in tl.range(first, tl.minimum(first + share, tiles), num_stages=STAGES):
        word = tl.load(word_ptrs + tile * 128)
        pair = tl.load(scale_ptrs + tile * 8)
        scale0 = (pair & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)
        scale1 = (pair >> 16).to(tl.int16).to(DTYPE, bitcast=True)
        low = tile_columns(lookup_half(word, 0, t0, t1, t2, t3, t4, t5, t6, t7, DTYPE, INTERPRETED), BN, WARPS)
        low = fenced(scaled(low, scale0, DTYPE, INTERPRETED), FENCED)
        if DOTS == 2:
            total = dot(
                low, _load_x(x_ptrs + tile * 128, x_mask, tile * 128 + k, columns, RAGGED, False), total, INTERPRETED
            )
        high = tile_columns(lookup_half(word, 1, t0, t1, t2, t3, t4, t5, t6, t7, DTYPE, INTERPRETED), BN, WARPS)
        high = fenced(scaled(high, scale1, DTYPE, INTERPRETED), FENCED)
        if DOTS == 2:
            total = dot(
                high,
                _load_x(x_ptrs + tile * 128 + 64, x_mask, tile * 128 + 64 + k, columns, RAGGED, HALF_TAIL),
                total,
                INTERPRETED,
            )
        else:
            both = fenced(tl.reshape(tl.permute(tl.join(low, high), [0, 2, 1]), [BN, 128]), FENCED)
            total = dot(
                both,
                _load_x(x_ptrs + tile * 128, x_mask, tile * 128 + k, columns, RAGGED, HALF_TAIL),
                total,
                INTERPRETED,
            )
    if RANKS > 0:
        # Here the sums are still where a matrix product wants them, which those read back from memory would not be.
        if tl.program_id(2) == SPLIT - 1:
            if PENDING:
                tl.extra.cuda.gdc_wait()  # for x_lora_a: until here this ran beside what computes it
            total = add_low_rank(
                total, x_lora_a_ptr, b_ptr, m, n, rows, features, RANKS, RANKS, 1, RANKS, BR, INTERPRETED
            )  # fmt: skip
    if SPLIT == 1:
        store_rounded(total, out_ptr, bias_ptr, m, n, rows, features, stride_out_m, HAS_BIAS, INTERPRETED)
    else:
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        part_ptrs = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
        part_ptrs += partial_ptr + tile * SPLIT * BN * BM
        if store_part(total, part_ptrs + tl.program_id(2) * BN * BM, counters_ptr + tile, SPLIT):
            total = sum_parts(part_ptrs, BN * BM, SPLIT)
            store_rounded(total, out_ptr, bias_ptr, m, n, rows, features, stride_out_m, HAS_BIAS, INTERPRETED)
            tl.store(counters_ptr + tile, 0)


@triton.jit
def _load_x(x_ptrs, mask, column, columns, RAGGED: tl.constexpr, HALF_TAIL: tl.constexpr):
    if HALF_TAIL:  # times a padded block of zeros, so it has to be finite
        return tl.load(x_ptrs, mask=mask & (column < columns)[:, None], other=0.0)
    if RAGGED:  # whatever is left in the other rows' place only reaches rows of y that are not stored
        return tl.load(x_ptrs, mask=mask)
    return tl.load(x_ptrs)
