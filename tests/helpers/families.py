"""Tiny models of the families beyond those of `tiny.py`: what makes each particular, in sizes that a test can run.

Windows and original lengths are shorter than the sequences of the tests, multipliers are not 1, and layer types differ
where the family has several.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from tests.helpers.family_tail import TAIL
from tests.helpers.tiny import COMMON, spread_of_embedding

KINDS = ["sliding_attention", "full_attention"]


def rotary(part: float = 1.0, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": part, **more}}


YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=32.0, beta_slow=1.0,
            mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.3)  # fmt: skip
LONG = dict(rope_type="longrope", original_max_position_embeddings=16, short_factor=[1.1] * 12,
            long_factor=[1.5] * 12)  # fmt: skip
WIDE = {"head_dim": 64}
DELTA_NET: dict[str, Any] = {
    **WIDE,
    **rotary(0.25, mrope_section=[3, 3, 2], mrope_interleaved=True),
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts_per_tok": 4}
SHARED = {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 128}

GEMMA4: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": KINDS * 2,
    "sliding_window": 16,
    "head_dim": 32,
    "global_head_dim": 64,
    "final_logit_softcapping": 3.0,
    "hidden_size_per_layer_input": 0,
}
SHARED_KEYS: dict[str, Any] = {
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 64,
    "vocab_size_per_layer_input": COMMON["vocab_size"],
}
"""What the smaller Gemma 4 have: two of its four layers attend to the keys of the first two."""

NEWCOMERS: dict[str, dict[str, Any]] = {
    "ministral3": {**WIDE, "rope_parameters": {"rope_theta": 1e4, **YARN}},
    "granite": {
        "embedding_multiplier": 2.0,
        "attention_multiplier": 0.1,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
    },
    "smollm3": {"no_rope_layers": [1, 0], "tie_word_embeddings": True},
    "olmo2": {},
    "olmo3": {
        "sliding_window": 16,
        "layer_types": KINDS,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "attention_factor": 1.2,
            },
        },
    },  # fmt: skip
    "glm4": {**WIDE, **rotary(0.5)},
    "exaone4": {
        **WIDE,
        "sliding_window": 16,
        "sliding_window_pattern": "LG",
        "layer_types": KINDS,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },  # fmt: skip
    "seed_oss": WIDE,
    "phi3": {
        "tie_word_embeddings": True,
        "original_max_position_embeddings": 16,
        "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.75, **LONG},
    },
    "glm": {**WIDE, **rotary(0.5)},
    "ernie4_5": WIDE,
    "stablelm": rotary(0.25),
    "nemotron": rotary(0.5),
    "arcee": WIDE,
    "qwen3_moe": {
        **WIDE,
        **EXPERTS,
        "num_experts": 16,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "num_hidden_layers": 3,
        "mlp_only_layers": [1],
    },
    "olmoe": {**EXPERTS, "num_experts": 16, "intermediate_size": 64, "norm_topk_prob": False},
    "granitemoe": {
        **EXPERTS,
        "num_local_experts": 16,
        "intermediate_size": 64,
        "embedding_multiplier": 2.0,
        "attention_multiplier": 0.1,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {
        **WIDE,
        "intermediate_size": 64,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": 16,
        "layer_types": KINDS,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
        },
        "tie_word_embeddings": False,
    },
    "cohere": {"use_qk_norm": False, "logit_scale": 0.25},
    "gemma4_text": {**GEMMA4, **SHARED_KEYS, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
    "qwen3_5_text": DELTA_NET,
    "qwen3_5_moe_text": {**DELTA_NET, **EXPERTS, "num_experts": 16, **SHARED},
    "lfm2": {
        "num_hidden_layers": 3,
        "layer_types": ["conv", "full_attention", "conv"],
        "conv_L_cache": 3,
        "conv_bias": False,
        "block_auto_adjust_ff_dim": False,
        **rotary(),
    },
}
"""model_type -> entries of its configuration beside those of all tiny models."""


def family_config(family: str, **changes: Any) -> Any:
    """transformers' configuration of a tiny model."""
    return AutoConfig.for_model(family, **{**COMMON, **(NEWCOMERS | TAIL)[family], **per_layer_rows(changes)})


