"""Rotary position embedding by halves, in place or not, forward and backward.

    (x1, x2) -> (x1 cos1 - x2 sin1, x2 cos2 + x1 sin2)

over the first `cos.shape[-1]` columns of every head; the rest passes unchanged (partial rotation, as in Phi). The
backward is the transposed map, so nothing of x is kept. Products and sum are in float32, rounded once. Formula: Su et
al., 2021 (arXiv:2104.09864), in the half-split form of the Llama checkpoints.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo.kernels.launch import (
    accumulation_dtype,
    cdiv,
    is_interpreted,
    next_power_of_2,
    on_device,
    round_to,
    triton_supports,
    unit_stride,
)

TOKENS, HEADS = 8, 8
"""Of a program. More heads would read cosines less often, and leave a GPU without enough programs to hide their
reading."""


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [tokens, heads, dim] rotated, with gradient for x. cos, sin: [tokens, rotated columns], in any float dtype."""
    return _Rope.apply(x, cos, sin)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return rotate(unit_stride(grad), *ctx.saved_tensors, inverse=True), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor | None = None, *, inverse: bool = False) -> Tensor:
    """Rotate x [tokens, heads, dim] without autograd; `inverse`: by the transposed map, which takes gradients back.

    x and out: any strides but 1 in the last dimension; out may be x, None allocates. cos and sin: [tokens, rotated
    columns], contiguous.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    rotated = cos.shape[-1]
    if x.ndim != 3 or out.shape != x.shape or x.stride(-1) != 1 or out.stride(-1) != 1 or out.dtype != x.dtype:
        raise ValueError(
            f"rope of {x.dtype} {tuple(x.shape)} into {out.dtype} {tuple(out.shape)}, strides {x.stride()}"
        )
    if cos.shape != sin.shape or cos.shape[0] != x.shape[0] or rotated % 2 or rotated > x.shape[-1]:
        raise ValueError(f"rope of {tuple(x.shape)} by cosines of {tuple(cos.shape)} and sines of {tuple(sin.shape)}")
    if triton_supports(x):
        launch_rotate(x, cos, sin, out, inverse=inverse)
    else:
        out.copy_(_torch(x, cos, sin, inverse))
    return out


def _torch(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    rotated = cos.shape[-1]
    values = x[..., :rotated].to(accumulation_dtype(x.dtype))
    cos, sin = (part.to(values.dtype)[:, None] for part in (cos, sin))
    first, second = values.chunk(2, -1)
    if inverse:
        upper, lower = sin.chunk(2, -1)
        crossed = torch.cat([second * lower, -first * upper], -1)
    else:
        crossed = torch.cat([-second, first], -1) * sin
    return torch.cat([(values * cos + crossed).to(x.dtype), x[..., rotated:]], -1)


def launch_rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, *, inverse: bool) -> None:
    """The Triton form of `rotate`."""
    tokens, heads, columns = x.shape
    half = cos.shape[-1] // 2
    rest = columns - 2 * half
    copy_rest = rest > 0 and out.data_ptr() != x.data_ptr()
    assert cos.is_contiguous() and sin.is_contiguous() and x.stride(-1) == out.stride(-1) == 1
    if x.numel() == 0:
        return
    with on_device(x):
        _rotate_kernel[(cdiv(tokens, TOKENS), cdiv(heads, HEADS))](
            x, cos, sin, out, tokens, heads, half, rest, x.stride(0), x.stride(1), out.stride(0),
            out.stride(1), inverse, copy_rest, TOKENS, HEADS, next_power_of_2(half),
            next_power_of_2(max(1, rest)), is_interpreted(x), num_warps=2,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def _rotate_kernel(
    x_ptr, cos_ptr, sin_ptr, out_ptr, tokens, heads, half, rest, stride_x_t, stride_x_h, stride_out_t, stride_out_h,
    INVERSE: tl.constexpr, COPY_REST: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
    REST: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """HEADS heads of TOKENS tokens."""
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
    column = tl.arange(0, HALF)[None, :]
    inside = (token < tokens) & (column < half)
    offset = token * (2 * half) + column
    cos1 = tl.load(cos_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    cos2 = tl.load(cos_ptr + offset + half, mask=inside, other=0.0).to(tl.float32)
    sin1 = tl.load(sin_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    sin2 = tl.load(sin_ptr + offset + half, mask=inside, other=0.0).to(tl.float32)
    if INVERSE:
        # The transposed map is the map with the sines exchanged and negated.
        sin1, sin2 = -sin2, -sin1
    first_head = tl.program_id(1) * HEADS + tl.zeros([1, 1], tl.int32)
    for index in tl.static_range(HEADS):
        head = first_head + index
        inside = (token < tokens) & (column < half) & (head < heads)
        source = x_ptr + token * stride_x_t + head * stride_x_h + column
        first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
        target = out_ptr + token * stride_out_t + head * stride_out_h + column
        tl.store(target, round_to(first * cos1 - second * sin1, DTYPE, INTERPRETED), mask=inside)
        tl.store(target + half, round_to(second * cos2 + first * sin2, DTYPE, INTERPRETED), mask=inside)
        if COPY_REST:
            other = tl.arange(0, REST)[None, :]
            inside_rest = (token < tokens) & (other < rest) & (head < heads)
            passed = tl.load(x_ptr + token * stride_x_t + head * stride_x_h + 2 * half + other, mask=inside_rest)
            tl.store(out_ptr + token * stride_out_t + head * stride_out_h + 2 * half + other, passed, mask=inside_rest)
