"""MXFP4: 4-bit floats in blocks of 32 with a power of two, as gpt-oss is published, kept and dequantised exactly.

A value is one of 0, 0.5, 1, 1.5, 2, 3, 4, 6 with a sign, times 2^(exponent - 127): all of that fits bfloat16, so every
product of code and scale is exact and rounds to nothing. Form: the OCP Microscaling specification 1.0, sections 5.3 and
6.3. The stored form is that of nf4.py with other scales: where NF4 has one of 16 bits for a block of 64, here are the
exponents of two blocks of 32, one byte each, in the same place. So storage, slices of rows and the look-up of codes are
those of NF4; the dtype of the scales, int16, tells the two apart.

Not here: quantising, products (nf4_experts.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo.kernels import nf4
from grpo.kernels.launch import on_device
from grpo.kernels.nf4_lookup import byte_tables, lookup_half, tile_columns

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Of the sixteen codes: a sign, two bits of exponent, one of mantissa."""
BLOCK = 32
"""Weights per exponent."""
SCALES = torch.int16
"""dtype of the scales in the stored form, two exponents in each."""
EXPONENTS = (1, 251)
"""The least and the largest with which every value is a finite bfloat16 of full precision."""
_TILE_ROWS = 64


def is_stored(absmax: Tensor | None) -> bool:
    """Whether scales are those of MXFP4, not of NF4."""
    return absmax is not None and absmax.dtype == SCALES


def value(codes: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., K] in `dtype` of a checkpoint's form: codes uint8 [..., K / 32, 16], the even column in the low half of a
    byte, and exponents uint8 [..., K / 32]."""
    byte = torch.arange(256)
    pairs = torch.tensor(VALUES)[torch.stack([byte & 15, byte >> 4], 1)].to(codes.device)
    scales = (exponents.int() << 23).view(torch.float32)  # an exponent is that of a float32 too
    return (pairs[codes.int()].flatten(-2) * scales[..., None]).flatten(-2).to(dtype)


def is_exact(codes: Tensor, exponents: Tensor) -> bool:
    """Whether every value is a finite bfloat16 of full precision. A block of zeros may have any exponent but 255."""
    least, largest = EXPONENTS
    usual = (exponents >= least) & (exponents <= largest)
    zeros = ((codes & 0x77) == 0).all(-1) & (exponents < 255)
    return bool((usual | zeros).all())


def allocate(out_features: int, in_features: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Storage for one weight: packed uint8 [N, K / 2] and scales int16 [N, K / 64], to be sliced as NF4's. Zeros."""
    packed, absmax = nf4.allocate(out_features, in_features, torch.bfloat16, device)
    packed.zero_()
    nf4.stored_rows(packed, absmax, 0, out_features, in_features)[0].zero_()
    return packed, absmax.view(SCALES)


