"""NF4's sixteen values, and how a Triton kernel turns packed words into them in registers.

A 32-bit word of the stored form (docs/nf4-kernel.md) holds four codes of each of two blocks of 64. On NVIDIA hardware
four codes are looked up at once by byte permutation: the table of 16-bit values is split into a table of upper and
one of lower bytes, each 16 bytes or four registers; three `prmt` look up four bytes of one table, and a last pair of
them interleaves the two tables' bytes. For Triton's interpreter the same is done with shifts.

Not here: scales, tiles of a matrix product, anything on the host but the tables.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from grpo.kernels.launch import round_to

CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""NormalFloat4 (Dettmers et al., 2023, arXiv:2305.14314, appendix E), as bitsandbytes' float32 values."""

BOUNDS = tuple(((torch.tensor(CODE)[:-1] + torch.tensor(CODE)[1:]) / 2).tolist())
"""Half-way between neighbouring codes, rounded to float32: above BOUNDS[i] lies code i + 1."""


@lru_cache
def byte_tables(dtype: torch.dtype, values: tuple[float, ...] = CODE) -> tuple[int, ...]:
    """Eight int32 for a kernel's t0..t7: the upper bytes of the sixteen `values` in `dtype` (16 bits), then the lower.

    Kernel arguments rather than immediates: ptxas moves an immediate to a register again for every `prmt`.
    """
    bits = torch.tensor(values).to(dtype).view(torch.int16).to(torch.int32)
    both = torch.stack([bits >> 8, bits]).to(torch.uint8)
    return tuple(both.reshape(-1).view(torch.int32).tolist())


PRMT = tl.constexpr(
    """{
.reg .b32 a, b, upper, lower, first, second;
prmt.b32 a, $6, $7, $4;
prmt.b32 b, $8, $9, $4;
prmt.b32 upper, a, b, $5;
prmt.b32 a, $10, $11, $4;
prmt.b32 b, $12, $13, $4;
prmt.b32 lower, a, b, $5;
prmt.b32 first, lower, upper, 0x4051;
prmt.b32 second, lower, upper, 0x6273;
mov.b32 {$0, $1}, first;
mov.b32 {$2, $3}, second;
}"""
)
"""Four values $0..$3 from the nibbles of a word's low half, in the order 1, 0, 3, 2. $4: each nibble's three low bits,
which choose among the first and among the last eight codes. $5: nibble i is i, or i + 4 where bit 3 of nibble i is
set, which chooses between those two choices. $6..$13: `byte_tables`."""


@triton.jit
def lookup_half(
    word, HALF: tl.constexpr, t0, t1, t2, t3, t4, t5, t6, t7, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr
):  # fmt: skip
    """int32 words [R, 16] -> values [R, 16, 2 (e), 2 (j)] of block HALF of the tile, in DTYPE (bf16 or fp16).

    t0..t7: `byte_tables` of DTYPE.
    """
    if INTERPRETED:
        first = _interpreted_bits(word, HALF * 16 + 4, t0, t1, t2, t3, t4, t5, t6, t7)
        second = _interpreted_bits(word, HALF * 16, t0, t1, t2, t3, t4, t5, t6, t7)
        third = _interpreted_bits(word, HALF * 16 + 12, t0, t1, t2, t3, t4, t5, t6, t7)
        fourth = _interpreted_bits(word, HALF * 16 + 8, t0, t1, t2, t3, t4, t5, t6, t7)
    else:
        low = word & 0x77777777
        choice = ((word >> 1) & 0x44444444) | 0x32103210
        first, second, third, fourth = tl.inline_asm_elementwise(
            PRMT, "=h,=h,=h,=h,r,r,r,r,r,r,r,r,r,r",
            [low >> (16 * HALF), choice >> (16 * HALF), t0, t1, t2, t3, t4, t5, t6, t7],
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True, pack=1,
        )  # fmt: skip
    return tl.join(tl.join(first, second), tl.join(third, fourth)).to(DTYPE, bitcast=True)


LANE_TABLE = tl.constexpr(
    """{
.reg .b32 lane, three, a, b, upper, lower;
.reg .pred last;
mov.u32 lane, %laneid;
and.b32 three, lane, 7;
and.b32 lane, lane, 8;
setp.ne.u32 last, lane, 0;
prmt.b32 a, $1, $2, three;
prmt.b32 b, $3, $4, three;
selp.b32 upper, b, a, last;
prmt.b32 a, $5, $6, three;
prmt.b32 b, $7, $8, three;
selp.b32 lower, b, a, last;
prmt.b32 $0, lower, upper, 0x40;
and.b32 $0, $0, 0xffff;
}"""
)
"""In lane i of a warp, and in lane i + 16, the 16 bits of code i, from `byte_tables`."""

