"""x + residual and its RMSNorm in one pass, in place, for decoding batches: a program a row.

    residual <- d(x + residual)        x <- w * d(residual / rms(residual))        d: rounding to the input's dtype

the roundings of rms_norm.py's plain form after a rounded sum, as the training graph has them. From sm_90 on it is
launched while the product in front of it runs, and what follows while it runs.

Not here: prompts, gradients, Gemma's form.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo.kernels import cards
from grpo.kernels.launch import is_interpreted, on_device, round_to, triton_supports, warps

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


def launch(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    """The Triton form of `add_and_norm`."""
    rows, columns = x.shape
    assert x.stride(1) == residual.stride(1) == 1 and weight.is_contiguous() and weight.shape == (columns,)
    overlapped = x.is_cuda and cards.card(x.device).overlaps
    block = triton.next_power_of_2(columns)
    with on_device(x):
        _norm_kernel[(rows,)](
            x, residual, weight, columns, x.stride(0), residual.stride(0), eps, block, overlapped, is_interpreted(x),
            num_warps=warps(block), launch_pdl=overlapped,
        )  # fmt: skip


@triton.jit
def _norm_kernel(
    x_ptr, residual_ptr, weight_ptr, columns, stride_x, stride_residual, eps, BLOCK: tl.constexpr,
    OVERLAPPED: tl.constexpr, INTERPRETED: tl.constexpr,
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
    rounded = round_to(total, DTYPE, INTERPRETED)
    tl.store(residual_ptrs, rounded, mask=inside)
    value = rounded.to(tl.float32)
    unit = value * (1.0 / tl.sqrt(tl.sum(value * value, 0) / columns + eps))
    result = w * round_to(unit, DTYPE, INTERPRETED).to(tl.float32)
    tl.store(x_ptrs, round_to(result, DTYPE, INTERPRETED), mask=inside)
