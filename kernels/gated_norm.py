"""RMSNorm of a head's result times the SiLU of a gate, forward and backward in one pass each: gated DeltaNet's.

    y = x / rms(x) * weight * z sigmoid(z)

with rms(x) = sqrt(mean(x^2) + eps), all of it in float32, rounded once. The backward computes it again from x and z,
so nothing else is kept. Formula: Yang et al., 2024 (arXiv:2412.06464), 3.4; the roundings are vLLM's.

The weight is frozen.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo.kernels.launch import accumulation_dtype, is_interpreted, on_device, round_to, triton_supports, unit_stride

NUMBERS = 4096
"""Of a program's tile: several rows."""
WARPS = 4


def gated_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y for x and gate [tokens, heads, dim] and weight [dim], with gradients for x and gate. Last strides 1."""
    return _GatedNorm.apply(x, gate, weight, eps)


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.eps = eps
        ctx.save_for_backward(x, gate, weight)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        gated_norm_forward(x, gate, weight, eps, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, weight = ctx.saved_tensors
        outs = [torch.empty(part.shape, dtype=part.dtype, device=part.device) for part in (x, gate)]
        _gated_norm_backward(unit_stride(grad), x, gate, weight, ctx.eps, *outs)
        return *outs, None, None


def gated_norm_forward(x: Tensor, gate: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """`gated_norm` into `out`, which may be x, without autograd."""
    _check(x, weight, gate, out)
    if triton_supports(x):
        launch_forward(x, gate, weight, eps, out)
        return
    wide = x.to(accumulation_dtype(x.dtype))
    unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    out.copy_(unit * weight.to(unit.dtype) * F.silu(gate.to(unit.dtype)))


def _gated_norm_backward(
    grad: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float, x_grad: Tensor, gate_grad: Tensor
) -> None:
    _check(x, weight, gate, grad, x_grad, gate_grad)
    if triton_supports(x):
        launch_backward(grad, x, gate, weight, eps, x_grad, gate_grad)
        return
    wide, z, g = (part.to(accumulation_dtype(x.dtype)) for part in (x, gate, grad))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    unit, sigmoid = wide * scale, torch.sigmoid(z)
    weighted = g * weight.to(g.dtype)
    inner = weighted * z * sigmoid
    x_grad.copy_(scale * (inner - unit * (inner * unit).mean(-1, keepdim=True)))
    gate_grad.copy_(weighted * unit * sigmoid * (1 + z * (1 - sigmoid)))


def _check(x: Tensor, weight: Tensor, *others: Tensor) -> None:
    if x.ndim != 3 or weight.shape != x.shape[-1:] or not weight.is_contiguous():
        raise ValueError(f"gated norm of {tuple(x.shape)} with a weight of {tuple(weight.shape)}")
    for tensor in (x, *others):
        if tensor.shape != x.shape or tensor.dtype != x.dtype or tensor.stride(-1) != 1:
            raise ValueError(
                f"gated norm: {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()} beside {x.dtype} "
                f"{tuple(x.shape)}; shapes and types must agree and the last stride be 1"
            )


def _launch_sizes(x: Tensor) -> tuple[tuple[int], int, int]:
    """(grid, rows of a program, columns of its tile)."""
    block = triton.next_power_of_2(x.shape[-1])
    rows = max(1, NUMBERS // block)
    return (triton.cdiv(x.shape[0] * x.shape[1], rows),), rows, block


def _strides(*tensors: Tensor) -> list[int]:
    """Of token and head."""
    return [stride for tensor in tensors for stride in tensor.stride()[:2]]


def launch_forward(x: Tensor, gate: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    """The Triton form of `gated_norm_forward`."""
    assert x.stride(2) == gate.stride(2) == out.stride(2) == weight.stride(0) == 1
    if x.numel() == 0:
        return
    grid, rows, block = _launch_sizes(x)
    with on_device(x):
        _forward_kernel[grid](
            x, gate, weight, out, x.shape[0] * x.shape[1], x.shape[1], x.shape[2], *_strides(x, gate, out), eps, rows,
            block, is_interpreted(x), num_warps=WARPS,
        )  # fmt: skip


def launch_backward(
    grad: Tensor, x: Tensor, gate: Tensor, weight: Tensor, eps: float, x_grad: Tensor, gate_grad: Tensor
) -> None:
    """Both gradients, in Triton."""
    assert all(part.stride(2) == 1 for part in (grad, x, gate, x_grad, gate_grad)) and weight.stride(0) == 1
    if x.numel() == 0:
        return
    grid, rows, block = _launch_sizes(x)
    with on_device(x):
        _backward_kernel[grid](
            grad, x, gate, weight, x_grad, gate_grad, x.shape[0] * x.shape[1], x.shape[1], x.shape[2],
            *_strides(grad, x, gate, x_grad, gate_grad), eps, rows, block, is_interpreted(x), num_warps=WARPS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x_ptr, gate_ptr, weight_ptr, out_ptr, rows, heads, columns, stride_x_t, stride_x_h, stride_g_t, stride_g_h,
    stride_o_t, stride_o_h, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """ROWS whole rows; row r is head r % heads of token r // heads."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows)[:, None] & (column < columns)
    token, head = (row // heads).to(tl.int64), row % heads
    x_ptrs = x_ptr + (token * stride_x_t + head * stride_x_h)[:, None] + column
    x = tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32)
    gate_ptrs = gate_ptr + (token * stride_g_t + head * stride_g_h)[:, None] + column
    z = tl.load(gate_ptrs, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    scale = (1.0 / tl.sqrt(tl.sum(x * x, 1) / columns + eps))[:, None]
    y = x * scale * w * (z * tl.sigmoid(z))
    target = out_ptr + (token * stride_o_t + head * stride_o_h)[:, None] + column
    tl.store(target, round_to(y, out_ptr.dtype.element_ty, INTERPRETED), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    grad_ptr, x_ptr, gate_ptr, weight_ptr, x_grad_ptr, gate_grad_ptr, rows, heads, columns, stride_d_t, stride_d_h,
    stride_x_t, stride_x_h, stride_g_t, stride_g_h, stride_dx_t, stride_dx_h, stride_dg_t, stride_dg_h, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """With inner = grad * weight * silu(z): dx = scale * (inner - unit * mean(inner * unit))."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows)[:, None] & (column < columns)
    token, head = (row // heads).to(tl.int64), row % heads
    x_ptrs = x_ptr + (token * stride_x_t + head * stride_x_h)[:, None] + column
    x = tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32)
    gate_ptrs = gate_ptr + (token * stride_g_t + head * stride_g_h)[:, None] + column
    z = tl.load(gate_ptrs, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    source = grad_ptr + (token * stride_d_t + head * stride_d_h)[:, None] + column
    weighted = tl.load(source, mask=inside, other=0.0).to(tl.float32) * w
    scale = (1.0 / tl.sqrt(tl.sum(x * x, 1) / columns + eps))[:, None]
    unit, sigmoid = x * scale, tl.sigmoid(z)
    inner = weighted * z * sigmoid
    x_grad = scale * (inner - unit * (tl.sum(inner * unit, 1) / columns)[:, None])
    target = x_grad_ptr + (token * stride_dx_t + head * stride_dx_h)[:, None] + column
    tl.store(target, round_to(x_grad, x_grad_ptr.dtype.element_ty, INTERPRETED), mask=inside)
    gate_grad = weighted * unit * sigmoid * (1.0 + z * (1.0 - sigmoid))
    target = gate_grad_ptr + (token * stride_dg_t + head * stride_dg_h)[:, None] + column
    tl.store(target, round_to(gate_grad, gate_grad_ptr.dtype.element_ty, INTERPRETED), mask=inside)
