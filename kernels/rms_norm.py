"""RMSNorm in the two roundings that models use, forward and backward in one pass each.

    plain:        y = w * d(x / rms(x))           each factor and the product in the input's dtype d
    unit offset:  y = d(x / rms(x) * (1 + w))     all in float32, rounded once (Gemma)

with rms(x) = sqrt(mean(x^2) + eps) in float32. In a 16-bit model x may be float32, a sum that is not rounded: then d
rounds to the weight's dtype, and dL/dx is float32. The backward computes rms(x) again: reading a row once more is
cheaper than keeping anything. Formulas from Zhang and Sennrich, 2019 (arXiv:1910.07467); the roundings are
transformers'.

The weight is frozen, or its gradient is put where weight_gradient.py says, whenever the backward pass comes by.

Not here: LayerNorm.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

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
    warps,
)
from grpo.kernels.sizes import NORM_ROWS
from grpo.kernels.weight_gradient import add_gradient

MOST_COLUMNS = 1 << 16
"""A program holds a whole row."""


class Norm(NamedTuple):
    """A norm over the last dimension, of `weight`'s length."""

    weight: Tensor
    """[columns], in the dtype of y."""
    eps: float
    unit_offset: bool = False
    trained: Tensor | None = None
    """The same memory as `weight`, where it gets a gradient."""

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """y for x [rows, columns] or [tokens, heads, columns], without autograd. x: any strides but 1 in the last
        dimension; out: likewise, in the weight's dtype, may be x; None allocates."""
        out = torch.empty(x.shape, dtype=self.weight.dtype, device=x.device) if out is None else out
        _check(x, self.weight, (out,))
        if triton_supports(x):
            launch_forward(x, self, out)
        else:
            out.copy_(self._torch(x))
        return out

    def backward(
        self, grad: Tensor, x: Tensor, residual_grad: Tensor | None = None, out: Tensor | None = None
    ) -> Tensor:
        """dL/dx from `grad` = dL/dy, plus `residual_grad`, both dL/dx in the dtype of x. Shapes and strides as in
        `forward`; `out` may be any of the inputs that has that dtype."""
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
        _check(x, self.weight, (grad,), (out, *(() if residual_grad is None else (residual_grad,))))
        if self.trained is not None:
            add_gradient(self.trained, self._weight_gradient(grad, x))
        if triton_supports(x):
            launch_backward(grad, x, self, residual_grad, out)
        else:
            out.copy_(self._torch_backward(grad, x, residual_grad))
        return out

    def _torch(self, x: Tensor) -> Tensor:
        values = x.to(accumulation_dtype(x.dtype))
        values = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + self.eps)
        if self.unit_offset:
            return (values * (1 + self.weight.to(values.dtype))).to(self.weight.dtype)
        return self.weight * values.to(self.weight.dtype)

    def _torch_backward(self, grad: Tensor, x: Tensor, residual_grad: Tensor | None) -> Tensor:
        values = x.to(accumulation_dtype(x.dtype))
        scale = torch.rsqrt(values.square().mean(-1, keepdim=True) + self.eps)
        unit = values * scale
        inner = grad.to(values.dtype) * (self.weight.to(values.dtype) + (1 if self.unit_offset else 0))
        result = scale * (inner - unit * (inner * unit).mean(-1, keepdim=True))
        return result if residual_grad is None else result + residual_grad

    def _weight_gradient(self, grad: Tensor, x: Tensor) -> Tensor:
        """dL/dw, summed over all rows in float32 (float64 for float64), from NORM_ROWS of them at a time."""
        total = torch.zeros(x.shape[-1], dtype=accumulation_dtype(x.dtype), device=x.device)
        for rows, grads in zip(x.split(NORM_ROWS), grad.split(NORM_ROWS), strict=True):
            values = rows.to(total.dtype)
            unit = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + self.eps)
            if not self.unit_offset:
                unit = unit.to(self.weight.dtype)
            total += (unit * grads.to(total.dtype)).flatten(0, -2).sum(0)
        return total


def rms_norm(x: Tensor, norm: Norm) -> Tensor:
    """`norm` of x [..., columns], with gradient for x. Keeps x alone."""
    return _RMSNorm.apply(x, norm)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Norm) -> Tensor:
        ctx.norm = norm
        ctx.save_for_backward(x)
        return norm.forward(x.reshape(-1, x.shape[-1])).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        columns = x.shape[-1]
        return ctx.norm.backward(unit_stride(grad).reshape(-1, columns), x.reshape(-1, columns)).view(x.shape), None


def _check(x: Tensor, weight: Tensor, given: Sequence[Tensor], like_x: Sequence[Tensor] = ()) -> None:
    """Of y's shape and strides: `given` in the weight's dtype, `like_x` in that of x."""
    if x.ndim not in (2, 3) or weight.shape != x.shape[-1:] or x.shape[-1] > MOST_COLUMNS:
        raise ValueError(f"RMSNorm of {tuple(x.shape)} with a weight of {tuple(weight.shape)}")
    unrounded = x.dtype == torch.float32 and weight.dtype in (torch.bfloat16, torch.float16)
    for tensors, dtype in (((x,), x.dtype if unrounded else weight.dtype), (given, weight.dtype), (like_x, x.dtype)):
        for tensor in tensors:
            if tensor.shape != x.shape or tensor.dtype != dtype or tensor.stride(-1) != 1:
                raise ValueError(
                    f"RMSNorm: {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()} beside {x.dtype} "
                    f"{tuple(x.shape)} and a weight of {weight.dtype}; shapes and types must agree and the last stride "
                    "be 1"
                )


