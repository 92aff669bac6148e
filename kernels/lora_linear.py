"""Linear layers over frozen (NF4, 8-bit or 16-bit) weights with LoRA, several that share an input as one product.

    y = x W^T + b + (x A^T) (s B)^T, rounded once

`LinearGroup` holds what is frozen: one matrix W made of the stacked rows of its members (q, k, v; gate, up), which is
dequantised into one short-lived buffer at each use and never saved. `LoraMatmul` is a group at work in one forward or
backward: every caller (here, lora_attention.py, lora_mlp.py) goes through its methods, on as many rows at a time as
it likes. A and B are kept in float32; they are used in x's dtype, s B rounded once, and their gradients are
accumulated in float32 over all rows. LoRA: Hu et al., 2021 (arXiv:2106.09685).

The adapters of a group act as one: A is the stack of theirs, and s B has each one's in its own rows and columns
(lora_factors.py). A LoRA term added to a finished y would be rounded a second time, and mostly lost (lora_sum.py). W
is dequantised, or copied, into a larger matrix with s B and A beside it, and one product does both:

    y  = [x | x A^T] [W | s B]^T          dx = [dy | dy s B] [W ; A]

What the zeros in s B cost grows with the rank: 0.3 % of a layer's arithmetic at rank 16, 2.4 % at 128. A 16-bit W that
meets few rows is not copied; the sum is left in float32 there, and rounded with the adapter's term (lora_sum.py).

Where W and b themselves are trained, no adapter is there, and their gradients go where weight_gradient.py says.

Not here: dropout, residuals (which come after the rounding, as in vLLM), and how models name
their layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo.kernels import nf4, stored_weight
from grpo.kernels.launch import accumulation_dtype, disable_reduced_precision
from grpo.kernels.lora_factors import Adapter, LowRank, pack_lora
from grpo.kernels.lora_sum import dense_linear, round_sum, sums_in_float32
from grpo.kernels.rms_norm import Norm
from grpo.kernels.sizes import ADAPTER_COLUMNS, largest_tile
from grpo.kernels.weight_gradient import add_gradient, add_product_, float32_product


@dataclass(frozen=True)
class LinearGroup:
    """Frozen linear layers that share an input, stacked."""

    segments: tuple[tuple[Tensor, Tensor | None], ...]
    """Consecutive rows: (dense weight [n, K], None), or another form of stored_weight.py."""
    bias: Tensor | None = None
    """[N]"""
    compute_dtype: torch.dtype | None = None
    """Where the first rows are in 8 bit, whose tensors do not tell."""
    trained: tuple[tuple[Tensor, Tensor | None], ...] = ()
    """(weight [n, K], bias [n] or None) of consecutive rows, the same memory as above, where these get gradients."""

    @property
    def in_features(self) -> int:
        return stored_weight.columns(*self.segments[0])

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
        weight, scales = self.segments[0]
        return self.compute_dtype or (weight.dtype if scales is None else scales.dtype)

    def dense(self, out: Tensor | None = None) -> Tensor:
        """W [N, K] in the compute dtype, written to `out`; without `out` a new tensor, or the stored one."""
        if out is None:
            if self.stored_dense:
                return self.segments[0][0]
            device = self.segments[0][0].device
            out = torch.empty(self.out_features, self.in_features, dtype=self.dtype, device=device)
        row = 0
        for (weight, scales), stored in zip(self.segments, self._stored, strict=True):
            part = out[row : row + weight.shape[0]]
            if stored is None:
                stored_weight.dequantize(weight, scales, out.dtype, out=part)
            else:
                stored.launch_dequantize(part)
            row += weight.shape[0]
        return out

    @cached_property
    def _stored(self) -> list[nf4.StoredMatrix | None]:
        """Of each segment in NF4 that the kernel dequantises: the storage never moves."""
        return [
            nf4.StoredMatrix(weight, scales) if scales is not None and nf4.by_kernel(weight, scales) else None
            for weight, scales in self.segments
        ]


class LoraMatmul:
    """One group with its adapters, ready to multiply.

    Inputs and output gradients come in buffers that `inputs` and `outputs` made, which have `width` columns more than
    the group for what the adapters add to the product; the caller fills the first columns alone.
    """

    def __init__(self, group: LinearGroup, adapters: Sequence[Adapter], factors: Sequence[Tensor], rows: int):
        """factors: A_1, B_1, A_2, B_2, ... of `adapters`. rows: how many of x there will be at once, at most."""
        disable_reduced_precision()
        self.group, self.adapters = group, tuple(adapters)
        bounds = [0, *accumulate(a.shape[0] for a in factors[0::2])]
        self.ranks = [slice(start, end) for start, end in pairwise(bounds)]
        self.rank = bounds[-1]
        n, k = group.out_features, group.in_features
        few = group.stored_dense and sums_in_float32(group.segments[0][0], rows, max(n, k))
        columns = self.rank + (group.bias is not None)
        self.width = 0 if few else -(-columns // ADAPTER_COLUMNS) * ADAPTER_COLUMNS
        self.a_grad: Tensor | None = None
        self.b_grad: Tensor | None = None
        self.weight_grad: Tensor | None = None
        self.bias_grad: Tensor | None = None
        if self.width == 0:
            self.weight = group.dense()
            self.lora_a, self.lora_b = self.weight.new_empty(self.rank, k), self.weight.new_empty(n, self.rank)
        else:
            self.matrix = torch.empty(
                n + self.width, k + self.width, dtype=group.dtype, device=group.segments[0][0].device
            )
            self.weight = group.dense(out=self.matrix[:n, :k])
            self.lora_a, self.lora_b = self.matrix[n:, :k], self.matrix[:n, k:]
        if self.adapters:
            pack_lora(self.adapters, factors, self.lora_a, self.lora_b)
        elif self.width:
            self.lora_a.zero_()
            self.lora_b.zero_()
        if self.width and group.bias is not None:  # as one more column: cuBLAS rounds before it adds a bias
            self.lora_b[:, self.rank].copy_(group.bias)

    def inputs(self, rows: int) -> tuple[Tensor, Tensor]:
        """(a buffer for `forward`, its part [rows, K] to fill)."""
        return self._buffer(rows, self.group.in_features)

    def outputs(self, rows: int) -> tuple[Tensor, Tensor]:
        """(a buffer for the backward, its part [rows, N] to fill)."""
        return self._buffer(rows, self.group.out_features)

    def _buffer(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        buffer = self.weight.new_empty(rows, columns + self.width)
        if not buffer.is_cuda:  # oneDNN may read columns beyond those of a bfloat16 product, times 0: NaN shows
            buffer[:, columns:] = 0
        return buffer, buffer[:, :columns]

    def joined_inputs(self, x: Tensor) -> Tensor:
        """x [rows, K] as `forward` takes it `joined`: itself, or copied beside what the adapters make of it."""
        return x if self.width == 0 else torch.cat([x, x @ self.lora_a.t()], 1)

    def joined_outputs(self, grad: Tensor) -> Tensor:
        """grad [rows, N] as `input_gradient` takes it `joined`; likewise."""
        return grad if self.width == 0 else torch.cat([grad, grad @ self.lora_b], 1)

    def forward(self, x: Tensor, out: Tensor, *, joined: bool = False) -> None:
        """out [rows, N] = x W^T + b + adapters. x: a buffer of `inputs`, or of `joined_inputs`."""
        n, k, bias = self.group.out_features, self.group.in_features, self.group.bias
        assert x.shape[1] == k + self.width, (x.shape, k, self.width)
        if self.width == 0:
            low_rank = LowRank(x @ self.lora_a.t(), self.lora_b) if self.adapters else None
            dense_linear(x, self.weight, bias, low_rank, out)
            return
        if not joined:
            torch.mm(x[:, :k], self.lora_a.t(), out=x[:, k:])
        if bias is not None:
            x[:, k + self.rank] = 1
        torch.mm(x, self.matrix[:n].t(), out=out)

    def adapter_gradient(self, grad: Tensor) -> Tensor:
        """dL/d(x A^T) [rows, at least rank] alone, from dL/dy, a buffer of `outputs`: where x needs no gradient."""
        n = self.group.out_features
        if self.width:
            return torch.mm(grad[:, :n], self.lora_b, out=grad[:, n:])
        return grad @ self.lora_b

    def input_gradient(self, grad: Tensor, *, joined: bool = False) -> tuple[Tensor, Tensor]:
        """(dL/dx [rows, K], dL/d(x A^T) [rows, at least rank]) from dL/dy: `outputs`, or `joined_outputs`."""
        n, k = self.group.out_features, self.group.in_features
        assert grad.shape[1] == n + self.width, (grad.shape, n, self.width)
        if self.width:
            x_lora_a_grad = grad[:, n:] if joined else self.adapter_gradient(grad)
            return grad @ self.matrix[:, :k], x_lora_a_grad
        if not self.adapters:
            return grad @ self.weight, grad.new_empty(grad.shape[0], 0)
        x_lora_a_grad = self.adapter_gradient(grad)
        x_grad = grad.new_empty(grad.shape[0], k)
        total = torch.mm(grad, self.weight, out_dtype=torch.float32)
        round_sum(total, None, LowRank(x_lora_a_grad, self.lora_a.t()), x_grad)
        return x_grad, x_lora_a_grad

    def trained_gradient(self, grad: Tensor, x: Tensor, x_lora_a_grad: Tensor) -> None:
        """Add these rows' share of the gradients of what is trained: A and B, or W and b. `x_lora_a_grad` is
        `input_gradient`'s second result."""
        x, grad = x[:, : self.group.in_features], grad[:, : self.group.out_features]
        if self.group.trained:
            if self.weight_grad is None:
                self.weight_grad = float32_product(grad.t(), x)
            else:
                add_product_(self.weight_grad, grad.t(), x)
            if self.group.bias is not None:
                total = grad.sum(0, dtype=accumulation_dtype(grad.dtype))
                self.bias_grad = total if self.bias_grad is None else self.bias_grad + total
        if not self.adapters:
            return
        self.a_grad = add_product(self.a_grad, x_lora_a_grad[:, : self.rank].t(), x)
        self.b_grad = add_product(self.b_grad, grad.t(), x @ self.lora_a[: self.rank].t())

    def gradients(self) -> list[Tensor | None]:
        """dL/dA_1, dL/dB_1, ... in the order of the factors. Those of W and b go where theirs are kept."""
        self._add_weight_gradients()
        if self.a_grad is None or self.b_grad is None:
            return [None] * (2 * len(self.adapters))
        result: list[Tensor | None] = []
        for adapter, ranks in zip(self.adapters, self.ranks, strict=True):
            b_grad = self.b_grad[adapter.first : adapter.first + adapter.rows, ranks]
            result += [self.a_grad[ranks], b_grad * adapter.scale]
        return result

    def _add_weight_gradients(self) -> None:
        first = 0
        for weight, bias in self.group.trained if self.weight_grad is not None else ():
            rows = slice(first, first + weight.shape[0])
            first = rows.stop
            assert self.weight_grad is not None
            add_gradient(weight, self.weight_grad[rows])
            if bias is not None and self.bias_grad is not None:
                add_gradient(bias, self.bias_grad[rows])
        self.weight_grad = self.bias_grad = None