def pack_rows(packed: Tensor, scales: Tensor, row: int, codes: Tensor, exponents: Tensor) -> None:
    """Write a weight [n, K] in a checkpoint's form, codes [n, K / 32, 16] and exponents [n, K / 32], to rows row..."""
    rows, columns = len(codes), codes.shape[1] * BLOCK
    swapped = codes << 4 | codes >> 4  # bitsandbytes has the even column in the high half
    least, largest = EXPONENTS
    exponents = exponents.clamp(least, largest)  # of zeros alone, by `is_exact`
    words, pairs = nf4.stored_rows(packed, scales, row, rows, columns)
    tiles = words.shape[1]
    flat = swapped.reshape(rows, columns // 2)
    exponents = exponents.reshape(rows, columns // nf4.BLOCK, 2).contiguous().view(SCALES)[..., 0]
    if columns % nf4.TILE:
        flat = torch.nn.functional.pad(flat, (0, nf4.BLOCK // 2))
        exponents = torch.nn.functional.pad(exponents, (0, 1))
    source = flat.view(rows // nf4.GROUP, nf4.GROUP, tiles, 2, 4, 2, 4).permute(0, 2, 1, 6, 4, 3, 5)
    words.view(rows // nf4.GROUP, tiles, nf4.GROUP, 4, 4, 2, 2).copy_(source)
    pairs.copy_(exponents.view(rows // nf4.GROUP, nf4.GROUP, tiles, 2).permute(0, 2, 1, 3))


def unpack_rows(packed: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the stored form in a checkpoint's: (codes uint8 [n, K / 32, 16], exponents uint8 [n, K / 32])."""
    rows, columns = packed.shape[0], packed.shape[1] * 2
    codes, _ = nf4.unpack_rows(packed, scales)
    codes = codes.view(rows, columns // BLOCK, 16)
    _, pairs = nf4.stored_rows(packed, scales, 0, rows, columns)
    exponents = pairs.permute(0, 2, 1, 3).reshape(rows, -1)[:, : columns // nf4.BLOCK]
    return codes << 4 | codes >> 4, exponents.contiguous().view(torch.uint8)


def dequantize(packed: Tensor, scales: Tensor, out: Tensor | None = None) -> Tensor:
    """Rows of the stored form -> weight [n, K] in bfloat16. One launch on CUDA. out: as for `nf4.dequantize`."""
    rows, columns = packed.shape[0], packed.shape[1] * 2
    if out is None:
        out = torch.empty(rows, columns, dtype=torch.bfloat16, device=packed.device)
    if out.shape != (rows, columns) or out.dtype != torch.bfloat16 or out.stride(1) != 1:
        raise ValueError(f"out must be a bfloat16 [{rows}, {columns}] with a last stride of 1")
    if packed.is_cuda:
        launch_dequantize(packed, scales, out)
        return out
    return out.copy_(value(*unpack_rows(packed, scales), torch.bfloat16))


def launch_dequantize(packed: Tensor, scales: Tensor, out: Tensor, *, interpreted: bool = False) -> None:
    """The Triton form of `dequantize`. interpreted: look codes up without PTX, as Triton's interpreter needs."""
    rows, columns = out.shape
    words, pairs = nf4.stored_rows(packed, scales, 0, rows, columns)
    assert out.stride(1) == 1 and words.is_contiguous() and pairs.is_contiguous()
    tiles = words.shape[1]
    with on_device(packed):
        _dequantize_kernel[(tiles, triton.cdiv(rows, _TILE_ROWS))](
            words.view(torch.int32), pairs.view(torch.int32), out, rows, columns, out.stride(0), tiles,
            *byte_tables(torch.bfloat16, VALUES), _TILE_ROWS, columns % nf4.TILE != 0, interpreted, num_warps=4,
        )  # fmt: skip


@triton.jit
def mx_scaled(values, exponents, HALF: tl.constexpr, INTERPRETED: tl.constexpr):
    """bfloat16 values [R, 64], columns of half HALF of a tile, times their powers of two: exponents int32 [R] has those
    of the tile's four blocks of 32, byte by byte. An exponent is that of a bfloat16 without mantissa."""
    first = (((exponents >> (16 * HALF)) & 255) << 7).to(tl.int16).to(tl.bfloat16, bitcast=True)
    second = (((exponents >> (16 * HALF + 8)) & 255) << 7).to(tl.int16).to(tl.bfloat16, bitcast=True)
    is_first = (tl.arange(0, 64) < 32)[None, :]
    if INTERPRETED:
        scale = tl.where(is_first, first.to(tl.float32)[:, None], second.to(tl.float32)[:, None])
        return (values.to(tl.float32) * scale).to(tl.bfloat16)
    return values * tl.where(is_first, first[:, None], second[:, None])


@triton.jit
def _dequantize_kernel(
    words_ptr, scales_ptr, out_ptr, rows, columns, stride_out_m, tiles, t0, t1, t2, t3, t4, t5, t6, t7,
    TILE_ROWS: tl.constexpr, HALF_TAIL: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Words [n / 8, tiles, 8, 16] and exponents int32 [n / 8, tiles, 8] -> a [TILE_ROWS, 128] tile of `out_ptr`."""
    tile = tl.program_id(0)
    row = tl.program_id(1) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    inside = (row < rows)[:, None]
    group = tl.minimum(row // 8, rows // 8 - 1) * tiles + tile
    word = tl.load(words_ptr + (group * 128 + row % 8 * 16)[:, None] + tl.arange(0, 16)[None, :])
    exponents = tl.load(scales_ptr + group * 8 + row % 8)
    out_ptrs = out_ptr + row.to(tl.int64)[:, None] * stride_out_m
    for half in tl.static_range(2):
        code = lookup_half(word, half, t0, t1, t2, t3, t4, t5, t6, t7, out_ptr.dtype.element_ty, INTERPRETED)
        value = mx_scaled(tile_columns(code, TILE_ROWS, 1), exponents, half, INTERPRETED)
        column = tile * 128 + half * 64 + tl.arange(0, 64)
        if HALF_TAIL:
            inside = inside & (column < columns)[None, :]
        tl.store(out_ptrs + column[None, :], value, mask=inside)