def per_layer_rows(changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` with as many rows in an embedding for each layer as in the first one."""
    return changes | ({"vocab_size_per_layer_input": changes["vocab_size"]} if "vocab_size" in changes else {})


def save_family(folder: Path, family: str, **changes: Any) -> Any:
    """Write a random float32 model whose logits are far from uniform to `folder`, and return it."""
    torch.manual_seed(0)
    config = family_config(family, **changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    spread(model).save_pretrained(folder)
    return model


def save_mxfp4(folder: Path, **changes: Any) -> Any:
    """Write a tiny gpt-oss whose experts are in MXFP4 to `folder`, and return the model of their values."""
    from safetensors.torch import load_file, save_file

    from grpo.kernels import mxfp4

    model = save_family(folder, "gpt_oss", **changes)
    tensors, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        codes = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
        exponents = torch.randint(118, 121, codes.shape[:3], generator=generator, dtype=torch.uint8)
        tensors |= {f"{name}_blocks": codes, f"{name}_scales": exponents}
        with torch.no_grad():
            model.get_parameter(name).copy_(mxfp4.value(codes, exponents, torch.float32).mT)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    left = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    values["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": left}
    (folder / "config.json").write_text(json.dumps(values))
    return model


TOWER: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32}
LAYERED = {**TOWER, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
BLOCKS = {**TOWER, "depth": 1, "num_heads": 2, "out_hidden_size": COMMON["hidden_size"]}
TOKENS = {
    "image_token_id": 150, "video_token_id": 151, "vision_start_token_id": 152, "vision_end_token_id": 153,
}  # fmt: skip


def sections(*sizes: int) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sizes)}}


GEMMA4_TOKENS = {
    f"{name}_token_id": 151 + place for place, name in enumerate(("boi", "eoi", "image", "video", "boa", "audio"))
} | {"eoa_token_index": 150}

WITH_IMAGES: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {**COMMON, **WIDE, "sliding_window": 16, "query_pre_attn_scalar": 64},
        "vision_config": LAYERED,
        "mm_tokens_per_image": 4,
        "image_token_index": 150,
        "boi_token_index": 151,
        "eoi_token_index": 152,
    },
    "qwen2_5_vl": {"text_config": {**COMMON, **sections(4, 6, 6)}, "vision_config": BLOCKS, **TOKENS},
    "qwen3_vl": {
        "text_config": {**COMMON, **WIDE, **sections(12, 10, 10)},
        "vision_config": {**BLOCKS, "deepstack_visual_indexes": [0]},
        **TOKENS,
    },
    "mistral3": {
        "text_config": {"model_type": "mistral", **COMMON, **WIDE},
        "vision_config": {"model_type": "pixtral", **LAYERED},
        "image_token_index": 150,
    },
    "gemma4": {
        "text_config": {**COMMON, **GEMMA4, **SHARED_KEYS},
        "vision_config": {**LAYERED, "head_dim": 16, "global_head_dim": 16, "position_embedding_size": 16},
        "audio_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "output_proj_dims": 32},
        **GEMMA4_TOKENS,
    },
    "gemma4 of keys as values": {
        "text_config": {**COMMON, **GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
        "vision_config": {**LAYERED, "head_dim": 16, "global_head_dim": 16, "position_embedding_size": 16},
        **GEMMA4_TOKENS,
    },
    "gemma4_unified": {
        "text_config": {**COMMON, **GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
        "vision_config": {"patch_size": 4, "mm_embed_dim": 32, "mm_posemb_size": 8, "output_proj_dims": 32},
        "audio_config": {"hidden_size": 32},
        **GEMMA4_TOKENS,
    },
    "qwen3_5": {
        "text_config": {**COMMON, **DELTA_NET},
        "vision_config": {**BLOCKS, "num_position_embeddings": 16},
        **TOKENS,
    },
    "mistral3 of ministral3": {
        "text_config": {"model_type": "ministral3", **COMMON, **NEWCOMERS["ministral3"]},
        "vision_config": {"model_type": "pixtral", **LAYERED},
        "image_token_index": 150,
    },
}
"""model_type of models that take images too, and of their text where that has several -> their configuration."""


def save_with_images(folder: Path, family: str, **changes: Any) -> Any:
    """Write a random float32 model that takes images to `folder`, and return it. changes: to its text's entries."""
    torch.manual_seed(0)
    values = WITH_IMAGES[family]
    config = AutoConfig.for_model(
        family.split()[0], **{**values, "text_config": {**values["text_config"], **per_layer_rows(changes)}}
    )
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32, attn_implementation="eager")
    spread(model).save_pretrained(folder)
    return model


def spread(model: Any) -> Any:
    """`model` with random weights that make its logits far from uniform."""
    vocabulary = spread_of_embedding(model.config.model_type)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.mul_(0.8)
        for name, parameter in model.named_parameters():
            if "norm" in name or parameter.ndim < 2:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.copy_(
                    torch.randn_like(parameter) * (vocabulary if "embed" in name or "lm_head" in name else 0.12)
                )
    return model.eval()
