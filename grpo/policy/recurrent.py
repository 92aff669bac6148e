"""Layers with a state, over packed rows: gated DeltaNet and short convolutions in the place of transformers' forwards.

transformers' own run a state on from one sequence of a row into the next, which is silently wrong by whole nats. Here
every sequence begins with an empty state, or with that of the prompt which it shares: the state is forked. The modules
stay transformers', with its names for weights and adapters; only what they do when called is ours.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from grpo.kernels.attention import Packing
from grpo.kernels.gated_delta import gated_delta_rule
from grpo.kernels.gated_norm import gated_norm
from grpo.kernels.recurrence import Recurrence
from grpo.kernels.short_conv import short_conv
from grpo.policy.packing import packing_of


def install_recurrent_layers(graph: nn.Module, model_type: str) -> None:
    """Let the layers of `graph`, a causal LM of the family, that have a state compute it over packed rows."""
    if model_type not in FORWARDS:
        return
    name, forward = FORWARDS[model_type]
    for layer in graph.model.layers:
        mixer = getattr(layer, name, None)
        if mixer is not None:
            mixer.forward = types.MethodType(forward, mixer)


def delta_net(self: Any, hidden_states: Tensor, packing: Packing | None = None, **ignored: Any) -> Tensor:
    """Qwen 3.5's gated DeltaNet. hidden_states [1, tokens, hidden] in and out."""
    recurrence = Recurrence.of(packing_of(packing, hidden_states))
    mixed = short_conv(
        self.in_proj_qkv(hidden_states)[0], self.conv1d.weight[:, 0], self.conv1d.bias, recurrence, silu=True
    )
    query, key, value = mixed.split([self.key_dim, self.key_dim, self.value_dim], dim=-1)
    query, key = (part.unflatten(-1, (self.num_k_heads, self.head_k_dim)) for part in (query, key))
    value = value.unflatten(-1, (self.num_v_heads, self.head_v_dim))
    a, b = self.in_proj_a(hidden_states)[0], self.in_proj_b(hidden_states)[0]
    decay = -self.A_log.float().exp() * F.softplus(a.float() + self.dt_bias.float())
    result = gated_delta_rule(query, key, value, decay, b.float().sigmoid(), recurrence)
    gate = self.in_proj_z(hidden_states)[0].unflatten(-1, (-1, self.head_v_dim))
    normed = gated_norm(result, gate, self.norm.weight, self.norm.variance_epsilon)
    return self.out_proj(normed.reshape(*hidden_states.shape[:-1], -1))


def gated_conv(self: Any, hidden_states: Tensor, packing: Packing | None = None, **ignored: Any) -> Tensor:
    """LFM2's convolution between two gates. hidden_states [1, tokens, hidden] in and out."""
    recurrence = Recurrence.of(packing_of(packing, hidden_states))
    before, after, x = self.in_proj(hidden_states)[0].chunk(3, dim=-1)
    mixed = short_conv(before * x, self.conv.weight[:, 0], self.conv.bias, recurrence)
    return self.out_proj((after * mixed)[None])


FORWARDS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "qwen3_5_text": ("linear_attn", delta_net),
    "qwen3_5_moe_text": ("linear_attn", delta_net),
    "lfm2": ("conv", gated_conv),
}
"""model_type -> (the module of its layers with a state, what it does)."""
