"""Tiny random models of every supported family, saved as users have them. Made here, so that no test downloads one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 160  # not a multiple of 64: vLLM pads it
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "pad_token_id": 0,
}
WIDE_HEADS = {"head_dim": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "mistral": {"sliding_window": 16},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": WIDE_HEADS,
    "gemma": WIDE_HEADS,
    "gemma2": {
        **WIDE_HEADS,
        "sliding_window": 16,
        "query_pre_attn_scalar": 64,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {**WIDE_HEADS, "sliding_window": 16, "query_pre_attn_scalar": 64},
    "phi3": {"tie_word_embeddings": False},
}


def tiny_model(family: str, **changes: Any) -> Any:
    """A random float32 model whose logits are far from uniform."""
    config = AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family], **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    vocabulary = spread_of_embedding(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.copy_(
                    torch.randn_like(parameter) * (vocabulary if "embed" in name or "lm_head" in name else 0.12)
                )
    return model.eval()


def spread_of_embedding(family: str) -> float:
    """Standard deviation for a vocabulary's rows. Gemma multiplies them by the root of their size: with more it would
    be sure of repeating every token."""
    return 0.1 if family.startswith("gemma") else 0.5


def save_tiny(folder: Path, family: str = "llama", **changes: Any) -> Any:
    """Write `tiny_model` to `folder` as safetensors and return it."""
    model = tiny_model(family, **changes)
    model.save_pretrained(folder)
    return model
