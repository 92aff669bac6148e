"""How vLLM lays out the tested families, traced and written by `make layouts`; nothing here is edited by hand."""

# ruff: noqa: E501

from typing import Any

LAYOUTS: dict[str, dict[str, Any]] = {
    "3a23b0a393fb": {
        "linears": {
            "model.layers.*.self_attn.qkv_proj": (
                "model.layers.*.self_attn.q_proj",
                "model.layers.*.self_attn.k_proj",
                "model.layers.*.self_attn.v_proj",
            ),
            "model.layers.*.self_attn.o_proj": ("model.layers.*.self_attn.o_proj",),
            "model.layers.*.mlp.gate_up_proj": ("model.layers.*.mlp.gate_up_proj",),
            "model.layers.*.mlp.down_proj": ("model.layers.*.mlp.down_proj",),
        },
        "renamed": {},
    },
    "3c09ecee8999": {
        "linears": {
            "model.layers.*.self_attn.qkv_proj": (
                "model.layers.*.self_attn.q_proj",
                "model.layers.*.self_attn.k_proj",
                "model.layers.*.self_attn.v_proj",
            ),
            "model.layers.*.self_attn.o_proj": ("model.layers.*.self_attn.o_proj",),
        },
        "renamed": {
            "model.layers.*.block_sparse_moe.experts.down_proj": "model.layers.*.block_sparse_moe.experts.routed_experts.w2_weight",
            "model.layers.*.block_sparse_moe.experts.gate_up_proj": "model.layers.*.block_sparse_moe.experts.routed_experts.w13_weight",
            "model.layers.*.block_sparse_moe.router.weight": "model.layers.*.block_sparse_moe.gate.weight",
        },
    },
    "3d33ba86f57d": {
        "linears": {
            "model.layers.*.linear_attn.out_proj": ("model.layers.*.linear_attn.out_proj",),
            "model.layers.*.linear_attn.in_proj_qkvz": (
                "model.layers.*.linear_attn.in_proj_qkv",
                "model.layers.*.linear_attn.in_proj_z",
            ),
            "model.layers.*.linear_attn.in_proj_ba": (
                "model.layers.*.linear_attn.in_proj_b",
                "model.layers.*.linear_attn.in_proj_a",
            ),
            "model.layers.*.mlp.shared_expert.gate_up_proj": (
                "model.layers.*.mlp.shared_expert.gate_proj",
                "model.layers.*.mlp.shared_expert.up_proj",
            ),
            "model.layers.*.mlp.shared_expert.down_proj": ("model.layers.*.mlp.shared_expert.down_proj",),
            "model.layers.*.self_attn.qkv_proj": (
                "model.layers.*.self_attn.q_proj",
                "model.layers.*.self_attn.k_proj",
                "model.layers.*.self_attn.v_proj",
            ),
            "model.layers.*.self_attn.o_proj": ("model.layers.*.self_attn.o_proj",),
        },
        "renamed": {
            "model.layers.*.mlp.experts.down_proj": "model.layers.*.mlp.experts.routed_experts.w2_weight",
            "model.layers.*.mlp.experts.gate_up_proj": "model.layers.*.mlp.experts.routed_experts.w13_weight",
        },
        "float32": ("model.layers.*.linear_attn.A_log",),
    },
    "3de63c168c50": {
        "linears": {
            "model.layers.*.self_attn.qkv_proj": (
                "model.layers.*.self_attn.q_proj",
                "model.layers.*.self_attn.k_proj",
                "model.layers.*.self_attn.v_proj",
            ),
            "model.layers.*.self_attn.o_proj": ("model.layers.*.self_attn.o_proj",),
        },
        "renamed": {
            "model.layers.*.mlp.experts.down_proj": "model.layers.*.block_sparse_moe.experts.routed_experts.w2_weight",
            "model.layers.*.mlp.experts.gate_up_proj": "model.layers.*.block_sparse_moe.experts.routed_experts.w13_weight",
            "model.layers.*.mlp.gate.weight": "model.layers.*.block_sparse_moe.gate.weight",
        },
    },
    "44deb346b749": {
        "linears": {
            "model.layers.*.linear_attn.out_proj": ("model.layers.*.linear_attn.out_proj",),
            "model.layers.*.linear_attn.in_proj_qkvz": (
                "model.layers.*.linear_attn.in_proj_qkv",
                "model.layers.*.linear_attn.in_proj_z",
            ),
            "model.layers.*.linear_attn.in_proj_ba": (
                "model.layers.*.linear_attn.in_proj_b",
                "model.layers.*.linear_attn.in_proj_a",
            ),
            "model.layers.*.mlp.gate_up_proj": (
                "model.layers.*.mlp.gate_proj",
                "model.layers.*.mlp.up_proj",
            ),
            "model.layers.*.mlp.down_proj": ("model.layers.*.mlp.down_proj",),
            "model.layers.*.self_attn.qkv_proj": (
                "model.layers.*.self_attn.q_proj",
                "model.layers.*.self_attn.k_proj",
                "model.layers.*.self_attn.v_proj",
            ),
            "model.layers.*.self_attn.o_proj": ("model.layers.*.self_attn.o_proj",),
        },
        "renamed": {},
        "float32": ("model.layers.*.linear_attn.A_log",),
    },
    "6b15e33fe2ee": {
        "linears": {
            "model.layers.*.self_attn.qkv_proj": (
                "model.layers.*.self_attn.q_proj",
                "model.layers.*.self_attn.k_proj",
                "model.layers.*.self_attn.v_proj",
            ),
            "model.layers.*.self_attn.o_proj": ("model.layers.*.self_attn.o_proj",),
            "model.layers.*.mlp.gate_up_proj": (
                "model.layers.*.mlp.gate_proj",
                "model.layers.*.mlp.up_proj",
            ),
            "model.layers.*.mlp.down_proj": ("model.layers.*.mlp.down_proj",),
        },
        "renamed": {},
    },
    "7659fbb39fba": {
        "linears": {
            "model.layers.*.self_attn.qkv_proj": (
                "model.layers.*.self_attn.q_proj",
                "model.layers.*.self_attn.k_proj",
                "model.layers.*.self_attn.v_proj",
            ),
            "model.layers.*.self_attn.o_proj": ("model.layers.*.self_attn.o_proj",),
            "model.layers.*.mlp.fc1": ("model.layers.*.mlp.fc1",),
            "model.layers.*.mlp.fc2": ("model.layers.*.mlp.fc2",),
        },
        "renamed": {},
    },
    "8a67bc762eab": {
        "linears": {
            "model.layers.*.self_attn.qkv_proj": (
                "model.layers.*.self_attn.q_proj",
                "model.layers.*.self_attn.k_proj",
                "model.layers.*.self_attn.v_proj",
            ),
            "model.layers.*.self_attn.o_proj": ("model.layers.*.self_attn.o_proj",),
            "model.layers.*.mlp.gate_up_proj": (
                "model.layers.*.mlp.gate_proj",
                "model.layers.*.mlp.up_proj",
            ),
            "model.layers.*.mlp.down_proj": ("model.layers.*.mlp.down_proj",),
            "model.layers.*.per_layer_input_gate": ("model.layers.*.per_layer_input_gate",),
            "model.layers.*.per_layer_projection": ("model.layers.*.per_layer_projection",),
            "model.layers.*.self_attn.q_proj": ("model.layers.*.self_attn.q_proj",),
            "model.per_layer_model_projection": ("model.per_layer_model_projection",),
        },
        "renamed": {},
        "others": {
            "model.layers.*.self_attn.qkv_proj": (
                (
                    "model.layers.*.self_attn.q_proj",
                    "model.layers.*.self_attn.k_proj",
                    "model.layers.*.self_attn.k_proj",
                ),
            )
        },
    },
    "91f6408f8712": {
        "linears": {
            "model.layers.*.self_attn.qkv_proj": (
                "model.layers.*.self_attn.q_proj",
                "model.layers.*.self_attn.k_proj",
                "model.layers.*.self_attn.v_proj",
            ),
            "model.layers.*.self_attn.o_proj": ("model.layers.*.self_attn.o_proj",),
            "model.layers.*.mlp.gate_up_proj": (
                "model.layers.*.mlp.gate_proj",
                "model.layers.*.mlp.up_proj",
            ),
            "model.layers.*.mlp.down_proj": ("model.layers.*.mlp.down_proj",),
        },
        "renamed": {
            "model.layers.*.mlp.experts.down_proj": "model.layers.*.mlp.experts.routed_experts.w2_weight",
            "model.layers.*.mlp.experts.gate_up_proj": "model.layers.*.mlp.experts.routed_experts.w13_weight",
        },
    },
    "a2d40b989d06": {
        "linears": {
            "model.layers.*.self_attn.qkv_proj": (
                "model.layers.*.self_attn.q_proj",
                "model.layers.*.self_attn.k_proj",
                "model.layers.*.self_attn.v_proj",
            ),
            "model.layers.*.self_attn.o_proj": ("model.layers.*.self_attn.o_proj",),
            "model.layers.*.shared_mlp.input_linear": ("model.layers.*.shared_mlp.input_linear",),
            "model.layers.*.shared_mlp.output_linear": ("model.layers.*.shared_mlp.output_linear",),
        },
        "renamed": {
            "model.layers.*.block_sparse_moe.experts.down_proj": "model.layers.*.block_sparse_moe.experts.routed_experts.w2_weight",
            "model.layers.*.block_sparse_moe.experts.gate_up_proj": "model.layers.*.block_sparse_moe.experts.routed_experts.w13_weight",
            "model.layers.*.block_sparse_moe.router.weight": "model.layers.*.block_sparse_moe.gate.weight",
        },
    },
    "a48b867f70dd": {
        "linears": {
            "model.layers.*.short_conv.in_proj": ("model.layers.*.conv.in_proj",),
            "model.layers.*.short_conv.out_proj": ("model.layers.*.conv.out_proj",),
            "model.layers.*.feed_forward.w13": (
                "model.layers.*.feed_forward.w1",
                "model.layers.*.feed_forward.w3",
            ),
            "model.layers.*.feed_forward.w2": ("model.layers.*.feed_forward.w2",),
            "model.layers.*.self_attn.qkv_proj": (
                "model.layers.*.self_attn.q_proj",
                "model.layers.*.self_attn.k_proj",
                "model.layers.*.self_attn.v_proj",
            ),
            "model.layers.*.self_attn.out_proj": ("model.layers.*.self_attn.out_proj",),
        },
        "renamed": {
            "model.layers.*.conv.conv.weight": "model.layers.*.short_conv.conv.weight",
        },
    },
    "b8a414bb85ea": {
        "linears": {
            "model.layers.*.self_attn.qkv_proj": (
                "model.layers.*.self_attn.q_proj",
                "model.layers.*.self_attn.k_proj",
                "model.layers.*.self_attn.v_proj",
            ),
            "model.layers.*.self_attn.o_proj": ("model.layers.*.self_attn.o_proj",),
            "model.layers.*.mlp.gate_up_proj": (
                "model.layers.*.mlp.gate_proj",
                "model.layers.*.mlp.up_proj",
            ),
            "model.layers.*.mlp.down_proj": ("model.layers.*.mlp.down_proj",),
        },
        "renamed": {
            "model.layers.*.mlp.experts.down_proj": "model.layers.*.mlp.experts.routed_experts.w2_weight",
            "model.layers.*.mlp.experts.gate_up_proj": "model.layers.*.mlp.experts.routed_experts.w13_weight",
            "model.layers.*.mlp.gate.weight": "model.layers.*.mlp.experts.gate.weight",
        },
    },
    "bc96fe78753b": {
        "linears": {
            "model.layers.*.self_attn.qkv_proj": (
                "model.layers.*.self_attn.q_proj",
                "model.layers.*.self_attn.k_proj",
                "model.layers.*.self_attn.v_proj",
            ),
            "model.layers.*.self_attn.o_proj": ("model.layers.*.self_attn.o_proj",),
            "model.layers.*.mlp.shared_expert.gate_up_proj": (
                "model.layers.*.mlp.shared_expert.gate_proj",
                "model.layers.*.mlp.shared_expert.up_proj",
            ),
            "model.layers.*.mlp.shared_expert.down_proj": ("model.layers.*.mlp.shared_expert.down_proj",),
        },
        "renamed": {
            "model.layers.*.mlp.experts.down_proj": "model.layers.*.mlp.experts.routed_experts.w2_weight",
            "model.layers.*.mlp.experts.gate_up_proj": "model.layers.*.mlp.experts.routed_experts.w13_weight",
        },
    },
    "e04eaf2f8d69": {
        "linears": {
            "model.layers.*.self_attn.qkv_proj": (
                "model.layers.*.self_attn.q_proj",
                "model.layers.*.self_attn.k_proj",
                "model.layers.*.self_attn.v_proj",
            ),
            "model.layers.*.self_attn.o_proj": ("model.layers.*.self_attn.o_proj",),
            "model.layers.*.mlp.up_proj": ("model.layers.*.mlp.up_proj",),
            "model.layers.*.mlp.down_proj": ("model.layers.*.mlp.down_proj",),
        },
        "renamed": {},
    },
    "e5d8f0f4a127": {
        "linears": {
            "model.layers.*.self_attn.qkv_proj": (
                "model.layers.*.self_attn.q_proj",
                "model.layers.*.self_attn.k_proj",
                "model.layers.*.self_attn.v_proj",
            ),
            "model.layers.*.self_attn.o_proj": ("model.layers.*.self_attn.o_proj",),
        },
        "renamed": {
            "model.layers.*.mlp.experts.down_proj": "model.layers.*.mlp.experts.routed_experts.w2_weight",
            "model.layers.*.mlp.experts.gate_up_proj": "model.layers.*.mlp.experts.routed_experts.w13_weight",
        },
    },
    "e8c3dd70c37c": {
        "linears": {
            "model.layers.*.attn.qkv_proj": (
                "model.layers.*.self_attn.q_proj",
                "model.layers.*.self_attn.k_proj",
                "model.layers.*.self_attn.v_proj",
            ),
            "model.layers.*.attn.o_proj": ("model.layers.*.self_attn.o_proj",),
        },
        "renamed": {
            "model.embed_tokens.weight": "model.embedding.weight",
            "model.layers.*.mlp.experts.down_proj": "model.layers.*.mlp.experts.routed_experts.w2_weight",
            "model.layers.*.mlp.experts.down_proj_bias": "model.layers.*.mlp.experts.routed_experts.w2_bias",
            "model.layers.*.mlp.experts.gate_up_proj": "model.layers.*.mlp.experts.routed_experts.w13_weight",
            "model.layers.*.mlp.experts.gate_up_proj_bias": "model.layers.*.mlp.experts.routed_experts.w13_bias",
            "model.layers.*.self_attn.sinks": "model.layers.*.attn.sinks",
        },
    },
    "fbda1e2bf193": {
        "linears": {
            "model.layers.*.self_attn.o_proj": ("model.layers.*.self_attn.o_proj",),
            "model.layers.*.self_attn.qkv_proj": ("model.layers.*.self_attn.qkv_proj",),
            "model.layers.*.mlp.gate_up_proj": ("model.layers.*.mlp.gate_up_proj",),
            "model.layers.*.mlp.down_proj": ("model.layers.*.mlp.down_proj",),
        },
        "renamed": {},
    },
}
"""What vLLM stacks: its linear layers, each with the graph's in order."""

