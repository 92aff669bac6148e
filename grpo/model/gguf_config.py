"""What transformers leaves unread in a GGUF file's metadata, put into its configuration: rotary scaling, sizes, caps.

transformers reads sizes and the rotary base. Without the rest a Llama 3 file gets wrong rotary frequencies and says
nothing. The names of the metadata are those of llama.cpp's `docs/gguf.md`; what a file cannot say, because llama.cpp
has it in its code (Gemma's attention scale), is as there.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from grpo.errors import UserError
from grpo.model.decoder_config import DecoderConfig

LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
"""Rotary scaling of every Llama since 3.1, but for the factor: a file holds only the frequencies that follow."""
ROTARY_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors that are read as a part of the configuration."""
LARGEST_GEMMA = {"gemma2": 46, "gemma3_text": 62}
"""Layers of the 27B models, whose attention is scaled by hidden size over heads instead of the head size."""


def complete_config(config: DecoderConfig, reader: Any, where: str) -> None:
    """Set in `config` (transformers', of the text model) what `reader` (gguf's) knows and transformers did not read.

    Raises UserError, naming `where`, for rotary frequencies that no known scaling gives.
    """
    architecture = value(reader, "general.architecture")

    def known(key: str) -> Any:
        return value(reader, f"{architecture}.{key}")

    entries = {
        "head_dim": known("attention.key_length"),
        "sliding_window": known("attention.sliding_window") or None,
        "attn_logit_softcapping": known("attn_logit_softcapping"),
        "final_logit_softcapping": known("final_logit_softcapping"),
    }
    for name, entry in entries.items():
        if entry is not None and hasattr(config, name) and getattr(config, name) != entry:
            setattr(config, name, entry)
    if hasattr(config, "query_pre_attn_scalar"):
        config.query_pre_attn_scalar = attention_scale(config)
    scaling = rotary_scaling(known, config)
    if scaling:
        ours = config.rope_parameters
        nested = "full_attention" in ours
        merged = {**(ours["full_attention"] if nested else ours), **scaling}
        config.rope_parameters = {**ours, "full_attention": merged} if nested else merged
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "rope_freqs.weight" in tensors:
        apply_llama3(config, torch.tensor(tensors["rope_freqs.weight"].data.tolist()), where)
    if "rope_factors_long.weight" in tensors:
        apply_longrope(config, tensors, known("rope.scaling.original_context_length"))


def value(reader: Any, key: str) -> Any:
    """The metadata entry `key`; None where the file has none."""
    field = reader.get_field(key)
    return None if field is None else field.contents()


def attention_scale(config: DecoderConfig) -> int:
    """Gemma's `query_pre_attn_scalar` as llama.cpp takes it from the sizes."""
    if config.num_hidden_layers == LARGEST_GEMMA.get(config.model_type):
        return config.hidden_size // config.num_attention_heads
    return config.head_dim


def rotary_scaling(known: Any, config: DecoderConfig) -> dict[str, Any]:
    """transformers' entries for linear and YaRN scaling, and for rotating a part of the head only."""
    entries: dict[str, Any] = {}
    width, head = known("rope.dimension_count"), getattr(config, "head_dim", None)
    head = head or config.hidden_size // config.num_attention_heads
    if width is not None and width != head:
        entries["partial_rotary_factor"] = width / head
    kind, factor = known("rope.scaling.type"), known("rope.scaling.factor")
    if kind not in ("linear", "yarn") or not factor:
        return entries
    entries |= {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        optional = {
            "original_max_position_embeddings": known("rope.scaling.original_context_length"),
            "attention_factor": known("rope.scaling.yarn_attn_factor"),
            "beta_fast": known("rope.scaling.yarn_beta_fast"),
            "beta_slow": known("rope.scaling.yarn_beta_slow"),
        }
        entries |= {key: entry for key, entry in optional.items() if entry is not None}
    return entries


def frequency_divisors(config: DecoderConfig) -> Tensor:
    """By what `config`'s scaling divides each rotary frequency, float32 [rotated dimensions / 2]."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, torch.device("cpu"))
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = 2 * len(scaled)
    assert width <= head
    plain = config.rope_parameters["rope_theta"] ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    return (plain / scaled.double()).float()


def apply_llama3(config: DecoderConfig, divisors: Tensor, where: str) -> None:
    """Set the Llama 3 scaling that gives `divisors`. Raises UserError where none does."""
    if bool((divisors == 1).all()):
        return
    factor = float(divisors.max())
    candidate = copy.deepcopy(config)
    candidate.rope_parameters = {**config.rope_parameters, **LLAMA3, "factor": factor}
    if not torch.allclose(frequency_divisors(candidate), divisors, rtol=1e-3):
        raise UserError(f"{where}: rotary frequencies (rope_freqs.weight) are scaled in a way that is not Llama 3's")
    config.rope_parameters = candidate.rope_parameters


def apply_longrope(config: DecoderConfig, tensors: dict[str, Any], original: int | None) -> None:
    """Set Phi-3's long-context scaling from its two lists of divisors."""
    config.rope_parameters = {
        **config.rope_parameters,
        "rope_type": "longrope",
        "long_factor": tensors["rope_factors_long.weight"].data.tolist(),
        "short_factor": tensors["rope_factors_short.weight"].data.tolist(),
        "original_max_position_embeddings": original or config.max_position_embeddings,
    }
    config.original_max_position_embeddings = original or config.max_position_embeddings
