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
from grpo.kernels.launch import dense_rows
from grpo.kernels.lora_attention import normalised, through_norm
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

    @property
    def columns(self) -> int:
        """Of gate and up together."""
        return self.mlp.gate_up.out_features

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
        kept = x.new_empty(0)
        if call.keep or call.output:
            gate_up, down = call.products(factors)
            if call.keep:
                kept, _ = gate_up.outputs(tokens)
            for rows in row_tiles(tokens, mlp.tile):
                inner = (kept[rows] if call.keep else gate_up.outputs(rows.stop - rows.start)[0])[:, : call.columns]
                gate_up.forward(normalised(gate_up, mlp.norm, x[rows]), inner)
                if call.output:
                    buffer, product = down.inputs(rows.stop - rows.start)
                    glu_forward(inner, mlp.activation, out=product)
                    down.forward(buffer, out[rows], x[rows] if mlp.residual else None)
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
        grad = dense_rows(grad)
        for rows in row_tiles(x.shape[0], mlp.tile):
            unit = normalised(gate_up, mlp.norm, x[rows])
            if call.keep:
                inner = kept[rows]
            else:
                inner, _ = gate_up.outputs(rows.stop - rows.start)
                gate_up.forward(unit, inner[:, : call.columns])
            incoming = grad[rows]
            if down.width:
                incoming, part = down.outputs(rows.stop - rows.start)
                part.copy_(grad[rows])
            product, shrunk_grad = down.input_gradient(incoming)
            # Both buffers change their meaning here: dL/dh becomes h, gate and up become their gradients.
            wide = inner[:, : call.columns]
            glu_backward(product, wide, mlp.activation, product=product, out=wide)
            down.adapter_gradient(incoming, product, shrunk_grad)
            unit_grad, shrunk_grad = gate_up.input_gradient(inner)
            gate_up.adapter_gradient(inner, unit, shrunk_grad)
            if x_grad is not None:
                plus = grad[rows] if mlp.residual else None
                through_norm(mlp.norm, unit_grad, x[rows], x_grad[rows], plus)
        if call.keep:
            increment_version(kept)  # a second backward through this graph is refused rather than wrong
        return x_grad, None, *gate_up.gradients(), *down.gradients()
