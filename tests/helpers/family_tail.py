"""Tiny models of families that are compared by their logprobs, at the gate and by their layout, but not in a whole run.

As in `families.py`, which makes models of these entries too: windows are shorter than the sequences of the tests and
multipliers are not 1.
"""

from __future__ import annotations

from typing import Any

KINDS = ["sliding_attention", "full_attention"]
WINDOWED: dict[str, Any] = {"head_dim": 64, "sliding_window": 16, "layer_types": KINDS}
MULTIPLIED = {
    "embedding_multiplier": 2.0,
    "attention_multiplier": 0.1,
    "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
}
EXPERTS = {"num_experts": 16, "num_experts_per_tok": 4, "intermediate_size": 64}
LOCAL_EXPERTS = {"num_local_experts": 16, "num_experts_per_tok": 4, "intermediate_size": 64}
FIRST_LAYER_TURNS = {"layer_rope_theta": [1e4, 0.0]}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

TAIL: dict[str, dict[str, Any]] = {
    "apertus": {"rope_parameters": LLAMA3},
    "cohere2": {**WINDOWED, "logit_scale": 0.25},
    "cohere2_moe": {**WINDOWED, **EXPERTS, "mlp_layer_types": ["sparse", "sparse"], "logit_scale": 0.25},
    "cwm": {**WINDOWED, "rope_parameters": LLAMA3},
    "flex_olmo": EXPERTS,
    "granite_swa": {**WINDOWED, **MULTIPLIED, **FIRST_LAYER_TURNS},
    "granitemoe_swa": {
        **MULTIPLIED,
        **LOCAL_EXPERTS,
        **FIRST_LAYER_TURNS,
        "sliding_window": 16,
        "layer_types": KINDS,
        "shared_intermediate_size": 64,
    },
    "granitemoeshared": {**MULTIPLIED, **LOCAL_EXPERTS, "shared_intermediate_size": 64},
    "helium": {"head_dim": 32},
    "hunyuan_v1_dense": {
        "head_dim": 64,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0, "alpha": 8.0},
    },
    "hyperclovax": {**MULTIPLIED, "head_dim": 64},
    "jais2": {"head_dim": 64},
    "mellum": {
        **WINDOWED,
        **LOCAL_EXPERTS,
        "mlp_layer_types": ["dense", "sparse"],
        "moe_intermediate_size": 64,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    },
    "ministral": WINDOWED,
    "nanochat": {"final_logit_softcapping": 3.0},
    "olmo": {"clip_qkv": 2.0},
    "qwen2_moe": {
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 128,
    },
}
"""model_type -> entries of its configuration beside those of all tiny models."""
