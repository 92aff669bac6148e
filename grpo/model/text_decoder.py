"""The decoder of text inside a model that takes images or sound too: its configuration, and its tensors' names.

Only token ids go through sampling and training, so of such a model the decoder alone is read. What is left out is named
by `inventory.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from grpo.model.decoder_config import IMAGE_POSITIONS, DecoderConfig
from grpo.model.families.table import family_of
from grpo.model.quantization import weight_of

WRAPPERS = ("language_model", "text_model")
"""Modules that models of several inputs keep their decoder of text in."""
SHARED_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""What the whole model's configuration may say for its decoder."""


def text_config(config: DecoderConfig, *, images: bool = False) -> DecoderConfig:
    """The configuration of the decoder in the model of `config`, transformers'; `config` itself where that is all.

    `images`: its positions are those in images too.
    """
    text = config.get_text_config(decoder=True)
    if text is not config:
        tied = getattr(config, "tie_word_embeddings", getattr(text, "tie_word_embeddings", None))
        text.tie_word_embeddings = bool(tied)
        for key in SHARED_KEYS:
            if getattr(text, key, None) is None:
                setattr(text, key, getattr(config, key, None))
    if images:
        text.rope_parameters["mrope_interleaved"] = family_of(text.model_type).sees == "interleaved"
    plain = family_of(text.model_type).text_as
    return as_family(text, plain, images=images) if plain else text


def as_family(config: DecoderConfig, model_type: str, *, images: bool = False) -> Any:
    """`config`, of a decoder that computes what the family `model_type` does, as that family's."""
    from transformers import AutoConfig

    values = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "architectures")}
    rotary = {key: value for key, value in values["rope_parameters"].items() if key not in IMAGE_POSITIONS}
    if rotary.get("rope_type") == "mrope":
        rotary["rope_type"] = "default"
    changed = family_of(config.model_type).text_values
    made = AutoConfig.for_model(model_type, **{**values, **changed, "rope_parameters": rotary})
    if images:  # afterwards: the family's own class knows of none
        made.ignore_keys_at_rope_validation = set(IMAGE_POSITIONS)
        made.rope_parameters |= {key: config.rope_parameters[key] for key in IMAGE_POSITIONS}
    return made


def decoder_names(stored: Iterable[str], wanted: set[str]) -> dict[str, str]:
    """The decoder's names -> those in the checkpoint, for entries of `stored` that belong to tensors in `wanted`.

    An entry keeps what follows a tensor's name: the parts of a quantised weight.
    """
    names = {}
    for name in stored:
        plain = plain_name(name)
        if logical(plain) in wanted:
            names[plain] = name
    return names


def plain_name(name: str) -> str:
    """What the decoder alone calls its module or tensor `name` of a model of several inputs."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def logical(name: str) -> str:
    """The tensor that a checkpoint's entry belongs to."""
    head, weight, tail = name.partition(".weight.")
    return head + ".weight" if tail else weight_of(name)