def _rows(tensor: Tensor) -> tuple[int, int]:
    """Strides of token and head."""
    return tensor.stride(0), tensor.stride(1) if tensor.ndim == 3 else 0


def _launch_sizes(x: Tensor) -> tuple[tuple[int], int, int, int, int]:
    """(grid, heads, rows of a program, columns of its tile, warps)."""
    columns = x.shape[-1]
    heads = x.shape[1] if x.ndim == 3 else 1
    block = next_power_of_2(columns)
    rows = max(1, min(16, 2048 // block))
    return (cdiv(x.numel() // columns, rows),), heads, rows, block, warps(rows * block)


def launch_forward(x: Tensor, norm: Norm, out: Tensor) -> None:
    """The Triton form of `Norm.forward`."""
    grid, heads, rows, block, num_warps = _launch_sizes(x)
    assert x.stride(-1) == out.stride(-1) == norm.weight.stride(-1) == 1
    if x.numel() == 0:
        return
    with on_device(x):
        _forward_kernel[grid](
            x, norm.weight, out, x.numel() // x.shape[-1], heads, x.shape[-1], *_rows(x), *_rows(out), norm.eps,
            norm.unit_offset, rows, block, is_interpreted(x), num_warps=num_warps,
        )  # fmt: skip


def launch_backward(grad: Tensor, x: Tensor, norm: Norm, residual_grad: Tensor | None, out: Tensor) -> None:
    """The Triton form of `Norm.backward`."""
    grid, heads, rows, block, num_warps = _launch_sizes(x)
    other = x if residual_grad is None else residual_grad
    assert grad.stride(-1) == x.stride(-1) == other.stride(-1) == out.stride(-1) == norm.weight.stride(-1) == 1
    if x.numel() == 0:
        return
    with on_device(x):
        _backward_kernel[grid](
            grad, x, norm.weight, other, out, x.numel() // x.shape[-1], heads, x.shape[-1], *_rows(grad), *_rows(x),
            *_rows(other), *_rows(out), norm.eps, norm.unit_offset, residual_grad is not None, rows, block,
            is_interpreted(x), num_warps=num_warps,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x_ptr, weight_ptr, out_ptr, rows, heads, columns, stride_x_t, stride_x_h, stride_out_t, stride_out_h, eps,
    UNIT_OFFSET: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows; row r is head r % heads of token r // heads."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows)[:, None] & (column < columns)
    token, head = (row // heads).to(tl.int64), row % heads
    x_ptrs = x_ptr + (token * stride_x_t + head * stride_x_h)[:, None] + column
    value = tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 1) / columns + eps)
    unit = value * scale[:, None]
    w = tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    if UNIT_OFFSET:
        result = unit * (1.0 + w)
    else:
        result = w * round_to(unit, out_ptr.dtype.element_ty, INTERPRETED).to(tl.float32)
    target = out_ptr + (token * stride_out_t + head * stride_out_h)[:, None] + column
    tl.store(target, round_to(result, out_ptr.dtype.element_ty, INTERPRETED), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    grad_ptr, x_ptr, weight_ptr, residual_grad_ptr, out_ptr, rows, heads, columns, stride_grad_t, stride_grad_h,
    stride_x_t, stride_x_h, stride_residual_t, stride_residual_h, stride_out_t, stride_out_h, eps,
    UNIT_OFFSET: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """dx = scale * (g - unit * mean(g * unit)) + residual_grad with g = grad * weight and unit = x * scale."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows)[:, None] & (column < columns)
    token, head = (row // heads).to(tl.int64), row % heads
    x_ptrs = x_ptr + (token * stride_x_t + head * stride_x_h)[:, None] + column
    value = tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32)
    scale = (1.0 / tl.sqrt(tl.sum(value * value, 1) / columns + eps))[:, None]
    unit = value * scale
    w = tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    if UNIT_OFFSET:
        w += 1.0
    source = grad_ptr + (token * stride_grad_t + head * stride_grad_h)[:, None] + column
    inner = tl.load(source, mask=inside, other=0.0).to(tl.float32) * w
    result = scale * (inner - unit * (tl.sum(inner * unit, 1) / columns)[:, None])
    if HAS_RESIDUAL:
        source = residual_grad_ptr + (token * stride_residual_t + head * stride_residual_h)[:, None] + column
        result += tl.load(source, mask=inside, other=0.0).to(tl.float32)
    target = out_ptr + (token * stride_out_t + head * stride_out_h)[:, None] + column
    tl.store(target, round_to(result, out_ptr.dtype.element_ty, INTERPRETED), mask=inside)
