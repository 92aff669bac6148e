"""Checks of a model's files before anything is allocated by what they say: nobody vouches for a download.

For what a file means see `safetensors_source.py`, and for its tensors `inventory.py`; no one looks whether their values
are good.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo.errors import UserError
from grpo.model.attention_layers import head_sizes
from grpo.model.decoder_config import DecoderConfig
from grpo.model.families.table import family_of
from grpo.model.weight_files import unique

LIMITS = {
    "num_hidden_layers": 1000,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 12,
    "hidden_size": 1 << 18,
    "intermediate_size": 1 << 20,
    "vocab_size": 1 << 23,
    "max_position_embeddings": 1 << 30,
}
"""The largest believable sizes. Far above any model, and small enough that no loop or name list runs away."""

OPTIONAL = {
    "num_experts": (0, 1 << 12),
    "num_local_experts": (0, 1 << 12),
    "n_routed_experts": (0, 1 << 12),
    "num_experts_per_tok": (0, 1 << 12),
    "moe_intermediate_size": (0, 1 << 20),
    "shared_expert_intermediate_size": (0, 1 << 20),
    "shared_intermediate_size": (0, 1 << 20),
    "decoder_sparse_step": (0, 1000),
    "hidden_size_per_layer_input": (0, 1 << 18),
    "vocab_size_per_layer_input": (0, 1 << 23),
    "num_kv_shared_layers": (0, 1000),
    "num_global_key_value_heads": (1, 1 << 12),
    "global_head_dim": (1, 1 << 12),
    "linear_num_key_heads": (1, 1 << 12),
    "linear_num_value_heads": (1, 1 << 12),
    "linear_key_head_dim": (1, 1 << 12),
    "linear_value_head_dim": (1, 1 << 12),
    "linear_conv_kernel_dim": (1, 1 << 12),
    "conv_L_cache": (1, 1 << 12),
}
"""Sizes that some families have -> the smallest and the largest believable one; 0 where it means none."""
MULTIPLES = (("num_attention_heads", "num_key_value_heads"), ("linear_num_value_heads", "linear_num_key_heads"))
"""Numbers of heads, and the ones that are shared out among them."""

BEYOND_FLOAT16 = ("gemma2", "gemma3_text", "glm4")
"""Families that vLLM does not compute in float16."""

HEAD_SIZES_ON_CPU = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""What vLLM's attention on a CPU has kernels for."""


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in `file`. Raises UserError naming the line of a mistake."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}: not valid JSON ({error.msg}); download it again") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read as JSON ({error}); download it again") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: holds a {type(values).__name__}, not an object; download it again")
    return values


def check_family(values: Mapping[str, Any], file: Path) -> None:
    """Raise UserError for a model's configuration of a family of which it is known that it cannot be trained."""
    inner = values.get("text_config")
    for each in (inner if isinstance(inner, Mapping) else {}, values):
        reason = family_of(str(each.get("model_type"))).unserved
        if reason:
            raise UserError(f"{file}: architecture {each['model_type']!r} is not supported: {reason}")


def check_sizes(values: Mapping[str, Any], file: Path) -> None:
    """Raise UserError for sizes in a model's configuration that no model has."""
    remedy = "correct it, or download the model again"
    for key, (least, limit) in ({key: (1, limit) for key, limit in LIMITS.items()} | OPTIONAL).items():
        value = values.get(key)
        if value is not None and (type(value) is not int or not least <= value <= limit):
            must = f"must be a whole number from {least} to {limit:,}"
            raise UserError(f"{file}: {key} = {json.dumps(value, default=str)[:60]}: {must}; {remedy}")
    for key, part in MULTIPLES:
        heads, groups = values.get(key), values.get(part)
        if heads and groups and heads % groups:
            raise UserError(f"{file}: {key} = {heads} is no multiple of {part} = {groups}; {remedy}")
    heads, hidden = values.get("num_attention_heads"), values.get("hidden_size")
    if heads and hidden and heads > hidden and not values.get("head_dim"):
        lacking = f"more than hidden_size = {hidden} has numbers, and there is no head_dim"
        raise UserError(f"{file}: num_attention_heads = {heads}: {lacking}; {remedy}")
    for key, kind, of in (("layer_types", str, "kinds"), ("mlp_only_layers", int, "numbers")):
        listed = values.get(key)
        if listed is not None and not (isinstance(listed, list) and all(type(each) is kind for each in listed)):
            must = f"must be a list of the {of} of layers"
            raise UserError(f"{file}: {key} = {json.dumps(listed, default=str)[:60]}: {must}; {remedy}")
    if isinstance(text := values.get("text_config"), Mapping):
        check_sizes(text, file)


def check_head_size(config: DecoderConfig, where: Path, on_cpu: bool) -> None:
    """Raise UserError for attention heads that vLLM has no kernel for. `config`: the text model's."""
    unknown = sorted(head_sizes(config) - set(HEAD_SIZES_ON_CPU))
    if on_cpu and unknown:
        raise UserError(
            f"{where / 'config.json'}: attention heads of {unknown[0]}: vLLM's on a CPU are one of "
            f"{', '.join(map(str, HEAD_SIZES_ON_CPU))}; use another model, or a GPU"
        )


def largest_head(config: DecoderConfig) -> int:
    """The size of the attention heads of the text model `config`, of the layer with the largest."""
    return max(head_sizes(config))


def check_float16(config: DecoderConfig, where: Path) -> None:
    """Raise UserError for a text model whose activations leave the range of float16, in which it is to be computed."""
    if config.model_type in BEYOND_FLOAT16:
        raise UserError(
            f"{where / 'config.json'}: {beyond_float16(config.model_type)}; use another model, or model.dtype = "
            '"bfloat16" on a GPU that computes in it (compute capability 8.0 on)'
        )


def beyond_float16(family: str) -> str:
    """Why a family is not computed in float16."""
    return f"the activations of {family} overflow in float16, which vLLM refuses"


def no_bfloat16(gpu: str) -> str:
    """What to do about `model.dtype = "bfloat16"` on a GPU before Ampere."""
    return f'model.dtype = "bfloat16": the {gpu} computes in float16 alone; set "auto" or "float16"'


def end_tokens(file: Path, vocabulary: int) -> list[int]:
    """`eos_token_id` of a generation configuration, which may be missing. Raises UserError for what is no token."""
    eos = read_object(file).get("eos_token_id") if file.is_file() else None
    tokens = eos if isinstance(eos, list) else [] if eos is None else [eos]
    for token in tokens:
        if not isinstance(token, int) or not 0 <= token < vocabulary:
            raise UserError(f"{file}: eos_token_id = {json.dumps(eos)[:60]}: no token of the vocabulary; correct it")
    return tokens


def one_line(error: BaseException) -> str:
    """An error's text as one line, cut to a readable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."
