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
from grpo.kernels.launch import unit_stride
from grpo.kernels.lora_factors import Adapter
from grpo.kernels.lora_linear import LinearGroup, LoraMatmul, norm_backward, normed_input, row_tiles
from grpo.kernels.rms_norm import Norm
from grpo.kernels.sizes import MLP_TILE, largest_tile


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
    """Whether x itself is added to the output, after its rounding: as vLLM's norms do it."""
    tile: int = MLP_TILE
    """Tokens whose intermediate tensors exist at once, about (`row_tiles`)."""


@dataclass(frozen=True)
class _Call:
    """What one forward and its backward agree on."""

    mlp: GatedMlp
    adapters: tuple[tuple[Adapter, ...], tuple[Adapter, ...]]
    """Of gate_up and of down."""
    keep: bool
    output: bool
    tiles: int

    @property
    def tile(self) -> int:
        """Tokens at once, about."""
        return self.mlp.tile * self.tiles

    @property
    def columns(self) -> int:
        """Of gate and up together."""
        return self.mlp.gate_up.out_features

    def matmuls(self, factors: Sequence[Tensor], tokens: int) -> tuple[LoraMatmul, LoraMatmul]:
        first, rows = 2 * len(self.adapters[0]), min(tokens, largest_tile(self.tile))
        return (
            LoraMatmul(self.mlp.gate_up, self.adapters[0], factors[:first], rows),
            LoraMatmul(self.mlp.down, self.adapters[1], factors[first:], rows),
        )


def lora_mlp(
    x: Tensor,
    mlp: GatedMlp,
    adapters: tuple[Sequence[Adapter], Sequence[Adapter]],
    factors: Sequence[Tensor],
    *,
    keep: bool = True,
    output: bool = True,
    tiles: int = 1,
) -> Tensor:
    """The MLP of x [tokens, hidden]. `factors`: A, B of gate_up's adapters, then of down's, which get gradients.

    keep: save gate and up rather than compute them again. output: False returns a tensor of unset values that still
    has the right backward, for a forward that is run for its backward alone. tiles: as many of `mlp.tile` as one.
    """
    call = _Call(mlp, (tuple(adapters[0]), tuple(adapters[1])), keep and torch.is_grad_enabled(), output, tiles)
    return _LoraMlp.apply(x, call, *factors)


class _LoraMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, call: _Call, *factors: Tensor) -> Tensor:
        tokens = x.shape[0]
        out = torch.empty_like(x)
        saved = x.new_empty(0)
        if call.keep or call.output:
            matmuls = call.matmuls(factors, tokens)
            if call.keep:
                saved, _ = matmuls[0].outputs(tokens)
            for rows in row_tiles(tokens, call.tile):
                inner = saved[rows] if call.keep else None
                forward_of_rows(call, matmuls, x[rows], inner, out[rows] if call.output else None)
        ctx.call = call
        ctx.save_for_backward(x, saved, *factors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, saved, *factors = ctx.saved_tensors
        call: _Call = ctx.call
        matmuls = call.matmuls(factors, x.shape[0])
        x_grad = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad = unit_stride(grad)
        for rows in row_tiles(x.shape[0], call.tile):
            tile_grad = None if x_grad is None else x_grad[rows]
            backward_of_rows(call, matmuls, x[rows], grad[rows], saved[rows] if call.keep else None, tile_grad)
        if call.keep:
            increment_version(saved)  # a second backward through this graph is refused rather than wrong
        gate_up, down = matmuls
        return x_grad, None, *gate_up.gradients(), *down.gradients()


def forward_of_rows(
    call: _Call, matmuls: tuple[LoraMatmul, LoraMatmul], x: Tensor, inner: Tensor | None, out: Tensor | None
) -> None:
    """One tile of the forward. `inner`: where to keep gate and up, or None; `out`: where the result goes, or None."""
    mlp, (gate_up, down) = call.mlp, matmuls
    if inner is None:
        inner, _ = gate_up.outputs(x.shape[0])
    inner = inner[:, : call.columns]
    gate_up.forward(normed_input(gate_up, mlp.norm, x), inner)
    if out is not None:
        buffer, product = down.inputs(x.shape[0])
        glu_forward(inner, mlp.activation, out=product)
        down.forward(buffer, out)
        if mlp.residual:
            out += x


def backward_of_rows(
    call: _Call,
    matmuls: tuple[LoraMatmul, LoraMatmul],
    x: Tensor,
    grad: Tensor,
    inner: Tensor | None,
    x_grad: Tensor | None,
) -> None:
    """One tile of the backward, in a call of its own so that its tensors are gone before the next one's are made.

    `inner`: gate and up as they were kept, which are used up; None computes them again. dL/dx goes to `x_grad`.
    """
    mlp, (gate_up, down) = call.mlp, matmuls
    unit = normed_input(gate_up, mlp.norm, x)
    if inner is None:
        inner, _ = gate_up.outputs(x.shape[0])
        gate_up.forward(unit, inner[:, : call.columns])
    incoming = down.joined_outputs(grad)
    product, x_lora_a_grad = down.input_gradient(incoming, joined=True)
    # Both buffers change their meaning here: dL/dh becomes h, gate and up become their gradients.
    wide = inner[:, : call.columns]
    glu_backward(product, wide, mlp.activation, product=product, out=wide)
    down.trained_gradient(incoming, product, x_lora_a_grad)
    del incoming, product, x_lora_a_grad
    unit_grad, x_lora_a_grad = gate_up.input_gradient(inner)
    gate_up.trained_gradient(inner, unit, x_lora_a_grad)
    if x_grad is not None:
        norm_backward(mlp.norm, unit_grad, x, x_grad, grad if mlp.residual else None)
