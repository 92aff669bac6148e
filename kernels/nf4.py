"""NF4: 4-bit weights in blocks of 64, quantised, stored for fast reading, and dequantised to the same bits everywhere.

Two forms exist. bitsandbytes' (one byte holds two neighbouring weights, one fp32 absmax per block of 64) is what
checkpoints hold and what `quantize` returns. The stored form is a permutation of those bytes, with absmax rounded
once to the compute dtype; `allocate` makes it, `pack_rows` and `quantize_rows` fill rows of it. docs/nf4-kernel.md
draws it.

One definition of the value, for torch, Triton and the fused product in nf4_gemm.py alike (dtype d, bf16 or fp16):

    w = d(d(code) * d(absmax)), one rounding of an exact product.

Every operation has a torch form, which defines it, and a Triton form for CUDA tensors of 16 bits. Not here: the
matrix product, double quantisation on writing, blocks other than 64, and weights whose blocks would cross a row.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo.kernels.launch import cdiv, on_device, round_to
from grpo.kernels.nf4_lookup import BOUNDS, CODE, byte_tables, lookup_half, scaled, tile_columns

BLOCK = 64
"""Weights per absmax."""
TILE = 128
"""Weights of one row that lie together in the stored form: two blocks, whose codes share 32-bit words."""
GROUP = 8
"""Rows that lie together in the stored form; a slice of rows starts and ends at a multiple of this."""

_SMALLEST_ABSMAX = 1e-38
"""bitsandbytes divides by no less (an all-zero block gets code 7, zero)."""
_CHUNK = 1 << 24
"""Weights that the torch forms handle at once: their temporaries stay near 0.3 GB."""


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`weight` in bitsandbytes' form: (codes uint8 [N * K / 2, 1], absmax float32 [N * K / 64]).

    weight: [N, K], float32, bfloat16 or float16, K a multiple of 64. Bit for bit what `quantize_4bit` of
    bitsandbytes 0.50.2 returns on a CPU with quant_type="nf4", blocksize=64: a value goes to the nearest code, one
    half-way between two codes to the lower. Raises ValueError for another shape or dtype.
    """
    rows, columns = _check_weight(weight)
    flat = weight.reshape(-1)
    bounds = torch.tensor(BOUNDS, dtype=torch.float32, device=weight.device)
    codes = torch.empty(flat.numel() // 2, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(flat.numel() // BLOCK, dtype=torch.float32, device=weight.device)
    for start in range(0, flat.numel(), _CHUNK):
        blocks = flat[start : start + _CHUNK].view(-1, BLOCK).float()
        largest = blocks.abs().amax(1)
        scaled = blocks * (1.0 / largest.clamp(min=_SMALLEST_ABSMAX))[:, None]
        nearest = torch.bucketize(scaled.view(-1), bounds, out_int32=True).to(torch.uint8)
        codes[start // 2 : start // 2 + nearest.numel() // 2] = nearest[0::2] << 4 | nearest[1::2]
        absmax[start // BLOCK : start // BLOCK + largest.numel()] = largest
    return codes[:, None], absmax


def dequantize_bitsandbytes(codes: Tensor, absmax: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The weight [N, K] = `shape` in `dtype`, by the definition above, from bitsandbytes' form (absmax un-nested)."""
    rows, columns = shape
    _check_columns(columns)
    table = _pair_table(dtype, codes.device)
    out = torch.empty(rows * columns, dtype=dtype, device=codes.device)
    codes, absmax = codes.reshape(-1), absmax.reshape(-1)
    for start in range(0, out.numel(), _CHUNK):
        part = slice(start, min(start + _CHUNK, out.numel()))
        values = table[codes[part.start // 2 : part.stop // 2].int()].view(-1, BLOCK)
        scales = absmax[part.start // BLOCK : part.stop // BLOCK].to(dtype)
        torch.mul(values, scales[:, None], out=out[part].view(-1, BLOCK))
    return out.view(rows, columns)


def unnest_absmax(absmax: Tensor, nested_absmax: Tensor, nested_code: Tensor, offset: Tensor | float) -> Tensor:
    """Double-quantised absmax -> float32, as bitsandbytes computes it.

    absmax: uint8 [n], indices into `nested_code`, float32 [256]; nested_absmax: float32, one per 256 of them.
    """
    flat = absmax.reshape(-1)
    values = nested_code.float()[flat.int()]
    values *= nested_absmax.float().repeat_interleave(256)[: flat.numel()]
    return values.add_(offset)


def allocate(
    out_features: int, in_features: int, dtype: torch.dtype, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Storage for one weight in the stored form: packed uint8 [N, K / 2] and absmax `dtype` [N, K / 64].

    Rows are slices: `packed[a:b]` and `absmax[a:b]`, with a and b multiples of 8, are the stored form of those rows.
    Within them the order is the kernels' own. If K is an odd multiple of 64 the storage holds rows padded by one
    block of zeros, and both tensors are views with a stride larger than their width: never call `contiguous()` on
    them. Unfilled rows are zeros. Raises ValueError if N is not a multiple of 8, or K of 64.
    """
    _check_columns(in_features)
    if out_features % GROUP:
        raise ValueError(f"{out_features} output features are not a multiple of {GROUP}")
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"absmax in {dtype}: use bfloat16, float16 or float32")
    padded = -(-in_features // TILE) * TILE
    packed = torch.full((out_features, padded // 2), 0x77, dtype=torch.uint8, device=device)
    absmax = torch.zeros(out_features, padded // BLOCK, dtype=dtype, device=device)
    return packed[:, : in_features // 2], absmax[:, : in_features // BLOCK]


def pack_rows(packed: Tensor, absmax: Tensor, row: int, codes: Tensor, scales: Tensor, shape: tuple[int, int]) -> None:
    """Write a weight [n, K] = `shape`, given in bitsandbytes' form (scales float32, un-nested), to rows row..row+n."""
    rows, columns = shape
    words, pairs = stored_rows(packed, absmax, row, rows, columns)
    tiles = words.shape[1]
    codes, scales = codes.reshape(rows, columns // 2), scales.reshape(rows, columns // BLOCK)
    if columns % TILE:
        codes = torch.nn.functional.pad(codes, (0, BLOCK // 2), value=0x77)
        scales = torch.nn.functional.pad(scales, (0, 1))
    # A byte is (block of the tile, w, j, c) in bitsandbytes' order and (c, w, block, j) in ours.
    source = codes.view(rows // GROUP, GROUP, tiles, 2, 4, 2, 4).permute(0, 2, 1, 6, 4, 3, 5)
    words.view(rows // GROUP, tiles, GROUP, 4, 4, 2, 2).copy_(source)
    pairs.copy_(scales.view(rows // GROUP, GROUP, tiles, 2).permute(0, 2, 1, 3))


def quantize_rows(packed: Tensor, absmax: Tensor, row: int, weight: Tensor) -> None:
    """Quantise `weight` [n, K] to rows row..row+n: `quantize`, then `pack_rows`, in one launch on CUDA."""
    rows, columns = _check_weight(weight)
    if not (weight.is_cuda and absmax.dtype in (torch.bfloat16, torch.float16)):
        pack_rows(packed, absmax, row, *quantize(weight), (rows, columns))
        return
    launch_quantize(packed, absmax, row, weight.contiguous())


def unpack_rows(packed: Tensor, absmax: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the stored form in bitsandbytes' form: (codes uint8 [n * K / 2, 1], absmax float32 [n * K / 64])."""
    rows, columns = packed.shape[0], packed.shape[1] * 2
    words, pairs = stored_rows(packed, absmax, 0, rows, columns)
    tiles = words.shape[1]
    stored = words.view(rows // GROUP, tiles, GROUP, 4, 4, 2, 2)
    codes = stored.permute(0, 2, 1, 5, 4, 6, 3).reshape(rows, tiles * TILE // 2)
    scales = pairs.permute(0, 2, 1, 3).reshape(rows, tiles * 2)
    return (
        codes[:, : columns // 2].reshape(-1, 1),
        scales[:, : columns // BLOCK].to(torch.float32).reshape(-1),
    )


def dequantize(packed: Tensor, absmax: Tensor, out: Tensor | None = None) -> Tensor:
    """Rows of the stored form -> weight [n, K] in absmax's dtype. One launch on CUDA.

    out: where to write, [n, K] in that dtype, its rows as far apart as they like; None allocates.
    """
    rows, columns = packed.shape[0], packed.shape[1] * 2
    if out is None:
        out = torch.empty(rows, columns, dtype=absmax.dtype, device=packed.device)
    if out.shape != (rows, columns) or out.dtype != absmax.dtype or out.stride(1) != 1:
        raise ValueError(f"out must be a {absmax.dtype} [{rows}, {columns}] with a last stride of 1")
    if by_kernel(packed, absmax):
        launch_dequantize(packed, absmax, out)
        return out
    codes, _ = unpack_rows(packed, absmax)
    _, pairs = stored_rows(packed, absmax, 0, rows, columns)
    scales = pairs.permute(0, 2, 1, 3).reshape(rows, -1)[:, : columns // BLOCK]
    return out.copy_(dequantize_bitsandbytes(codes, scales, (rows, columns), absmax.dtype))


def by_kernel(packed: Tensor, absmax: Tensor) -> bool:
    """Whether a kernel dequantises this, if it is of the stored form."""
    return packed.is_cuda and packed.dtype == torch.uint8 and absmax.dtype in (torch.bfloat16, torch.float16)


def launch_quantize(packed: Tensor, absmax: Tensor, row: int, weight: Tensor, *, interpreted: bool = False) -> None:
    """The Triton form of `quantize_rows`. interpreted: as for `launch_dequantize`."""
    rows, columns = weight.shape
    words, pairs = stored_rows(packed, absmax, row, rows, columns)
    assert weight.is_contiguous() and words.is_contiguous() and pairs.is_contiguous()
    tiles = words.shape[1]
    grid = (tiles, cdiv(rows, _TILE_ROWS))
    with on_device(packed):
        _quantize_kernel[grid](
            weight, words.view(torch.int32), pairs, rows, columns, tiles, _TILE_ROWS, columns % TILE != 0,
            interpreted, num_warps=4,
        )  # fmt: skip


def launch_dequantize(packed: Tensor, absmax: Tensor, out: Tensor, *, interpreted: bool = False) -> None:
    """The Triton form of `dequantize`. interpreted: look codes up without PTX, as Triton's interpreter needs."""
    StoredMatrix(packed, absmax).launch_dequantize(out, interpreted=interpreted)


class StoredMatrix:
    """Rows of the stored form as the kernels see them, looked at once: a training step dequantises each matrix many
    times, and a look takes the host longer than the launch takes the GPU."""

    def __init__(self, packed: Tensor, absmax: Tensor):
        self.rows, self.columns = packed.shape[0], packed.shape[1] * 2
        words, self.pairs = stored_rows(packed, absmax, 0, self.rows, self.columns)
        assert words.is_contiguous() and self.pairs.is_contiguous()
        self.tiles = words.shape[1]
        self.words = words.view(torch.int32)
        self.grid = (self.tiles, cdiv(self.rows, _TILE_ROWS))

    def launch_dequantize(self, out: Tensor, *, interpreted: bool = False) -> None:
        """The weight [n, K] to `out`, in absmax's dtype, its last stride 1."""
        assert out.shape == (self.rows, self.columns) and out.stride(1) == 1 and out.dtype == self.pairs.dtype
        with on_device(self.words):
            _dequantize_kernel[self.grid](
                self.words, self.pairs, out, self.rows, self.columns, out.stride(0), self.tiles,
                *byte_tables(out.dtype), _TILE_ROWS, self.columns % TILE != 0, interpreted, num_warps=4,
            )  # fmt: skip


_TILE_ROWS = 64
"""Rows per program of the two kernels below."""
_BOUNDS = tl.constexpr(BOUNDS)


@triton.jit
def _quantize_kernel(
    weight_ptr, words_ptr, scales_ptr, rows, columns, tiles, TILE_ROWS: tl.constexpr, HALF_TAIL: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A [TILE_ROWS, 128] tile of `weight_ptr` -> words [n / 8, tiles, 8, 16] and scales [n / 8, tiles, 8, 2]."""
    tile = tl.program_id(0)
    row = tl.program_id(1) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    inside = (row < rows)[:, None]
    group = row // 8 * tiles + tile
    word = tl.zeros([TILE_ROWS, 16], tl.int32)
    for half in tl.static_range(2):
        column = tile * 128 + half * 64 + tl.arange(0, 64)
        valid = inside
        if HALF_TAIL:
            valid = valid & (column < columns)[None, :]
        source = weight_ptr + row.to(tl.int64)[:, None] * columns + column[None, :]
        value = tl.load(source, mask=valid, other=0.0).to(tl.float32)
        absmax = tl.max(tl.abs(value), 1)
        divisor = tl.maximum(absmax, tl.full([TILE_ROWS], 1e-38, tl.float32))
        unit = value * tl.div_rn(tl.full([TILE_ROWS], 1.0, tl.float32), divisor)[:, None]
        code = tl.zeros([TILE_ROWS, 64], tl.int32)
        for index in tl.static_range(15):
            code += (unit > _BOUNDS[index]).to(tl.int32)
        # Columns are (w, j, c, e); a word is (c, w), its nibbles (half, j, e) from high e to low.
        first, second = tl.split(tl.reshape(code, [TILE_ROWS, 4, 2, 4, 2]))
        low, high = tl.split(tl.permute(first << 4 | second, [0, 3, 1, 2]))
        word |= tl.reshape(low | high << 8, [TILE_ROWS, 16]) << (16 * half)
        tl.store(
            scales_ptr + group * 16 + row % 8 * 2 + half,
            round_to(absmax, scales_ptr.dtype.element_ty, INTERPRETED),
            mask=row < rows,
        )
    tl.store(words_ptr + (group * 128 + row % 8 * 16)[:, None] + tl.arange(0, 16)[None, :], word, mask=inside)


@triton.jit
def _dequantize_kernel(
    words_ptr, scales_ptr, out_ptr, rows, columns, stride_out_m, tiles, t0, t1, t2, t3, t4, t5, t6, t7,
    TILE_ROWS: tl.constexpr, HALF_TAIL: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Words [n / 8, tiles, 8, 16] and scales [n / 8, tiles, 8, 2] -> a [TILE_ROWS, 128] tile of `out_ptr`."""
    tile = tl.program_id(0)
    row = tl.program_id(1) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    inside = (row < rows)[:, None]
    group = tl.minimum(row // 8, rows // 8 - 1) * tiles + tile
    word = tl.load(words_ptr + (group * 128 + row % 8 * 16)[:, None] + tl.arange(0, 16)[None, :])
    out_ptrs = out_ptr + row.to(tl.int64)[:, None] * stride_out_m
    for half in tl.static_range(2):
        scale = tl.load(scales_ptr + group * 16 + row % 8 * 2 + half)
        code = lookup_half(word, half, t0, t1, t2, t3, t4, t5, t6, t7, out_ptr.dtype.element_ty, INTERPRETED)
        value = tile_columns(code, TILE_ROWS, 1)
        value = scaled(value, scale, out_ptr.dtype.element_ty, INTERPRETED)
        column = tile * 128 + half * 64 + tl.arange(0, 64)
        if HALF_TAIL:
            inside = inside & (column < columns)[None, :]
        tl.store(out_ptrs + column[None, :], value, mask=inside)


def stored_rows(packed: Tensor, absmax: Tensor, row: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Rows row..row+rows of the storage as the kernels see it: bytes [rows / 8, tiles, 8, 64] and scales [rows / 8,
    tiles, 8, 2], contiguous, with tiles = ceil(columns / 128). ValueError if that is not what the tensors are."""
    tiles = -(-columns // TILE)
    if packed.shape != (packed.shape[0], columns // 2) or absmax.shape != (packed.shape[0], columns // BLOCK):
        raise ValueError(f"storage of {tuple(packed.shape)} and {tuple(absmax.shape)} does not hold {columns} columns")
    if packed.stride() != (tiles * TILE // 2, 1) or absmax.stride() != (tiles * 2, 1):
        raise ValueError("storage is not as `allocate` made it; pass slices of its rows, never a contiguous copy")
    first = packed.storage_offset() // packed.stride(0) + row
    if first % GROUP or rows % GROUP or not 0 <= row <= row + rows <= packed.shape[0]:
        raise ValueError(
            f"rows {row} to {row + rows}: a slice starts and ends at a multiple of {GROUP} within the storage"
        )
    return (
        packed.as_strided((rows // GROUP, tiles, GROUP, 64), (tiles * 512, 512, 64, 1), first * packed.stride(0)),
        absmax.as_strided((rows // GROUP, tiles, GROUP, 2), (tiles * 16, 16, 2, 1), first * absmax.stride(0)),
    )


def _check_columns(columns: int) -> None:
    if columns % BLOCK:
        raise ValueError(f"{columns} columns are not a multiple of {BLOCK}: NF4 blocks would cross rows")


def _check_weight(weight: Tensor) -> tuple[int, int]:
    if weight.ndim != 2 or weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"NF4 takes a float matrix, not {weight.dtype} {tuple(weight.shape)}")
    _check_columns(weight.shape[1])
    return weight.shape[0], weight.shape[1]


@lru_cache
def _pair_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """[256, 2]: the two codes of a byte, high nibble first, as values. Made once: a CUDA graph cannot copy it."""
    with torch.inference_mode(False):
        code = torch.tensor(CODE, dtype=torch.float32).to(dtype)
        byte = torch.arange(256)
        return torch.stack([code[byte >> 4], code[byte & 15]], 1).to(device)
