"""A whole gated MLP as one autograd function: norm, gate and up, activation, down, residual, with LoRA on all three.

Tiled over tokens in both directions, so that of the wide intermediate tensors only a tile exists at a time. Two
forms: `keep` saves gate and up for every token; otherwise only the input is saved, and the backward computes gate and
up of a tile again, just before it needs them. Where a caller recomputes a layer merely to run its backward, the
output that nobody reads need not be made at all (`output=False`), which also saves the product with W_down.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from grpo.kernels.glu import glu_backward, glu_forward
from grpo.kernels.lora_attention import normalised, projection_backward
from grpo.kernels.lora_linear import Adapter, LinearGroup, Product, row_tiles
from grpo.kernels.rms_norm import Norm


@dataclass(frozen=True)
class GatedMlp:
    """What is frozen of a gated MLP."""

    gate_up: LinearGroup
    """Rows of gate, then of up."""
    down: LinearGroup
    activation: str
    """One of `glu.ACTIVATIONS`."""
    norm: Norm | None
    """Of the input; None where x comes normalised."""
    residual: bool
    """Whether x itself is added to the output."""
    tile: int = 4096
    """Tokens whose intermediate tensors exist at once."""


@dataclass(frozen=True)
class _Call:
    """What one forward and its backward agree on."""

    mlp: GatedMlp
    adapters: tuple[tuple[Adapter, ...], tuple[Adapter, ...]]
    """Of gate_up and of down."""
    keep: bool
    output: bool

    def products(self, factors: Sequence[Tensor]) -> tuple[Product, Product]:
        first = 2 * len(self.adapters[0])
        return (
            Product(self.mlp.gate_up, self.adapters[0], factors[:first]),
            Product(self.mlp.down, self.adapters[1], factors[first:]),
        )


def lora_mlp(
    x: Tensor,
    mlp: GatedMlp,
    adapters: tuple[Sequence[Adapter], Sequence[Adapter]],
    factors: Sequence[Tensor],
    *,
    keep: bool = True,
    output: bool = True,
) -> Tensor:
    """The MLP of x [tokens, hidden]. `factors`: A, B of gate_up's adapters, then of down's, which get gradients.

    keep: save gate and up rather than compute them again. output: False returns a tensor of unset values that still
    has the right backward, for a forward that is run for its backward alone.
    """
    call = _Call(mlp, (tuple(adapters[0]), tuple(adapters[1])), keep and torch.is_grad_enabled(), output)
    return _LoraMlp.apply(x, call, *factors)


class _LoraMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, call: _Call, *factors: Tensor) -> Tensor:
        mlp, tokens = call.mlp, x.shape[0]
        out = torch.empty_like(x)
        kept = x.new_empty(tokens if call.keep else 0, mlp.gate_up.out_features)
        if call.keep or call.output:
            gate_up, down = call.products(factors)
            for rows in row_tiles(tokens, mlp.tile):
                inner = kept[rows] if call.keep else kept.new_empty(rows.stop - rows.start, kept.shape[1])
                gate_up.forward(normalised(mlp.norm, x[rows]), inner)
                if call.output:
                    residual = x[rows] if mlp.residual else None
                    down.forward(glu_forward(inner, mlp.activation), out[rows], residual)
        ctx.call = call
        ctx.save_for_backward(x, kept, *factors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, kept, *factors = ctx.saved_tensors
        call: _Call = ctx.call
        mlp = call.mlp
        gate_up, down = call.products(factors)
        x_grad = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad = grad.contiguous()
        for rows in row_tiles(x.shape[0], mlp.tile):
            if call.keep:
                inner = kept[rows]
            else:
                inner = x.new_empty(rows.stop - rows.start, mlp.gate_up.out_features)
                gate_up.forward(normalised(mlp.norm, x[rows]), inner)
            product_grad, shrunk_grad = down.input_gradient(grad[rows])
            # Both buffers change their meaning here: dL/dh becomes h, gate and up become their gradients.
            glu_backward(product_grad, inner, mlp.activation, product=product_grad, out=inner)
            down.adapter_gradient(grad[rows], product_grad, shrunk_grad)
            target = None if x_grad is None else x_grad[rows]
            projection_backward(gate_up, mlp.norm, inner, x[rows], target, grad[rows] if mlp.residual else None)
        if call.keep:
            increment_version(kept)  # a second backward through this graph is refused rather than wrong
        return x_grad, None, *gate_up.gradients(), *down.gradients()
