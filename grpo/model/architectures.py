"""The model families that both vLLM and the training graph build from the one copy, and how their linears fuse.

A family is here when a test compares vLLM's and the trainer's logprobs for it. Mixture-of-experts, vision and speech
models are not.
"""

from __future__ import annotations

from typing import Any

from grpo.errors import UserError

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
}
"""transformers' `model_type` to the class name that vLLM and transformers share."""

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
"""Parameters with a row for every token of the vocabulary."""

FUSED_PARTS = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}
"""vLLM's linear layers of a decoder block, each with the transformers modules whose rows it stacks, in order."""

ALL_LINEAR = "all-linear"
"""peft's word, in any case, for every linear layer but the output head."""

ALREADY_FUSED = {"phi3"}
"""Families whose transformers modules are fused as vLLM's are."""

OTHER_INPUTS = ("vision_config", "audio_config", "audio_encoder_config", "num_mel_bins")
"""Entries of transformers' configurations that give away a vision or speech model."""


def check_supported(config: Any, where: str) -> None:
    """Raise UserError unless `config` (transformers', of the whole model) is a supported decoder."""
    if config.model_type not in ARCHITECTURES:
        seen = any(hasattr(config, entry) for entry in OTHER_INPUTS)
        reason = (
            " because it takes images or sound, and only token ids go through sampling and training" if seen else ""
        )
        raise UserError(
            f"{where}: architecture {config.model_type!r} is not supported{reason}; supported are the text models "
            f"{', '.join(ARCHITECTURES)}"
        )


def fused_linears(config: Any) -> dict[str, list[str]]:
    """vLLM's name of every linear layer to the transformers module names whose rows it stacks."""
    linears = {}
    for layer in range(config.num_hidden_layers):
        for fused, parts in FUSED_PARTS.items():
            own = (fused,) if config.model_type in ALREADY_FUSED else parts
            linears[f"model.layers.{layer}.{fused}"] = [f"model.layers.{layer}.{part}" for part in own]
    return linears


def adapter_targets(config: Any, target_modules: list[str] | str) -> list[str] | str:
    """`target_modules` in the family's own names: where q, k, v (gate, up) are one module, naming any names it.

    "all-linear" is a name for all; any other text is a pattern and stays as it is. Raises UserError for a name of a
    list that names no linear layer of the model.
    """
    parts = [part for group in fused_linears(config).values() for part in group]
    if isinstance(target_modules, str):
        if target_modules.lower() != ALL_LINEAR:
            return target_modules
        return list(dict.fromkeys(part.rpartition(".")[2] for part in parts))
    own = [_own_name(config, name) for name in target_modules]
    for name, meant in zip(own, target_modules, strict=True):
        if not any(part == name or part.endswith(f".{name}") for part in parts):
            leaves = dict.fromkeys(part.rpartition(".")[2] for part in parts)
            raise UserError(
                f"lora.target_modules names {meant!r}, which is no linear layer of this model; name some of "
                f"{', '.join(leaves)}"
            )
    return list(dict.fromkeys(own))


def _own_name(config: Any, name: str) -> str:
    if config.model_type not in ALREADY_FUSED:
        return name
    fused_name = {
        "q_proj": "qkv_proj",
        "k_proj": "qkv_proj",
        "v_proj": "qkv_proj",
        "gate_proj": "gate_up_proj",
        "up_proj": "gate_up_proj",
    }
    return fused_name.get(name, name)


def expected_shapes(config: Any, name: str, parts: list[str]) -> dict[str, tuple[int, int]]:
    """(out, in) of every part of the linear `name`, from the model's configuration."""
    hidden, inner = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    query, key_value = config.num_attention_heads * head, config.num_key_value_heads * head
    by_leaf = {
        "q_proj": (query, hidden),
        "k_proj": (key_value, hidden),
        "v_proj": (key_value, hidden),
        "qkv_proj": (query + 2 * key_value, hidden),
        "o_proj": (hidden, query),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "gate_up_proj": (2 * inner, hidden),
        "down_proj": (hidden, inner),
    }
    return {part: by_leaf[part.rpartition(".")[2]] for part in parts}