def add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """total + left @ right in float32 (float64 for float64), accumulated there too; `total` is used up."""
    if left.dtype in (torch.float32, torch.float64):
        return left @ right if total is None else total.addmm_(left, right)
    if not left.is_cuda:  # the mixed product below exists on CUDA only
        return add_product(total, left.to(accumulation_dtype(left.dtype)), right.to(accumulation_dtype(right.dtype)))
    product = torch.mm(left, right, out_dtype=torch.float32)
    return product if total is None else total.add_(product)


def row_tiles(rows: int, size: int) -> list[slice]:
    """0..rows in slices of `size` and one of the rest, or of at most `largest_tile` where the rest is small.

    Slices are whole because products of a round number of rows leave fewest multiprocessors idle at their end.
    """
    count, rest = divmod(rows, size)
    if count and rest <= largest_tile(size) - size:
        bounds = [rows * index // count for index in range(count + 1)]
    else:
        bounds = [*range(0, rows, size), rows] if rows else [0, 0]
    return [slice(start, end) for start, end in pairwise(bounds)]


def lora_linear(x: Tensor, group: LinearGroup, adapters: Sequence[Adapter], factors: Sequence[Tensor]) -> Tensor:
    """y [rows, N] for x [rows, K]. Keeps x alone for the backward pass.

    x, the weights: one dtype; float32, bfloat16 or float16. Gradients for x and the factors.
    """
    return _LoraLinear.apply(x, group, tuple(adapters), *factors)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: LinearGroup, adapters: tuple[Adapter, ...], *factors: Tensor) -> Tensor:
        ctx.group, ctx.adapters = group, adapters
        ctx.save_for_backward(x, *factors)
        out = x.new_empty(x.shape[0], group.out_features)
        matmul = LoraMatmul(group, adapters, factors, x.shape[0])
        matmul.forward(matmul.joined_inputs(x), out, joined=True)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *factors = ctx.saved_tensors
        matmul = LoraMatmul(ctx.group, ctx.adapters, factors, x.shape[0])
        outgoing = matmul.joined_outputs(grad)
        x_grad, x_lora_a_grad = matmul.input_gradient(outgoing, joined=True)
        matmul.trained_gradient(outgoing, x, x_lora_a_grad)
        return x_grad, None, None, *matmul.gradients()


def normed_input(matmul: LoraMatmul, norm: Norm | None, x: Tensor) -> Tensor:
    """`norm` of x, or x, in a buffer for `matmul`."""
    buffer, part = matmul.inputs(x.shape[0])
    if norm is None:
        part.copy_(x)
    else:
        norm.forward(x, out=part)
    return buffer


def norm_backward(
    norm: Norm | None, unit_grad: Tensor, x: Tensor, out: Tensor, residual_grad: Tensor | None = None
) -> None:
    """dL/dx into `out`, from the gradient of what `normed_input` gave, plus `residual_grad`."""
    if norm is not None:
        norm.backward(unit_grad, x, residual_grad=residual_grad, out=out)
    elif residual_grad is not None:
        torch.add(unit_grad, residual_grad, out=out)
    else:
        out.copy_(unit_grad)