SHUFFLE_BF16 = tl.constexpr(
    """{
.reg .b32 a, b, first, second;
shfl.sync.idx.b32 a, $8, $5, 0x1f, -1;
shfl.sync.idx.b32 b, $9, $4, 0x1f, -1;
add.rn.bf16x2 first, a, b;
shfl.sync.idx.b32 a, $8, $7, 0x1f, -1;
shfl.sync.idx.b32 b, $9, $6, 0x1f, -1;
add.rn.bf16x2 second, a, b;
mov.b32 {$0, $1}, first;
mov.b32 {$2, $3}, second;
}"""
)
SHUFFLE_FP16 = tl.constexpr(
    """{
.reg .b32 a, b, first, second;
shfl.sync.idx.b32 a, $8, $5, 0x1f, -1;
shfl.sync.idx.b32 b, $9, $4, 0x1f, -1;
add.rn.f16x2 first, a, b;
shfl.sync.idx.b32 a, $8, $7, 0x1f, -1;
shfl.sync.idx.b32 b, $9, $6, 0x1f, -1;
add.rn.f16x2 second, a, b;
mov.b32 {$0, $1}, first;
mov.b32 {$2, $3}, second;
}"""
)
"""Four values $0..$3 in the order of `PRMT`. $4..$7: words whose lowest nibbles are the codes 0 to 3. $8: `lane_table`,
$9: the same in the upper halves. Bit 4 of a word goes into the lane that is asked, whose value is the same."""


@triton.jit
def lane_table(t0, t1, t2, t3, t4, t5, t6, t7):
    """The 16 bits of one of the sixteen codes, another in every lane, for `shuffled_half`: no number of the program, as
    Triton takes it to be, but one of each thread."""
    return tl.inline_asm_elementwise(
        LANE_TABLE, "=r,r,r,r,r,r,r,r,r", [t0, t1, t2, t3, t4, t5, t6, t7], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def shuffled_half(word, HALF: tl.constexpr, table, DTYPE: tl.constexpr):
    """What `lookup_half` gives, by asking other lanes for theirs of `table`, which loads another unit than byte
    permutation does. On sm_90 and later; all lanes of a warp have to come here together."""
    shifted = [word >> (16 * HALF), word >> (16 * HALF + 4), word >> (16 * HALF + 8), word >> (16 * HALF + 12)]
    first, second, third, fourth = tl.inline_asm_elementwise(
        SHUFFLE_BF16 if DTYPE == tl.bfloat16 else SHUFFLE_FP16, "=h,=h,=h,=h,r,r,r,r,r,r",
        [shifted[0], shifted[1], shifted[2], shifted[3], table, table << 16],
        dtype=(tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True, pack=1,
    )  # fmt: skip
    return tl.join(tl.join(first, second), tl.join(third, fourth)).to(DTYPE, bitcast=True)


@triton.jit
def _interpreted_bits(word, SHIFT: tl.constexpr, t0, t1, t2, t3, t4, t5, t6, t7):
    code = (word >> SHIFT) & 15
    upper = tl.where(code < 8, tl.where(code < 4, t0, t1), tl.where(code < 12, t2, t3))
    lower = tl.where(code < 8, tl.where(code < 4, t4, t5), tl.where(code < 12, t6, t7))
    shift = (code & 3) * 8
    return (((upper >> shift) & 255) << 8 | (lower >> shift) & 255).to(tl.int16)


@triton.jit
def scaled(values, scale, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """values [R, C] times scale [R], rounded once to DTYPE: the product of two 16-bit floats is exact in float32."""
    if INTERPRETED:
        return round_to(values.to(tl.float32) * scale.to(tl.float32)[:, None], DTYPE, INTERPRETED)
    return values * scale[:, None]


@triton.jit
def fenced(values, FENCED: tl.constexpr):
    """`values`, where Triton must not look further back to choose the order of mma.sync's operand in registers.

    Triton 3.6 halves the width that it assumes of a loaded value when it finds a `join` behind an operand, and then
    wants four neighbouring columns in a lane where `lookup_half` has two and two: every value would change lanes. It
    looks no further than an instruction that may have effects. This one has none, and costs none.
    """
    if FENCED:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [values], values.dtype, is_pure=False, pack=2)
    return values


@triton.jit
def tile_columns(values, ROWS: tl.constexpr, WARPS: tl.constexpr):
    """`lookup_half`'s [ROWS, 16 (c, w), 2 (e), 2 (j)] -> [ROWS, 64] in the order of the matrix's columns, 16 w + 8 j +
    2 c + e, and of its rows, where the words were loaded in the order of `load_rows`.

    With one warp the orders of rows are the same. Otherwise: Triton gives neighbouring groups of 8 loaded rows to
    different warps, while wgmma's register operand wants groups 2 i and 2 i + 1 in warp i; exchanging them here, in
    the names of the rows, leaves every value in the lane and warp that loaded it. No shared memory, no barrier.
    """
    values = tl.reshape(values, [ROWS // (16 * WARPS), 2, WARPS, 8, 4, 4, 2, 2])
    values = tl.permute(values, [0, 2, 1, 3, 5, 7, 4, 6])
    return tl.reshape(values, [ROWS, 64])


@triton.jit
def load_rows(ROWS: tl.constexpr, WARPS: tl.constexpr):
    """[ROWS]: which row of the tile to load at each position, so that `tile_columns` puts them in order."""
    position = tl.arange(0, ROWS)
    group = position // 8
    return position // (16 * WARPS) * (16 * WARPS) + group % WARPS * 16 + group // WARPS % 2 * 8 + position % 8
