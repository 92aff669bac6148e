"""Gated activations act(gate) * up: SwiGLU (Llama, Qwen, Mistral, Phi) and GeGLU with tanh (Gemma).

gpt-oss has a third, here "clamped_silu": with gate at most 7 and up from -7 to 7, gate * sigmoid(1.702 * gate) times
up + 1 (arXiv:2508.10925, 2.2.2); beyond a limit there is no gradient.

The two halves come as one tensor, as the fused layer writes them. The backward computes the activation again from
them and gives the product and both gradients in one pass, over its inputs' memory if asked. Rounding is that of
`act_fn(gate) * up` in torch: the activation once, the product once, and up + 1 not at all. GELU: Hendrycks and
Gimpel, 2016 (arXiv:1606.08415); gated: Shazeer, 2020 (arXiv:2002.05202).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
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

ACTIVATIONS = ("silu", "gelu_tanh", "clamped_silu")
CLAMP, STEEPNESS = 7.0, 1.702
"""Of clamped_silu."""
ELEMENTS = 2048
"""Of a program's tile: one row or, where rows are short, several."""
GELU_SLOPE = 0.7978845608028654
"""sqrt(2 / pi)"""
GELU_CUBE = 0.044715


def glu(gate_up: Tensor, activation: str) -> Tensor:
    """act(gate) * up for gate_up [..., 2 I] = (gate, up), with gradient. Keeps gate_up alone."""
    return _Glu.apply(gate_up, activation)


