"""Attention, norms and the stream between layers of Qwen 3.5 in the place of transformers' forwards.

What is attended to is multiplied by a gate. transformers rounds the rotation of queries and keys three times; here it
is rounded once, as vLLM does. The sum that goes from layer to layer is float32, in both graphs: rounded behind every
attention and MLP, as transformers rounds it, it is the largest part of what they differ by. Norms keep their input as
it is. The modules stay transformers', with its names for weights and adapters; only what they do when called is ours.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from grpo.kernels.rms_norm import Norm, rms_norm
from grpo.kernels.rope import rope
from grpo.memory.layer_sizes import OWN_NORMS
from grpo.policy.float32_stream import keep_sums_unrounded


def install_gated_attention(graph: nn.Module, model_type: str) -> None:
    """Let the attention and the norms of `graph`, a causal LM of the family, compute so."""
    if model_type not in OWN_NORMS:
        return
    keep_sums_unrounded(graph)
    for layer in graph.model.layers:
        norms = [layer.input_layernorm, layer.post_attention_layernorm]
        if hasattr(layer, "self_attn"):
            layer.self_attn.forward = types.MethodType(gated_attention, layer.self_attn)
            norms += [layer.self_attn.q_norm, layer.self_attn.k_norm]
        for norm in norms:
            norm.forward = types.MethodType(frozen_norm, norm)
    graph.model.norm.forward = types.MethodType(frozen_norm, graph.model.norm)


def frozen_norm(self: Any, x: Tensor) -> Tensor:
    """x [..., hidden] normed, by its weight plus one."""
    return rms_norm(x, Norm(self.weight.detach(), self.eps, unit_offset=True))


def gated_attention(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """hidden_states [1, tokens, hidden] in and out. position_embeddings: cosines and sines [1, tokens, rotated]."""
    cos, sin = (part[0] for part in position_embeddings)
    query, gate = self.q_proj(hidden_states)[0].unflatten(-1, (-1, 2 * self.head_dim)).chunk(2, dim=-1)
    key, value = (
        projection(hidden_states)[0].unflatten(-1, (-1, self.head_dim)) for projection in (self.k_proj, self.v_proj)
    )
    query, key = rope(self.q_norm(query), cos, sin), rope(self.k_norm(key), cos, sin)
    heads = (part.transpose(0, 1)[None] for part in (query, key, value))
    attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
    attended, _ = attend(self, *heads, attention_mask, dropout=0.0, scaling=self.scaling, **more)
    flat = (1, len(query), -1)
    return self.o_proj(attended.reshape(flat) * torch.sigmoid(gate.reshape(flat))), None
