"""x + residual and its RMSNorm in one pass, in place, for vLLM's modules: a program a row.

    residual <- s(x + residual)        x <- w * d(residual / rms(residual))          plain
                                       x <- d(residual / rms(residual) * (1 + w))    unit offset

the roundings of rms_norm.py after a sum, as the training graph has them. d: rounding to the dtype of x and w; s: to
the residual's, which is that or float32, where nothing is rounded. From sm_90 on it is launched while the product in
front of it runs, and what follows while it runs.

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
"""Of a decoding batch, which these kernels were measured for; prompts have more."""
MOST_COLUMNS = 1 << 14


def serves(x: Tensor, residual: Tensor, weight: Tensor) -> bool:
    """Whether the kernel takes these, both [M, K]."""
    alike = x.ndim == 2 and x.dtype == weight.dtype and residual.dtype in (x.dtype, torch.float32)
    inside = alike and x.shape == residual.shape and x.shape[0] > 0 and x.shape[1] <= MOST_COLUMNS
    return inside and x.stride(1) == residual.stride(1) == 1 and x.dtype in (torch.bfloat16, torch.float16)


def add_and_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, unit_offset: bool = False) -> None:
    """x [M, K] becomes the norm of x + residual, `residual` the sum. weight [K]. Raises ValueError unless `serves`."""
    if not serves(x, residual, weight):
        raise ValueError(f"norm of {x.dtype} {tuple(x.shape)} beside {residual.dtype} {tuple(residual.shape)}")
    if triton_supports(x):
        launch(x, residual, weight, eps, unit_offset=unit_offset)
        return
    residual.add_(x)
    x.copy_(Norm(weight, eps, unit_offset).forward(residual))


def launch(x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, unit_offset: bool = False) -> None:
    """The Triton form of `add_and_norm`."""
    rows, columns = x.shape
    assert x.stride(1) == residual.stride(1) == 1 and weight.is_contiguous() and weight.shape == (columns,)
    overlapped = x.is_cuda and cards.card(x.device).overlaps
    block = triton.next_power_of_2(columns)
    with on_device(x):
        _norm_kernel[(rows,)](
            x, residual, weight, columns, x.stride(0), residual.stride(0), eps, unit_offset, block, overlapped,
            is_interpreted(x), num_warps=warps(block), launch_pdl=overlapped,
        )  # fmt: skip


@triton.jit
def _norm_kernel(
    x_ptr, residual_ptr, weight_ptr, columns, stride_x, stride_residual, eps, UNIT_OFFSET: tl.constexpr,
    BLOCK: tl.constexpr, OVERLAPPED: tl.constexpr, INTERPRETED: tl.constexpr,
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
    summed = round_to(total, residual_ptr.dtype.element_ty, INTERPRETED)
    tl.store(residual_ptrs, summed, mask=inside)
    value = summed.to(tl.float32)
    unit = value * (1.0 / tl.sqrt(tl.sum(value * value, 0) / columns + eps))
    if UNIT_OFFSET:
        result = unit * (1.0 + w)
    else:
        result = w * round_to(unit, DTYPE, INTERPRETED).to(tl.float32)
    tl.store(x_ptrs, round_to(result, DTYPE, INTERPRETED), mask=inside)
