"""Our kernels for the gated MLP of decoder layers that are otherwise transformers', as those of Qwen 3.5.

The layer's MLP keeps its modules, with their names for weights and adapters; its forward becomes one autograd function
that keeps gate and up alone, or not even these. Layers that are ours as a whole have theirs in `fused_layers.py`.

Not here: experts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from grpo.kernels.lora_mlp import GatedMlp, lora_mlp
from grpo.memory.layer_sizes import has_mlp_kernels
from grpo.model.base_weights import BaseWeights
from grpo.policy.adapted_linears import ACTIVATIONS, AdaptedLinears, activation_of

PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""The linear layers of an MLP as vLLM stacks them -> transformers' modules."""


class Fused(NamedTuple):
    """One layer's MLP."""

    layer: nn.Module
    """Which says what is kept (activation_checkpointing.py)."""
    gate_up: AdaptedLinears
    down: AdaptedLinears
    frozen: GatedMlp
    plain: Callable[[Tensor], Tensor]
    """transformers' forward."""


def install_fused_mlps(decoder: nn.Module, base: BaseWeights) -> int:
    """Give the kernels to the MLPs of `decoder`, a causal LM over `base`; to how many layers."""
    if not has_mlp_kernels(base.config) or activation_of(base.config) not in ACTIVATIONS:
        return 0
    for index, layer in enumerate(decoder.model.layers):
        gate_up, down = (
            AdaptedLinears(
                base.linears[f"model.layers.{index}.mlp.{name}"], [getattr(layer.mlp, part) for part in parts]
            )
            for name, parts in PARTS.items()
        )
        frozen = GatedMlp(gate_up.frozen, down.frozen, ACTIVATIONS[activation_of(base.config)], None, residual=False)
        layer.keep_mlp, layer.mlp_tiles = True, 1
        layer.mlp.forward = partial(fused_mlp, Fused(layer, gate_up, down, frozen, layer.mlp.forward))
    return len(decoder.model.layers)


def fused_mlp(mlp: Fused, x: Tensor) -> Tensor:
    """x [1, tokens, hidden] in and out.

    In a layer that runs again for its backward alone nobody reads the result: its values are unset then.
    """
    modules = (*mlp.gate_up.modules, *mlp.down.modules)
    if mlp.gate_up.drops or mlp.down.drops or any(module._forward_hooks for module in modules):
        return mlp.plain(x)  # whoever watches a linear layer is to see it
    (above, above_factors), (below, below_factors) = mlp.gate_up.adapters(), mlp.down.adapters()
    factors = [*above_factors, *below_factors]
    recomputed = mlp.layer.gradient_checkpointing and mlp.layer.training
    again = recomputed and torch.is_grad_enabled() and any(each.requires_grad for each in (x, *factors))
    result = lora_mlp(
        x[0], mlp.frozen, (above, below), factors,
        keep=mlp.layer.keep_mlp and not recomputed, output=not again, tiles=1 if recomputed else mlp.layer.mlp_tiles,
    )  # fmt: skip
    return result[None]