FAMILIES: dict[str, str] = {
    "apertus": "e04eaf2f8d69",
    "arcee": "e04eaf2f8d69",
    "cohere": "6b15e33fe2ee",
    "cohere2": "6b15e33fe2ee",
    "cohere2_moe": "e5d8f0f4a127",
    "cwm": "6b15e33fe2ee",
    "ernie4_5": "6b15e33fe2ee",
    "exaone4": "6b15e33fe2ee",
    "flex_olmo": "e5d8f0f4a127",
    "gemma": "6b15e33fe2ee",
    "gemma2": "6b15e33fe2ee",
    "gemma3_text": "6b15e33fe2ee",
    "gemma4_text": "8a67bc762eab",
    "glm": "3a23b0a393fb",
    "glm4": "3a23b0a393fb",
    "gpt_oss": "e8c3dd70c37c",
    "granite": "6b15e33fe2ee",
    "granite_swa": "6b15e33fe2ee",
    "granitemoe": "3c09ecee8999",
    "granitemoe_swa": "a2d40b989d06",
    "granitemoeshared": "a2d40b989d06",
    "helium": "6b15e33fe2ee",
    "hunyuan_v1_dense": "6b15e33fe2ee",
    "hyperclovax": "6b15e33fe2ee",
    "jais2": "e04eaf2f8d69",
    "lfm2": "a48b867f70dd",
    "llama": "6b15e33fe2ee",
    "mellum": "b8a414bb85ea",
    "ministral": "6b15e33fe2ee",
    "ministral3": "6b15e33fe2ee",
    "mistral": "6b15e33fe2ee",
    "mixtral": "3de63c168c50",
    "nanochat": "7659fbb39fba",
    "nemotron": "e04eaf2f8d69",
    "olmo": "6b15e33fe2ee",
    "olmo2": "6b15e33fe2ee",
    "olmo3": "6b15e33fe2ee",
    "olmoe": "e5d8f0f4a127",
    "phi3": "fbda1e2bf193",
    "qwen2": "6b15e33fe2ee",
    "qwen2_moe": "bc96fe78753b",
    "qwen3": "6b15e33fe2ee",
    "qwen3_5_moe_text": "3d33ba86f57d",
    "qwen3_5_text": "44deb346b749",
    "qwen3_moe": "91f6408f8712",
    "seed_oss": "6b15e33fe2ee",
    "smollm3": "6b15e33fe2ee",
    "stablelm": "6b15e33fe2ee",
}
"""model_type -> its layout."""

