"""Linear layers over frozen (NF4 or 16-bit) weights with LoRA, several that share an input as one product.

    y = x W^T + b,    y[:, rows of adapter i] += (x A_i^T) (s_i B_i)^T

`LinearGroup` holds what is frozen: one matrix W made of the stacked rows of its members (q, k, v; gate, up), which is
dequantised into one short-lived buffer at each use and never saved. `Product` is a group at work in one forward or
backward: every caller (here, lora_attention.py, lora_mlp.py) goes through its methods, on as many rows at a time as
it likes. A and B are kept in float32; they are used in x's dtype, s B rounded once, and their gradients are
accumulated in float32 over all rows. LoRA: Hu et al., 2021 (arXiv:2106.09685).

The adapters of a group act as one: A is the stack of theirs, and s B has each one's in its own rows and columns
(lora_factors.py). Adding a LoRA term to a finished y reads and writes all of y for a product of inner dimension 16.
Where W is dequantised anyway, it goes into a larger matrix with s B and A beside it, and one product does both:

    y  = [x | x A^T] [W | s B]^T          dx = [dy | dy s B] [W ; A]

What the zeros in s B cost grows with the rank: 0.3 % of a layer's arithmetic at rank 16, 2.4 % at 128.

Not here: gradients of W and b, dropout, and how models name their layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo.kernels import nf4
from grpo.kernels.launch import wide
from grpo.kernels.lora_factors import Adapter, lay_out

WIDTH = 64
"""Columns for adapters beside a matrix are a multiple of this: rows stay aligned to 128 bytes."""


@dataclass(frozen=True)
class LinearGroup:
    """Frozen linear layers that share an input, stacked."""

    segments: tuple[tuple[Tensor, Tensor | None], ...]
    """Consecutive rows: (dense weight [n, K], None), or NF4's stored form (packed [n, K / 2], absmax [n, K / 64])."""
    bias: Tensor | None = None
    """[N]"""

    @property
    def in_features(self) -> int:
        weight, absmax = self.segments[0]
        return weight.shape[1] * (1 if absmax is None else 2)

    @property
    def out_features(self) -> int:
        return sum(weight.shape[0] for weight, _ in self.segments)

    @property
    def stored_dense(self) -> bool:
        """Whether W exists as one tensor in the compute dtype, so that nobody needs to make it."""
        return len(self.segments) == 1 and self.segments[0][1] is None

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        weight, absmax = self.segments[0]
        return weight.dtype if absmax is None else absmax.dtype

    def dense(self, out: Tensor | None = None) -> Tensor:
        """W [N, K] in the compute dtype, written to `out`; without `out` a new tensor, or the stored one."""
        if out is None:
            if self.stored_dense:
                return self.segments[0][0]
            device = self.segments[0][0].device
            out = torch.empty(self.out_features, self.in_features, dtype=self.dtype, device=device)
        row = 0
        for weight, absmax in self.segments:
            part = out[row : row + weight.shape[0]]
            if absmax is None:
                part.copy_(weight)
            else:
                nf4.dequantize(weight, absmax, out=part)
            row += weight.shape[0]
        return out


