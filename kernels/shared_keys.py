"""Keys and values of a packed row, laid out span by span: a prompt that several completions share comes before each.

Flash attention wants the keys of a sequence in one run. Forward, rows are copied; backward, every token's gradient is
the sum over the places it was copied to, in float32 and always in the same order. torch's index_select would do the
copy, but its backward adds into 16-bit numbers with atomics: slow, rounded at every term, different from run to run.

Not here: which tokens a span sees (attention.py).
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
    is_interpreted,
    next_power_of_2,
    on_device,
    round_to,
    to_device,
    triton_supports,
)


class GatherIndex:
    """Which token of a packed row each key is copied from, and back."""

    def __init__(self, sources: Tensor, tokens: int, device: torch.device):
        """sources: int64 [keys] on the CPU, the token that each key is copied from, below `tokens`. On `device`:"""
        self.sources = to_device(sources, device)
        self.order = to_device(torch.argsort(sources, stable=True).int(), device)
        """int32 [keys]: where token 0 is copied to, then of token 1, and so on."""
        counts = torch.bincount(sources, minlength=tokens)
        bounds = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
        self.bounds = to_device(bounds, device)
        """int32 [tokens + 1]: where each token's part of `order` begins."""


def gather_keys(key: Tensor, value: Tensor, index: GatherIndex) -> tuple[Tensor, Tensor]:
    """key, value [tokens, heads, dim] -> [keys, heads, dim], with gradient. Contiguous first where heads lie apart."""
    return _GatherKeys.apply(key, value, index)


class _GatherKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, key: Tensor, value: Tensor, index: GatherIndex) -> tuple[Tensor, Tensor]:
        ctx.index = index
        return copy_keys(key, value, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, key_grad: Tensor, value_grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return *sum_keys(key_grad, value_grad, ctx.index), None


def copy_keys(key: Tensor, value: Tensor, index: GatherIndex) -> tuple[Tensor, Tensor]:
    """`gather_keys` without autograd."""
    out = key.new_empty(2, index.sources.numel(), *key.shape[1:])
    if triton_supports(key):
        launch_copy(contiguous_rows(key), contiguous_rows(value), index, out)
    else:
        torch.index_select(key, 0, index.sources, out=out[0])
        torch.index_select(value, 0, index.sources, out=out[1])
    return out[0], out[1]


def sum_keys(key_grad: Tensor, value_grad: Tensor, index: GatherIndex) -> tuple[Tensor, Tensor]:
    """Gradients [keys, heads, dim] of what `copy_keys` gave -> those of key and value [tokens, heads, dim]."""
    key_grad, value_grad = contiguous_rows(key_grad), contiguous_rows(value_grad)
    tokens = index.bounds.numel() - 1
    out = key_grad.new_empty(2, tokens, *key_grad.shape[1:])
    if triton_supports(key_grad):
        launch_sum(key_grad, value_grad, index, out)
    else:
        for grad, total in zip((key_grad, value_grad), out, strict=True):
            sums = torch.zeros(total.shape, dtype=accumulation_dtype(grad.dtype), device=grad.device)
            total.copy_(sums.index_add_(0, index.sources, grad.to(sums.dtype)))
    return out[0], out[1]


def launch_copy(key: Tensor, value: Tensor, index: GatherIndex, out: Tensor) -> None:
    """The Triton form of the forward."""
    assert key.shape == value.shape and key.dtype == value.dtype and out.is_contiguous()
    columns = row_columns(key, value)
    with on_device(key):
        _copy_kernel[(index.sources.numel(), 2)](
            key, value, index.sources, out, out[0].numel(), columns, key.stride(0), value.stride(0),
            next_power_of_2(columns), num_warps=4,
        )  # fmt: skip


def launch_sum(key_grad: Tensor, value_grad: Tensor, index: GatherIndex, out: Tensor) -> None:
    """The Triton form of the backward."""
    assert key_grad.shape == value_grad.shape and key_grad.dtype == value_grad.dtype and out.is_contiguous()
    columns = row_columns(key_grad, value_grad)
    with on_device(key_grad):
        _sum_kernel[(index.bounds.numel() - 1, 2)](
            key_grad, value_grad, index.bounds, index.order, out, out[0].numel(), columns, key_grad.stride(0),
            value_grad.stride(0), next_power_of_2(columns), is_interpreted(out), num_warps=4,
        )  # fmt: skip


def contiguous_rows(tensor: Tensor) -> Tensor:
    """`tensor` [rows, heads, dim], or a copy where a row's heads do not lie together."""
    heads, dim = tensor.shape[1:]
    return tensor if tensor.stride(2) == 1 and (heads == 1 or tensor.stride(1) == dim) else tensor.contiguous()


def row_columns(*tensors: Tensor) -> int:
    """Numbers in a row of each: heads times dim, which lie together."""
    assert all(tensor is contiguous_rows(tensor) for tensor in tensors), [tensor.stride() for tensor in tensors]
    return tensors[0].shape[1] * tensors[0].shape[2]


@triton.jit(do_not_specialize=["half"])
def _copy_kernel(
    key_ptr, value_ptr, sources_ptr, out_ptr, half, columns, stride_key_m, stride_value_m, COLUMNS: tl.constexpr
):
    """One row of the result; `half`: elements of its first half, the keys."""
    index, which = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, COLUMNS)
    inside = column < columns
    source = tl.load(sources_ptr + index)
    if which == 0:
        row = tl.load(key_ptr + source * stride_key_m + column, mask=inside)
    else:
        row = tl.load(value_ptr + source * stride_value_m + column, mask=inside)
    tl.store(out_ptr + which.to(tl.int64) * half + index * columns + column, row, mask=inside)


@triton.jit(do_not_specialize=["half"])
def _sum_kernel(
    key_grad_ptr, value_grad_ptr, bounds_ptr, order_ptr, out_ptr, half, columns, stride_key_m, stride_value_m,
    COLUMNS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One token's gradient: the sum of the rows it was copied to."""
    token, which = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, COLUMNS)
    inside = column < columns
    total = tl.zeros([COLUMNS], tl.float32)
    for entry in range(tl.load(bounds_ptr + token), tl.load(bounds_ptr + token + 1)):
        index = tl.load(order_ptr + entry).to(tl.int64)
        if which == 0:
            row = tl.load(key_grad_ptr + index * stride_key_m + column, mask=inside, other=0.0)
        else:
            row = tl.load(value_grad_ptr + index * stride_value_m + column, mask=inside, other=0.0)
        total += row.to(tl.float32)
    result = round_to(total, out_ptr.dtype.element_ty, INTERPRETED)
    tl.store(out_ptr + which.to(tl.int64) * half + token * columns + column, result, mask=inside)
