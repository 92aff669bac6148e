"""Attention of Qwen 3.5 in the place of transformers' forward: what is attended to is multiplied by a gate.

transformers rounds the rotation of queries and keys three times; here it is rounded once, as vLLM does. The modules
stay transformers', with its names for weights and adapters; only what they do when called is ours.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from grpo.kernels.rope import rope

MODELS = ("qwen3_5_text", "qwen3_5_moe_text")
"""Whose attention this is."""


def install_gated_attention(graph: nn.Module, model_type: str) -> None:
    """Let the layers of `graph`, a causal LM of the family, that are attention compute it so."""
    if model_type in MODELS:
        for layer in graph.model.layers:
            if hasattr(layer, "self_attn"):
                layer.self_attn.forward = types.MethodType(gated_attention, layer.self_attn)


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