class _Glu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, activation: str) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(gate_up)
        flat = gate_up.reshape(-1, gate_up.shape[-1])
        return glu_forward(flat, activation).view(*gate_up.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        flat = gate_up.reshape(-1, gate_up.shape[-1])
        product, out = torch.empty_like(flat[:, : flat.shape[1] // 2]), torch.empty_like(flat)
        glu_backward(unit_stride(grad).reshape(product.shape), flat, ctx.activation, product, out)
        return out.view(gate_up.shape), None


def glu_forward(gate_up: Tensor, activation: str, out: Tensor | None = None) -> Tensor:
    """act(gate) * up [rows, I] for gate_up [rows, 2 I], without autograd. Last strides 1; `out` is overwritten."""
    rows, inner = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, inner, dtype=gate_up.dtype, device=gate_up.device) if out is None else out
    _check(activation, gate_up, out)
    if triton_supports(gate_up):
        launch_forward(gate_up, activation, out)
    else:
        gate, up = gate_up.chunk(2, -1)
        if activation == "clamped_silu":
            gate, up = _clamped(*(half.to(accumulation_dtype(gate_up.dtype)) for half in (gate, up)))
            out.copy_(_activate(gate, activation).to(out.dtype) * up)
        else:
            torch.mul(_activate(gate, activation), up, out=out)
    return out


def glu_backward(grad: Tensor, gate_up: Tensor, activation: str, product: Tensor, out: Tensor) -> None:
    """From grad = dL/d(product) [rows, I]: the product again, into `product` [rows, I], and dL/d(gate_up) into `out`.

    `product` may be `grad` and `out` may be `gate_up`: every value is read before its place is written.
    """
    _check(activation, gate_up, grad, product)
    _check(activation, out, grad, product)
    if triton_supports(gate_up):
        launch_backward(grad, gate_up, activation, product, out)
        return
    gate, up = (half.to(accumulation_dtype(gate_up.dtype)) for half in gate_up.chunk(2, -1))
    incoming = grad.to(gate.dtype)
    moves = None
    if activation == "clamped_silu":
        moves = torch.cat([gate <= CLAMP, up.abs() <= CLAMP], -1)
        gate, up = _clamped(gate, up)
    value = _activate(gate, activation)
    gradients = torch.cat([incoming * up * _slope(gate, activation), incoming * value], -1)
    product.copy_(value.to(product.dtype) * up)
    out.copy_(gradients if moves is None else gradients.where(moves, 0))


def _clamped(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Within their limits, and up with its 1."""
    return gate.clamp(max=CLAMP), up.clamp(-CLAMP, CLAMP) + 1


def _activate(gate: Tensor, activation: str) -> Tensor:
    if activation == "clamped_silu":
        return gate * torch.sigmoid(STEEPNESS * gate)
    return F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")


def _slope(gate: Tensor, activation: str) -> Tensor:
    if activation != "gelu_tanh":
        steepness = 1.0 if activation == "silu" else STEEPNESS
        sigmoid = torch.sigmoid(steepness * gate)
        return sigmoid * (1 + steepness * gate * (1 - sigmoid))
    tanh = torch.tanh(GELU_SLOPE * (gate + GELU_CUBE * gate**3))
    return 0.5 * (1 + tanh) + 0.5 * gate * (1 - tanh**2) * GELU_SLOPE * (1 + 3 * GELU_CUBE * gate**2)


def _check(activation: str, gate_up: Tensor, *halves: Tensor) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r}; choose from {', '.join(ACTIVATIONS)}")
    rows, double = gate_up.shape
    for tensor in (gate_up, *halves):
        wanted = (rows, double if tensor is gate_up else double // 2)
        if double % 2 or tensor.shape != wanted or tensor.dtype != gate_up.dtype or tensor.stride(1) != 1:
            raise ValueError(
                f"glu: {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()} beside {gate_up.dtype} "
                f"{tuple(gate_up.shape)}; halves have half the columns, and the last stride must be 1"
            )


def _launch_sizes(rows: int, inner: int) -> tuple[tuple[int, int], int, int]:
    """(grid, rows of a program, columns of its tile)."""
    columns = min(ELEMENTS, next_power_of_2(inner))
    height = ELEMENTS // columns
    return (cdiv(rows, height), cdiv(inner, columns)), height, columns


def launch_forward(gate_up: Tensor, activation: str, out: Tensor, *, overlapped: bool = False) -> None:
    """The Triton form of `glu_forward`. overlapped: launched while the product in front of it runs, and what follows
    while it runs (sm_90 on)."""
    rows, inner = out.shape
    assert gate_up.stride(1) == out.stride(1) == 1
    if rows == 0:
        return
    grid, height, columns = _launch_sizes(rows, inner)
    with on_device(gate_up):
        _forward_kernel[grid](
            gate_up, out, rows, inner, gate_up.stride(0), out.stride(0), activation, height, columns,
            overlapped, is_interpreted(gate_up), num_warps=4, launch_pdl=overlapped,
        )  # fmt: skip


def launch_backward(grad: Tensor, gate_up: Tensor, activation: str, product: Tensor, out: Tensor) -> None:
    """The Triton form of `glu_backward`."""
    rows, inner = product.shape
    assert grad.stride(1) == gate_up.stride(1) == product.stride(1) == out.stride(1) == 1
    if rows == 0:
        return
    grid, height, columns = _launch_sizes(rows, inner)
    with on_device(gate_up):
        _backward_kernel[grid](
            grad, gate_up, product, out, rows, inner, grad.stride(0), gate_up.stride(0), product.stride(0),
            out.stride(0), activation, height, columns, is_interpreted(gate_up), num_warps=4,
        )  # fmt: skip


_SLOPE = tl.constexpr(GELU_SLOPE)
_CUBE = tl.constexpr(GELU_CUBE)
_CLAMP = tl.constexpr(CLAMP)
_STEEP = tl.constexpr(STEEPNESS)


@triton.jit
def _curve(gate, ACTIVATION: tl.constexpr):
    """sigmoid(gate) for SiLU; tanh of GELU's polynomial otherwise, as 1 - 2 / (exp(2 u) + 1), which saturates."""
    if ACTIVATION == "silu":
        return tl.sigmoid(gate)
    elif ACTIVATION == "clamped_silu":
        return tl.sigmoid(gate * _STEEP)
    cubic = gate + gate * gate * gate * _CUBE
    return 1.0 - 2.0 / (tl.exp(cubic * _SLOPE * 2.0) + 1.0)


@triton.jit
def _value(gate, curve, ACTIVATION: tl.constexpr):
    if ACTIVATION == "gelu_tanh":
        return 0.5 * gate * (1.0 + curve)
    return gate * curve


@triton.jit
def gated(gate, up, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """act(gate) * up in DTYPE of float32 values, rounded as `glu_forward` does."""
    if ACTIVATION == "clamped_silu":
        gate = tl.minimum(gate, _CLAMP)
        up = tl.minimum(tl.maximum(up, -_CLAMP), _CLAMP) + 1.0
    value = round_to(_value(gate, _curve(gate, ACTIVATION), ACTIVATION), DTYPE, INTERPRETED).to(tl.float32)
    return round_to(value * up, DTYPE, INTERPRETED)


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    gate_up_ptr, out_ptr, rows, columns, stride_gate_up_m, stride_out_m, ACTIVATION: tl.constexpr,
    HEIGHT: tl.constexpr, COLUMNS: tl.constexpr, OVERLAPPED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    if OVERLAPPED:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    row = (tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)).to(tl.int64)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    source = gate_up_ptr + row * stride_gate_up_m + column
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + columns, mask=inside, other=0.0).to(tl.float32)
    value = gated(gate, up, ACTIVATION, DTYPE, INTERPRETED)
    tl.store(out_ptr + row * stride_out_m + column, value, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    grad_ptr, gate_up_ptr, product_ptr, out_ptr, rows, columns,
    stride_grad_m, stride_gate_up_m, stride_product_m, stride_out_m,
    ACTIVATION: tl.constexpr, HEIGHT: tl.constexpr, COLUMNS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    row = (tl.program_id(0) * HEIGHT + tl.arange(0, HEIGHT)).to(tl.int64)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows) & (column < columns)
    source = gate_up_ptr + row * stride_gate_up_m + column
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + columns, mask=inside, other=0.0).to(tl.float32)
    incoming = tl.load(grad_ptr + row * stride_grad_m + column, mask=inside, other=0.0).to(tl.float32)
    product, of_gate, of_up = gated_gradients(incoming, gate, up, ACTIVATION, DTYPE, INTERPRETED)
    tl.store(product_ptr + row * stride_product_m + column, product, mask=inside)
    target = out_ptr + row * stride_out_m + column
    tl.store(target, of_gate, mask=inside)
    tl.store(target + columns, of_up, mask=inside)


@triton.jit
def gated_gradients(
    incoming, gate, up, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr
):  # fmt: skip
    """(act(gate) * up, dL/d(gate), dL/d(up)) in DTYPE of float32 values, of which `incoming` is dL/d(the product)."""
    of_gate, of_up = incoming, incoming
    if ACTIVATION == "clamped_silu":
        of_gate = tl.where(gate <= _CLAMP, incoming, 0.0)
        of_up = tl.where(tl.abs(up) <= _CLAMP, incoming, 0.0)
        gate = tl.minimum(gate, _CLAMP)
        up = tl.minimum(tl.maximum(up, -_CLAMP), _CLAMP) + 1.0
    curve = _curve(gate, ACTIVATION)
    value = _value(gate, curve, ACTIVATION)
    if ACTIVATION == "silu":
        slope = curve * (1.0 + gate * (1.0 - curve))
    elif ACTIVATION == "clamped_silu":
        slope = curve * (1.0 + _STEEP * gate * (1.0 - curve))
    else:
        steepness = (gate * gate * (3.0 * _CUBE) + 1.0) * _SLOPE
        slope = 0.5 * (1.0 + curve) + 0.5 * gate * (1.0 - curve * curve) * steepness
    rounded = round_to(value, DTYPE, INTERPRETED).to(tl.float32)
    product = round_to(rounded * up, DTYPE, INTERPRETED)
    of_gate = round_to(of_gate * up * slope, DTYPE, INTERPRETED)
    return product, of_gate, round_to(of_up * value, DTYPE, INTERPRETED)
