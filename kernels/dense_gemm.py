"""y = x W^T + b + s U^T for a dense 16-bit W and few rows of x: one kernel, which adds the adapter before it rounds.

Decoding reads W once and does little else, so a product that is left in float32 for another kernel to finish
(lora_sum.py) pays for the second launch and for writing and reading the sums. Here they stay in registers.

Programs that share a tile of y split K, by the shape of W alone, and their parts are added in order; how many rows
there are changes the tile but no sum. So a row of y has the same bits whatever other rows there are, up to MOST_ROWS.

Not here: more rows (cuBLAS is faster, and lora_sum.py rounds), packed weights (nf4_gemm.py), gradients. One stream at
a time per device: calls share a workspace.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo.kernels.launch import is_interpreted, on_device
from grpo.kernels.lora_factors import LowRank
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

MOST_ROWS = 64
"""Beyond, cuBLAS and one more kernel take less time (measured on an H200: 128 rows)."""
FEATURES, COLUMNS = 64, 128
"""Of W, in a program's tile."""
MOST_STAGES = 4
"""Tiles on their way from memory, as far as shared memory holds them."""
BUSY_PROGRAMS = 64
"""Programs below which K is split: about half of a large GPU's multiprocessors, each of which runs two."""
LONG_SHARE = 4096
"""Columns beyond which a program's share is split again."""


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel takes x [M, K] and weight [N, K]: 16 bit, few rows, a GPU that multiplies their type."""
    return (
        x.is_cuda
        and x.dtype in (torch.bfloat16, torch.float16)
        and 0 < x.shape[0] <= MOST_ROWS
        and x.stride(1) == weight.stride(1) == 1
        and _shared_memory(x.device) > 0
    )


@lru_cache
def _shared_memory(device: torch.device) -> int:
    """Bytes a program may have on `device`; 0 before Ampere, whose pipelines and bfloat16 the kernel needs."""
    properties = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin if properties.major >= 8 else 0


def split_of(features: int, columns: int) -> int:
    """How many programs share the columns of a tile of W [features, columns]: 1, 2 or 4."""
    tiles, split = triton.cdiv(features, FEATURES), 1
    while split < 4 and (tiles * split < BUSY_PROGRAMS or (columns > LONG_SHARE * split and tiles * split < 128)):
        split *= 2
    return split


def dense_gemm(
    x: Tensor, weight: Tensor, bias: Tensor | None, low_rank: LowRank | None, out: Tensor,
    shared_memory: int | None = None,
) -> None:  # fmt: skip
    """out [M, N] = x [M, K] times the transpose of weight [N, K] plus bias [N] plus `low_rank`, rounded once.

    All of one 16-bit dtype, M at most MOST_ROWS; x, weight, out and the adapter's x_lora_a have a last stride of 1.
    shared_memory: bytes a program may have; that of x's device.
    """
    (rows, columns), features = x.shape, weight.shape[0]
    assert weight.shape[1] == columns and out.shape == (rows, features) and 0 < rows <= MOST_ROWS
    assert x.stride(1) == weight.stride(1) == out.stride(1) == 1 and (bias is None or bias.is_contiguous())
    assert x.dtype == weight.dtype == out.dtype and (bias is None or bias.dtype == x.dtype)
    x_lora_a, b, ranks = (x, x, 0) if low_rank is None else (low_rank.x_lora_a, low_rank.b, low_rank.b.shape[1])
    if low_rank is not None:
        assert x_lora_a.shape == (rows, ranks) and b.shape == (features, ranks) and x_lora_a.stride(1) == 1
        assert x_lora_a.dtype == b.dtype == x.dtype
    tile_rows = max(16, triton.next_power_of_2(rows))
    split = split_of(features, columns)
    tiles = triton.cdiv(features, FEATURES)
    assert tiles <= COUNTERS or split == 1
    assert 4 * tiles * split * tile_rows * FEATURES <= WORKSPACE_BYTES or split == 1
    room = _shared_memory(x.device) if shared_memory is None else shared_memory
    stages = min(MOST_STAGES, room // (2 * COLUMNS * (FEATURES + tile_rows)))
    scratch, counters = workspace(x.device)
    with on_device(x):
        _dense_kernel[(tiles, split)](
            x, weight, x if bias is None else bias, x_lora_a, b, out, scratch.view(torch.float32), counters,
            rows, features, columns, x.stride(0), weight.stride(0), x_lora_a.stride(0), b.stride(0), b.stride(1),
            out.stride(0), FEATURES, tile_rows, COLUMNS, split, max(1, stages), columns % COLUMNS == 0,
            bias is not None, ranks, min(64, triton.next_power_of_2(max(ranks, 16))), is_interpreted(x), num_warps=4,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _dense_kernel(
    x_ptr, weight_ptr, bias_ptr, x_lora_a_ptr, b_ptr, out_ptr, partial_ptr, counters_ptr,
    rows, features, columns, stride_x_m, stride_weight_n, stride_x_lora_a_m, stride_b_n, stride_b_r, stride_out_m,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    EVEN: tl.constexpr, HAS_BIAS: tl.constexpr, RANKS: tl.constexpr, BR: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """out^T [BN, BM] = W [BN, part of K] x^T: the long side of the tile is W's, which a matrix unit wants."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.arange(0, BM)
    k = tl.arange(0, BK)
    steps = tl.cdiv(columns, BK)
    share = tl.cdiv(steps, SPLIT)
    first = tl.program_id(1) * share
    weight_ptrs = weight_ptr + tl.minimum(n, features - 1).to(tl.int64)[:, None] * stride_weight_n + k[None, :]
    x_ptrs = x_ptr + (m * stride_x_m)[None, :] + k[:, None]
    inside = (m < rows)[None, :]
    total = tl.zeros([BN, BM], tl.float32)
    for step in tl.range(first, tl.minimum(first + share, steps), num_stages=STAGES):
        column = step * BK
        if EVEN:
            left = tl.load(weight_ptrs + column)
            right = tl.load(x_ptrs + column, mask=inside, other=0.0)
        else:
            left = tl.load(weight_ptrs + column, mask=(column + k < columns)[None, :], other=0.0)
            right = tl.load(x_ptrs + column, mask=inside & (column + k < columns)[:, None], other=0.0)
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
