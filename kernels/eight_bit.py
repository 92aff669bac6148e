"""8-bit weights: integers or FP8 numbers with float32 scales, quantised, dequantised to the same bits everywhere.

Codes are int8, or float8_e4m3fn without its NaN, [N, K], row after row as in a checkpoint. Scales are float32
[N / R, G]: one for R neighbouring rows and a group of columns, whose width is K where G is 1 and else a power of two
(the last group may be cut short). So one form holds a scale for each row, for a whole tensor, and for blocks of 128 x
128; rows from a multiple of R to another are a slice of both tensors.

One definition of the value, for torch, Triton and the fused product in eight_bit_gemm.py alike (dtype d):

    w = d(float32(code) * scale), one product in float32, rounded to d.

int8 is what bitsandbytes makes of a weight, whose absmax of a row is 127 times our scale.

Not here: the matrix product, other kinds of 8 bit (e5m2, zero points, outlier columns in 16 bit), and activations,
which stay in 16 bit: bitsandbytes chooses outlier columns over a batch, so a row's result would depend on the others.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo.kernels.launch import on_device, round_to

INT8, FP8 = torch.int8, torch.float8_e4m3fn
LARGEST_CODE = 127.0
_CHUNK = 1 << 24
"""Weights that the torch forms handle at once."""
_TILE_ROWS, _TILE_COLUMNS = 32, 128
"""Of a program of the kernel below."""


def is_eight_bit(weight: Tensor) -> bool:
    """Whether `weight` holds codes of this file's kind."""
    return weight.dtype in (INT8, FP8)


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`weight` [N, K] as (codes int8 [N, K], scales float32 [N, 1]).

    Bit for bit the codes that bitsandbytes 0.50.2 gives a linear layer loaded in 8 bit on a CPU, which it rounds to
    float16 first; its CUDA kernel divides less exactly, and one code in 4,000 is another there. A row beyond the range
    of float16 is taken as it is. A row of zeros has code 0 and scale 0.
    """
    codes = torch.empty(weight.shape, dtype=INT8, device=weight.device)
    scales = torch.empty(weight.shape[0], 1, dtype=torch.float32, device=weight.device)
    step = max(1, _CHUNK // weight.shape[1])
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        half = weight[rows].half()
        values = torch.where(half.isfinite().all(1, keepdim=True), half.float(), weight[rows].float())
        absmax = values.abs().amax(1, keepdim=True)
        inverse = torch.where(absmax > 0, LARGEST_CODE / absmax, 0.0)
        codes[rows] = torch.round(values * inverse).to(INT8)
        scales[rows] = absmax / LARGEST_CODE
    return codes, scales


def group_width(columns: int, groups: int) -> int:
    """Columns of a group, of which a row of `columns` has `groups`, the last of them perhaps cut short."""
    return columns if groups == 1 else 1 << (math.ceil(columns / groups) - 1).bit_length()


def expanded(scales: Tensor, rows: int, columns: int) -> Tensor:
    """`scales` as a tensor that multiplies codes [rows, columns]: a view where there is one for each row or for all."""
    by_row = scales.repeat_interleave(rows // scales.shape[0], 0) if scales.shape[0] not in (1, rows) else scales
    if scales.shape[1] == 1:
        return by_row
    return by_row.repeat_interleave(group_width(columns, scales.shape[1]), 1)[:, :columns]


def row_scales(scales: Tensor, codes: Tensor, rows: slice) -> Tensor:
    """The scales of `rows`, which begin and end at multiples of the rows that share one."""
    shared = codes.shape[0] // scales.shape[0]
    if rows.start % shared or rows.stop % shared:
        raise ValueError(f"rows {rows.start} to {rows.stop}: {shared} of them share a scale")
    return scales[rows.start // shared : rows.stop // shared]


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The weight [N, K] in `dtype`. One launch on CUDA.

    out: where to write, its rows as far apart as they like; None allocates.
    """
    if out is None:
        out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    if out.shape != codes.shape or out.dtype != dtype or out.stride(1) != 1:
        raise ValueError(f"out must be a {dtype} {tuple(codes.shape)} with a last stride of 1")
    if codes.is_cuda:
        launch_dequantize(codes, scales, out)
        return out
    shared = codes.shape[0] // scales.shape[0]
    step = max(1, _CHUNK // codes.shape[1] // shared) * shared
    for start in range(0, codes.shape[0], step):
        rows = slice(start, min(start + step, codes.shape[0]))
        part = codes[rows].float()
        out[rows] = part.mul_(expanded(row_scales(scales, codes, rows), *part.shape))
    return out


def launch_dequantize(codes: Tensor, scales: Tensor, out: Tensor, *, interpreted: bool = False) -> None:
    """The Triton form of `dequantize`. interpreted: as Triton's interpreter needs."""
    rows, columns = codes.shape
    assert codes.stride(1) == 1 and scales.is_contiguous() and rows % scales.shape[0] == 0 and out.stride(1) == 1
    grid = (triton.cdiv(columns, _TILE_COLUMNS), triton.cdiv(rows, _TILE_ROWS))
    with on_device(codes):
        _dequantize_8bit_kernel[grid](
            codes.view(torch.int8), scales, out, rows, columns, codes.stride(0), out.stride(0),
            rows // scales.shape[0], scales.shape[1], group_width(columns, scales.shape[1]), codes.dtype == FP8,
            _TILE_ROWS, _TILE_COLUMNS, interpreted, num_warps=4,
        )  # fmt: skip


@triton.jit
def _dequantize_8bit_kernel(
    codes_ptr, scales_ptr, out_ptr, rows, columns, stride_codes_n, stride_out_n, shared, groups, width,
    IS_FP8: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A [BN, BK] tile."""
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.program_id(0) * BK + tl.arange(0, BK)
    inside = (n < rows)[:, None] & (k < columns)[None, :]
    row = n.to(tl.int64)[:, None]
    code = tl.load(codes_ptr + row * stride_codes_n + k[None, :], mask=inside, other=0)
    scale = tl.load(scales_ptr + row // shared * groups + (k // width)[None, :], mask=inside, other=0.0)
    value = decoded(code, scale, out_ptr.dtype.element_ty, IS_FP8, INTERPRETED)
    tl.store(out_ptr + row * stride_out_n + k[None, :], value, mask=inside)


SIGNED_BYTES = tl.constexpr(
    """{
.reg .b32 biased;
.reg .f32 first, second, third, fourth;
xor.b32 biased, $4, 0x80808080;
prmt.b32 $0, biased, 0x4B000000, 0x7440;
prmt.b32 $1, biased, 0x4B000000, 0x7441;
prmt.b32 $2, biased, 0x4B000000, 0x7442;
prmt.b32 $3, biased, 0x4B000000, 0x7443;
mov.b32 first, $0;
mov.b32 second, $1;
mov.b32 third, $2;
mov.b32 fourth, $3;
sub.f32 first, first, 0f4B000080;
sub.f32 second, second, 0f4B000080;
sub.f32 third, third, 0f4B000080;
sub.f32 fourth, fourth, 0f4B000080;
mov.b32 $0, first;
mov.b32 $1, second;
mov.b32 $2, third;
mov.b32 $3, fourth;
}"""
)
"""float32 $0..$3 of a word's four signed bytes: a byte below the exponent of 2^23 is 2^23 plus itself."""

FP8_BYTES = tl.constexpr(
    """{
.reg .b32 spread, shifted, sign, halves;
.reg .b16 low, high;
prmt.b32 spread, $4, 0, 0x1404;
shr.b32 shifted, spread, 1;
and.b32 sign, spread, 0x80008000;
and.b32 shifted, shifted, 0x3F803F80;
or.b32 halves, sign, shifted;
mov.b32 {low, high}, halves;
cvt.f32.f16 $0, low;
cvt.f32.f16 $1, high;
prmt.b32 spread, $4, 0, 0x3424;
shr.b32 shifted, spread, 1;
and.b32 sign, spread, 0x80008000;
and.b32 shifted, shifted, 0x3F803F80;
or.b32 halves, sign, shifted;
mov.b32 {low, high}, halves;
cvt.f32.f16 $2, low;
cvt.f32.f16 $3, high;
}"""
)
"""float32 $0..$3 of a word's four e4m3 numbers, each divided by 256."""


@triton.jit
def decoded_words(word, IS_FP8: tl.constexpr, INTERPRETED: tl.constexpr):
    """int32 words [R, W] -> float32 [R, W, 2 (e), 2 (j)], byte 2 j + e of each; of FP8 divided by 256."""
    if INTERPRETED:
        first, second = _byte(word, 0, IS_FP8), _byte(word, 8, IS_FP8)
        third, fourth = _byte(word, 16, IS_FP8), _byte(word, 24, IS_FP8)
    else:
        first, second, third, fourth = tl.inline_asm_elementwise(
            FP8_BYTES if IS_FP8 else SIGNED_BYTES, "=r,=r,=r,=r,r" if not IS_FP8 else "=f,=f,=f,=f,r", [word],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
    return tl.join(tl.join(first, second), tl.join(third, fourth))


@triton.jit
def _byte(word, SHIFT: tl.constexpr, IS_FP8: tl.constexpr):
    code = (word << (24 - SHIFT)) >> 24
    if IS_FP8:
        return ((code.to(tl.int16) << 7) & -16385).to(tl.float16, bitcast=True).to(tl.float32)
    return code.to(tl.float32)


@triton.jit
def decoded(code, scale, DTYPE: tl.constexpr, IS_FP8: tl.constexpr, INTERPRETED: tl.constexpr):
    """int8 bits [..] and scales that broadcast -> values in DTYPE.

    An e4m3 number's bits, moved to where float16 has its fields, are the number divided by 256, subnormal ones too;
    Triton's own conversion exists from sm_89 on.
    """
    if IS_FP8:
        bits = (code.to(tl.int16) << 7) & -16385  # the sign stays at the top, and its copy below goes
        value = bits.to(tl.float16, bitcast=True).to(tl.float32) * (scale * 256.0)
    else:
        value = code.to(tl.float32) * scale
    return round_to(value, DTYPE, INTERPRETED)