SEEN: dict[str, dict[str, str]] = {
    "0.32": {
        "apertus": "e04eaf2f8d69",
        "arcee": "e04eaf2f8d69",
        "cohere": "6b15e33fe2ee",
        "cohere2": "6b15e33fe2ee",
        "cohere2_moe": "e5d8f0f4a127",
        "cwm": "6b15e33fe2ee",
        "ernie4_5": "6b15e33fe2ee",
        "exaone4": "6b15e33fe2ee",
        "flex_olmo": "e5d8f0f4a127",
        "gemma": "6b15e33fe2ee",
        "gemma2": "6b15e33fe2ee",
        "gemma3_text": "6b15e33fe2ee",
        "gemma4_text": "8a67bc762eab",
        "glm": "3a23b0a393fb",
        "glm4": "3a23b0a393fb",
        "gpt_oss": "e8c3dd70c37c",
        "granite": "6b15e33fe2ee",
        "granite_swa": "6b15e33fe2ee",
        "granitemoe": "3c09ecee8999",
        "granitemoe_swa": "a2d40b989d06",
        "granitemoeshared": "a2d40b989d06",
        "helium": "6b15e33fe2ee",
        "hunyuan_v1_dense": "6b15e33fe2ee",
        "hyperclovax": "6b15e33fe2ee",
        "jais2": "e04eaf2f8d69",
        "lfm2": "a48b867f70dd",
        "llama": "6b15e33fe2ee",
        "mellum": "b8a414bb85ea",
        "ministral": "6b15e33fe2ee",
        "ministral3": "6b15e33fe2ee",
        "mistral": "6b15e33fe2ee",
        "mixtral": "3de63c168c50",
        "nanochat": "7659fbb39fba",
        "nemotron": "e04eaf2f8d69",
        "olmo": "6b15e33fe2ee",
        "olmo2": "6b15e33fe2ee",
        "olmo3": "6b15e33fe2ee",
        "olmoe": "e5d8f0f4a127",
        "phi3": "fbda1e2bf193",
        "qwen2": "6b15e33fe2ee",
        "qwen2_moe": "bc96fe78753b",
        "qwen3": "6b15e33fe2ee",
        "qwen3_5_moe_text": "3d33ba86f57d",
        "qwen3_5_text": "44deb346b749",
        "qwen3_moe": "91f6408f8712",
        "seed_oss": "6b15e33fe2ee",
        "smollm3": "6b15e33fe2ee",
        "stablelm": "6b15e33fe2ee",
    },
}
"""vLLM's version -> model_type -> the layout that was traced with it."""