class Product:
    """One group with its adapters, ready to multiply.

    Inputs and output gradients may come in buffers that `inputs` and `outputs` made, which have `width` columns more
    than the group for what the adapters add to the product; the caller fills the first columns alone. Plain tensors
    without those columns work as well, at the cost of another pass over the result.
    """

    def __init__(self, group: LinearGroup, adapters: Sequence[Adapter], factors: Sequence[Tensor]):
        """factors: A_1, B_1, A_2, B_2, ... of `adapters`."""
        self.group, self.adapters = group, tuple(adapters)
        bounds = [0, *accumulate(a.shape[0] for a in factors[0::2])]
        self.ranks = [slice(start, end) for start, end in pairwise(bounds)]
        self.rank = bounds[-1]
        self.width = 0 if group.stored_dense else -(-self.rank // WIDTH) * WIDTH
        self.a_grad: Tensor | None = None
        self.b_grad: Tensor | None = None
        n, k, width = group.out_features, group.in_features, self.width
        device = group.segments[0][0].device
        if width == 0:
            self.weight = group.dense()
            self.down = torch.empty(self.rank, k, dtype=group.dtype, device=device)
            self.up = torch.empty(n, self.rank, dtype=group.dtype, device=device)
        else:
            self.matrix = torch.empty(n + width, k + width, dtype=group.dtype, device=device)
            self.weight = group.dense(out=self.matrix[:n, :k])
            self.down, self.up = self.matrix[n:, :k], self.matrix[:n, k:]
        if self.adapters:
            lay_out(self.adapters, factors, self.down, self.up)

    def inputs(self, rows: int) -> tuple[Tensor, Tensor]:
        """(a buffer for `forward`, its part [rows, K] to fill)."""
        buffer = self.weight.new_empty(rows, self.group.in_features + self.width)
        return buffer, buffer[:, : self.group.in_features]

    def outputs(self, rows: int) -> tuple[Tensor, Tensor]:
        """(a buffer for the backward, its part [rows, N] to fill)."""
        buffer = self.weight.new_empty(rows, self.group.out_features + self.width)
        return buffer, buffer[:, : self.group.out_features]

    def forward(self, x: Tensor, out: Tensor, residual: Tensor | None = None) -> None:
        """out [rows, N] = x W^T + b + adapters, on top of `residual` [rows, N] if given. x: [rows, K] or a buffer."""
        n, k, weight = self.group.out_features, self.group.in_features, self.weight
        in_one = x.shape[1] > k
        if in_one:
            torch.mm(x[:, :k], self.down.t(), out=x[:, k:])
            weight = self.matrix[:n]
        bias = self.group.bias
        if residual is not None:
            torch.addmm(residual, x, weight.t(), out=out)
            if bias is not None:
                out += bias
        elif bias is not None:
            torch.addmm(bias, x, weight.t(), out=out)
        else:
            torch.mm(x, weight.t(), out=out)
        if self.adapters and not in_one:
            out.addmm_(x @ self.down.t(), self.up.t())

    def input_gradient(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """(dL/dx [rows, K], dL/d(x A^T) [rows, at least rank]) from dL/dy: [rows, N], or a buffer."""
        n, k = self.group.out_features, self.group.in_features
        if grad.shape[1] > n:
            shrunk_grad = torch.mm(grad[:, :n], self.up, out=grad[:, n:])
            return grad @ self.matrix[:, :k], shrunk_grad
        x_grad = grad @ self.weight
        if not self.adapters:
            return x_grad, grad.new_empty(grad.shape[0], 0)
        shrunk_grad = grad @ self.up
        return x_grad.addmm_(shrunk_grad, self.down), shrunk_grad

    def adapter_gradient(self, grad: Tensor, x: Tensor, shrunk_grad: Tensor) -> None:
        """Add these rows' share of dL/dA and dL/dB. `shrunk_grad` is `input_gradient`'s second result."""
        if not self.adapters:
            return
        x, grad = x[:, : self.group.in_features], grad[:, : self.group.out_features]
        self.a_grad = add_product(self.a_grad, shrunk_grad[:, : self.rank].t(), x)
        self.b_grad = add_product(self.b_grad, grad.t(), x @ self.down[: self.rank].t())

    def gradients(self) -> list[Tensor | None]:
        """dL/dA_1, dL/dB_1, ... in the order of the factors."""
        if self.a_grad is None or self.b_grad is None:
            return [None] * (2 * len(self.adapters))
        found: list[Tensor | None] = []
        for adapter, ranks in zip(self.adapters, self.ranks, strict=True):
            b_grad = self.b_grad[adapter.first : adapter.first + adapter.rows, ranks]
            found += [self.a_grad[ranks], b_grad * adapter.scale]
        return found


def add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """total + left @ right in float32 (float64 for float64), accumulated there too; `total` is used up."""
    if left.dtype in (torch.float32, torch.float64):
        return left @ right if total is None else total.addmm_(left, right)
    if not left.is_cuda:  # the mixed product below exists on CUDA only
        return add_product(total, left.to(wide(left.dtype)), right.to(wide(right.dtype)))
    product = torch.mm(left, right, out_dtype=torch.float32)
    return product if total is None else total.add_(product)


def row_tiles(rows: int, size: int) -> list[slice]:
    """0..rows in nearly equal slices of at most `size`."""
    count = max(1, -(-rows // size))
    bounds = [rows * index // count for index in range(count + 1)]
    return [slice(start, end) for start, end in pairwise(bounds)]


def lora_linear(
    x: Tensor,
    group: LinearGroup,
    adapters: Sequence[Adapter],
    factors: Sequence[Tensor],
    residual: Tensor | None = None,
) -> Tensor:
    """y [rows, N] for x [rows, K], on top of `residual` [rows, N] if given. Keeps x alone for the backward pass.

    x, residual, the weights: one dtype; float32, bfloat16 or float16. Gradients for x, residual and the factors.
    """
    return _LoraLinear.apply(x, residual, group, tuple(adapters), *factors)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        group: LinearGroup,
        adapters: tuple[Adapter, ...],
        *factors: Tensor,
    ) -> Tensor:
        ctx.group, ctx.adapters = group, adapters
        ctx.save_for_backward(x, *factors)
        out = x.new_empty(x.shape[0], group.out_features)
        Product(group, adapters, factors).forward(x, out, residual)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *factors = ctx.saved_tensors
        product = Product(ctx.group, ctx.adapters, factors)
        x_grad, shrunk_grad = product.input_gradient(grad)
        product.adapter_gradient(grad, x, shrunk_grad)
        residual_grad = grad if ctx.needs_input_grad[1] else None
        return x_grad, residual_grad, None, None, *product.gradients()
