"""Gradients of weights that are trained in place, added where they are kept while the backward pass runs.

A weight's gradient is as large as the weight. Handed to autograd it would exist twice while it is added up, and of a
head that is the embedding too three times; so the functions with a backward of their own put it into `.grad` themselves
and give autograd nothing. Its dtype is `grad_dtype`, which the optimiser sets: it may be wider than the weight's.

Products are added up in float32 over the tokens of a micro-batch, and rounded once where they meet what is there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo.kernels.sizes import WEIGHT_SLICE_BYTES


def gradient_dtype(weight: Tensor) -> torch.dtype:
    """What `weight`'s gradient is kept in."""
    return weight.grad_dtype or weight.dtype


def add_gradient(weight: Tensor, gradient: Tensor) -> None:
    """Add `gradient`, of `weight`'s shape, to `weight.grad`. A first one in the right dtype is kept as it is."""
    if weight.grad is None:
        weight.grad = gradient.to(gradient_dtype(weight))
    else:
        weight.grad.add_(gradient)


def add_outer(weight: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left^T right to the gradient of `weight` [N, K]; left [M, N], right [M, K], in one dtype."""
    if weight.grad is None:
        weight.grad = torch.zeros(weight.shape, dtype=gradient_dtype(weight), device=weight.device)
    add_product_(weight.grad, left.t(), right)


def add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, summed in float32, from as many rows of `total` at a time as WEIGHT_SLICE_BYTES hold."""
    step = max(1, WEIGHT_SLICE_BYTES // (4 * total.shape[1]))
    for start in range(0, total.shape[0], step):
        rows = slice(start, start + step)
        total[rows].add_(float32_product(left[rows], right))


def float32_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, summed and left in float32 (float64 for float64)."""
    if left.dtype in (torch.float32, torch.float64):
        return left @ right
    if left.is_cuda:  # the mixed product exists on CUDA only
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()
