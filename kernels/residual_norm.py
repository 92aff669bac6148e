"""x + residual and its RMSNorm in one pass, in place: a program a row.

    residual <- d(x + residual)        x <- w * d(residual / rms(residual))        d: rounding to the input's dtype

the roundings of rms_norm.py's plain form after a rounded sum, as the training graph has them; or, where the stream
between layers is kept in float32, after a sum that is not rounded, and there in the form with a unit offset too. From
sm_90 on it is launched while the product in front of it runs, and what follows while it runs.

Not here: gradients.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo.kernels import cards
from grpo.kernels.launch import is_interpreted, on_device, round_to, triton_supports, warps
from grpo.kernels.rms_norm import Norm

MOST_ROWS = 512
"""Of a decoding batch; prompts have more."""
MOST_COLUMNS = 1 << 14


def serves(x: Tensor, residual: Tensor, weight: Tensor) -> bool:
    """Whether the kernel takes these, both [M, K]."""
    alike = x.ndim == 2 and x.dtype == residual.dtype == weight.dtype and x.shape == residual.shape
    inside = alike and 0 < x.shape[0] <= MOST_ROWS and x.shape[1] <= MOST_COLUMNS and x.stride(1) == 1
    return inside and residual.stride(1) == 1 and x.dtype in (torch.bfloat16, torch.float16)


def add_and_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    """x [M, K] becomes the norm of x + residual, `residual` the sum. weight [K]. Raises ValueError unless `serves`."""
    if not serves(x, residual, weight):
        raise ValueError(f"norm of {x.dtype} {tuple(x.shape)} beside {residual.dtype} {tuple(residual.shape)}")
    if triton_supports(x):
        launch(x, residual, weight, eps)
        return
    residual.add_(x)
    values = residual.float()
    x.copy_(weight * (values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)).to(x.dtype))


def add_to_stream(x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, unit_offset: bool = False) -> Tensor:
    """x [M, K] becomes the norm of x + residual; returns the sum in float32, `residual` itself if that is float32. x
    and weight [K] are of one dtype of 16 bit, and residual of it or float32."""
    alike = x.ndim == 2 and x.dtype == weight.dtype and residual.dtype in (x.dtype, torch.float32)
    if not alike or x.shape != residual.shape or x.element_size() != 2 or x.shape[1] > MOST_COLUMNS:
        raise ValueError(f"norm of {x.dtype} {tuple(x.shape)} beside {residual.dtype} {tuple(residual.shape)}")
    total = residual if residual.dtype == torch.float32 else torch.empty(x.shape, dtype=torch.float32, device=x.device)
    if triton_supports(x) and len(x):
        launch(x, residual, weight, eps, total, unit_offset=unit_offset)
    elif len(x):
        torch.add(residual.float(), x, out=total)
        x.copy_(Norm(weight, eps, unit_offset).forward(total))
    return total


def launch(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, total: Tensor | None = None, *, unit_offset: bool = False
) -> None:
    """The Triton form of `add_and_norm`; of `add_to_stream` with a `total` in float32, which may be residual."""
    total = residual if total is None else total
    rows, columns = x.shape
    assert x.stride(1) == residual.stride(1) == total.stride(1) == 1
    assert weight.is_contiguous() and weight.shape == (columns,)
    overlapped = x.is_cuda and cards.card(x.device).overlaps
    block = triton.next_power_of_2(columns)
    with on_device(x):
        _norm_kernel[(rows,)](
            x, residual, weight, total, columns, x.stride(0), residual.stride(0), total.stride(0), eps,
            unit_offset, block, overlapped, is_interpreted(x), num_warps=warps(block), launch_pdl=overlapped,
        )  # fmt: skip


@triton.jit
def _norm_kernel(
    x_ptr, residual_ptr, weight_ptr, total_ptr, columns, stride_x, stride_residual, stride_total, eps,
    UNIT_OFFSET: tl.constexpr, BLOCK: tl.constexpr, OVERLAPPED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    column = tl.arange(0, BLOCK)
    inside = column < columns
    w = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if OVERLAPPED:
        tl.extra.cuda.gdc_wait()  # for x: this may be launched while that is computed
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    x_ptrs, residual_ptrs = x_ptr + row * stride_x + column, residual_ptr + row * stride_residual + column
    total = tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32)
    total += tl.load(residual_ptrs, mask=inside, other=0.0).to(tl.float32)
    stored = round_to(total, total_ptr.dtype.element_ty, INTERPRETED)
    tl.store(total_ptr + row * stride_total + column, stored, mask=inside)
    value = stored.to(tl.float32)
    unit = value * (1.0 / tl.sqrt(tl.sum(value * value, 0) / columns + eps))
    if UNIT_OFFSET:
        result = unit * (1.0 + w)
    else:
        result = w * round_to(unit, DTYPE, INTERPRETED).to(tl.float32)
    tl.store(x_ptrs, round_to(result, DTYPE, INTERPRETED), mask=inside)
