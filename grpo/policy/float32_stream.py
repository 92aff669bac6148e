"""The stream between decoder layers in float32, for families that have it so (`Family.float32_stream`).

Two graphs that round differently anywhere are soon apart by the stream's own rounding to 16 bit, twice a layer: in a
deep model that is most of what sampled and trained logprobs differ by. Here norms take the stream as it is and give the
model's type, in which everything else is computed; transformers' layers then add to it in float32 by themselves.
Sampling has the same stream (grpo/rollout/decoding_layers.py). Models in float32 have nothing to widen.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn

from grpo.kernels.launch import unrounded
from grpo.model.base_weights import BaseWeights
from grpo.model.families.table import family_of

NORMS = ("input_layernorm", "post_attention_layernorm")


def has_float32_stream(base: BaseWeights) -> bool:
    """Whether the stream of `base`'s model is wider than what is computed from it."""
    return family_of(base.config.model_type).float32_stream and base.dtype.itemsize == 2


def install_float32_stream(graph: nn.Module) -> None:
    """Let the stream between the layers of `graph`, a causal LM, be float32."""
    for norm in (*(getattr(layer, name) for layer in graph.model.layers for name in NORMS), graph.model.norm):
        norm.forward = types.MethodType(normed, norm)
    keep_sums_unrounded(graph)


def keep_sums_unrounded(graph: nn.Module) -> None:
    """Let the first layer of `graph` get the embedding unrounded, so that all sums with it are what it is."""
    graph.model.layers[0].register_forward_pre_hook(given_unrounded)


def given_unrounded(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A hook before the first layer."""
    return unrounded(args[0]), *args[1:]


def normed(self: Any, x: Tensor) -> Tensor:
    """A norm of the stream, rounded to the weight's type before its weight and after."""
    unit = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
    return self.weight * unit.to(self.weight.dtype)
