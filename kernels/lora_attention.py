"""The way into attention as one autograd function: norm, q/k/v projection with LoRA, q/k norm, rotary embedding.

Only the layer's input is kept, besides q, k and v, which attention keeps anyway (with q/k norms also q and k before
them). The normalised input is computed again in the backward, for as many rows at a time as `tile` says; gradients of
q, k and v meet in one buffer of that size, so that one product serves all three.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo.kernels.launch import unit_stride
from grpo.kernels.lora_factors import Adapter
from grpo.kernels.lora_linear import LinearGroup, LoraMatmul, norm_backward, normed_input, row_tiles
from grpo.kernels.rms_norm import Norm
from grpo.kernels.rope import rotate
from grpo.kernels.sizes import QKV_TILE, largest_tile


@dataclass(frozen=True)
class QkvProjection:
    """What is frozen between a layer's input and its attention."""

    group: LinearGroup
    """Rows of q, then k, then v."""
    heads: int
    key_value_heads: int
    norm: Norm | None
    """Of the layer's input; None where x comes normalised."""
    q_norm: Norm | None = None
    """Of every head of q, before the rotation."""
    k_norm: Norm | None = None
    tile: int = QKV_TILE
    """Rows whose normalised input exists at once, about (`row_tiles`)."""

    @property
    def head_dim(self) -> int:
        return self.group.out_features // (self.heads + 2 * self.key_value_heads)

    def by_head(self, stacked: Tensor) -> Tensor:
        """[rows, heads of q, then k, then v, dim] of [rows, N]."""
        return stacked.view(stacked.shape[0], -1, self.head_dim)

    def split(self, stacked: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views q, k, v [rows, heads, dim] of [rows, N]."""
        return self.by_head(stacked).split([self.heads, self.key_value_heads, self.key_value_heads], 1)


def lora_qkv(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    projection: QkvProjection,
    adapters: Sequence[Adapter],
    factors: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """q [rows, heads, dim], k and v [rows, key-value heads, dim] for x [rows, hidden]; cos, sin [rows, rotated].

    Last strides are 1, others whatever. Gradients for x and the factors (A_1, B_1, ...).
    """
    return _LoraQkv.apply(x, cos, sin, projection, tuple(adapters), *factors)


class _LoraQkv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        projection: QkvProjection,
        adapters: tuple[Adapter, ...],
        *factors: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        matmul = LoraMatmul(projection.group, adapters, factors, min(x.shape[0], largest_tile(projection.tile)))
        stacked = x.new_empty(x.shape[0], projection.group.out_features)
        for rows in row_tiles(x.shape[0], projection.tile):
            matmul.forward(normed_input(matmul, projection.norm, x[rows]), stacked[rows])
        q, k, v = projection.split(stacked)
        before = (q, k) if projection.q_norm is not None else ()
        if projection.q_norm is None or projection.k_norm is None:
            rotated = projection.by_head(stacked)[:, : projection.heads + projection.key_value_heads]
            rotate(rotated, cos, sin, out=rotated)
        else:
            q = projection.q_norm.forward(q, torch.empty(q.shape, dtype=q.dtype, device=q.device))
            k = projection.k_norm.forward(k, torch.empty(k.shape, dtype=k.dtype, device=k.device))
            rotate(q, cos, sin, out=q)
            rotate(k, cos, sin, out=k)
        ctx.projection, ctx.adapters, ctx.normed = projection, adapters, len(before)
        ctx.save_for_backward(x, cos, sin, *before, *factors)
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, q_grad: Tensor, k_grad: Tensor, v_grad: Tensor) -> tuple[Tensor | None, ...]:
        x, cos, sin, *rest = ctx.saved_tensors
        before, factors = rest[: ctx.normed], rest[ctx.normed :]
        projection: QkvProjection = ctx.projection
        matmul = LoraMatmul(projection.group, ctx.adapters, factors, min(x.shape[0], largest_tile(projection.tile)))
        q_grad, k_grad = unit_stride(q_grad), unit_stride(k_grad)
        x_grad = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        for rows in row_tiles(x.shape[0], projection.tile):
            grads = (q_grad[rows], k_grad[rows], v_grad[rows])
            tile_grad = None if x_grad is None else x_grad[rows]
            unnormed = tuple(part[rows] for part in before)
            backward_of_rows(projection, matmul, x[rows], (cos[rows], sin[rows]), grads, unnormed, tile_grad)
        return x_grad, None, None, None, None, *matmul.gradients()


def backward_of_rows(
    projection: QkvProjection,
    matmul: LoraMatmul,
    x: Tensor,
    angles: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor, Tensor],
    before: tuple[Tensor, ...],
    x_grad: Tensor | None,
) -> None:
    """One tile of the backward, in a call of its own so that its tensors are gone before the next one's are made.

    `grads` of q, k and v; `before`: q and k as they were before their norms, if there are any; dL/dx goes to `x_grad`.
    """
    grad, stacked_grad = matmul.outputs(x.shape[0])
    q, k, v = projection.split(stacked_grad)
    rotate(grads[0], *angles, out=q, inverse=True)
    rotate(grads[1], *angles, out=k, inverse=True)
    v.copy_(grads[2])
    if projection.q_norm is not None and projection.k_norm is not None:
        projection.q_norm.backward(q, before[0], out=q)
        projection.k_norm.backward(k, before[1], out=k)
    unit = normed_input(matmul, projection.norm, x)
    if x_grad is None:  # the first layer: an embedding that is frozen
        matmul.trained_gradient(grad, unit, matmul.adapter_gradient(grad))
        return
    unit_grad, x_lora_a_grad = matmul.input_gradient(grad)
    matmul.trained_gradient(grad, unit, x_lora_a_grad)
    norm_backward(projection.norm, unit_grad, x, x_grad)
