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


def check_sizes(values: Mapping[str, Any], file: Path) -> None:
    """Raise UserError for sizes in a model's configuration that no model has."""
    for key, limit in LIMITS.items():
        value = values.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit):
            raise UserError(
                f"{file}: {key} = {json.dumps(value, default=str)[:60]}: must be a whole number from 1 to {limit:,}; "
                "correct it, or download the model again"
            )
    heads, groups = values.get("num_attention_heads"), values.get("num_key_value_heads")
    if heads and groups and heads % groups:
        raise UserError(
            f"{file}: num_attention_heads = {heads} is no multiple of num_key_value_heads = {groups}; correct it, or "
            "download the model again"
        )
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
