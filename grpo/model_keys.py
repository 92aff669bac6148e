"""What a model's configuration may say, checked before its weights are read.

vLLM and the training graph each compute what a configuration says, and not always the same: a key that one of them has
never heard of changes the policy in silence. So every key is one that both obey (tests compare their logprobs), one of
a few values that both compute, one that has no part in the computation, or one that transformers' class does not have,
which is named in a notice and reaches neither. Anything else is refused in a sentence that names it.

Sizes are `model_files.py`'s, and how rotary frequencies reach both graphs is `rope.py`'s.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grpo.architectures import ARCHITECTURES
from grpo.errors import UserError
from grpo.rope import frequencies, plain_parameters, prefixed, rotary_parameters, rotated

ACTIVATIONS = {
    "gemma": ("hidden_act", ("gelu_pytorch_tanh",)),
    "gemma2": ("hidden_activation", ("gelu_pytorch_tanh",)),
    "gemma3_text": ("hidden_activation", ("gelu_pytorch_tanh", "gelu", "silu")),
}
"""model_type -> the key of the MLP's activation, and what vLLM computes of it; for the others OTHER_ACTIVATIONS."""
OTHER_ACTIVATIONS = ("hidden_act", ("silu",))

PARTLY_ROTATED = ("phi3",)
"""Families of which transformers can rotate a part of each head."""
HEAD_OF_HIDDEN_SIZE = ("qwen2",)
"""Families whose heads vLLM takes to be the hidden size over their number, whatever `head_dim` says."""
WINDOW_IN_ALL_OR_NONE = ("qwen2", "qwen3")
"""Families that vLLM gives a sliding window in all layers or in none."""
LAYER_TYPES = ("full_attention", "sliding_attention")

DROPOUTS = ("attention_dropout", "resid_pdrop", "embd_pdrop")
WITHOUT_EFFECT = {"output_hidden_states": False, "output_attentions": False, "return_dict": True}
"""How transformers' models answer; we ask for what we need."""
OLD_SPELLINGS = {
    "rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor", "sliding_window_pattern", "head_dim",
    "is_causal", "layer_types", "hidden_activation", "torch_dtype", "quantization_config", "auto_map", "architectures",
    "model_type", "transformers_version",
}  # fmt: skip
"""Keys that transformers' classes do not list and that are read nonetheless, or checked here."""


def check_keys(config: Any, where: str) -> None:
    """Raise UserError, naming file and key, unless both graphs compute what `config` says.

    config: transformers', of a text model in ARCHITECTURES; `where`: its model's folder or file.
    """
    file = str(Path(where) / "config.json") if Path(where).is_dir() else where
    for key, value, reason in complaints(config):
        raise UserError(f"{file}: {key} = {shown(value)}: {reason}")


def complaints(config: Any) -> Iterator[tuple[str, Any, str]]:
    """(key, value, what is wrong with it and what to do) of all that the two graphs would not compute alike."""
    yield from attention_complaints(config)
    yield from layer_complaints(config)
    yield from number_complaints(config)
    yield from token_complaints(config)
    yield from rotary_complaints(config)


def attention_complaints(config: Any) -> Iterator[tuple[str, Any, str]]:
    family = config.model_type
    if getattr(config, "use_bidirectional_attention", None):
        yield "use_bidirectional_attention", True, "completions are sampled left to right; use a causal model"
    if getattr(config, "is_causal", True) is False:
        yield "is_causal", False, "completions are sampled left to right; use a causal model"
    if getattr(config, "is_heterogeneous", False):
        yield "per_layer_config", "...", "layers of different shapes are not served; use a model whose layers are alike"
    head, derived = getattr(config, "head_dim", None), config.hidden_size // config.num_attention_heads
    if family in HEAD_OF_HIDDEN_SIZE and head not in (None, derived):
        yield "head_dim", head, f"vLLM's {ARCHITECTURES[family]} has heads of hidden_size / num_attention_heads = " + (
            f"{derived}; use another model"
        )
    key, known = ACTIVATIONS.get(family, OTHER_ACTIVATIONS)
    if getattr(config, key) not in known:
        yield key, getattr(config, key), f"vLLM's {ARCHITECTURES[family]} computes only {either(known)}; " + (
            "set one of them if it is the same function, or use another model"
        )
    legacy = getattr(config, "hidden_activation", None)
    if key == "hidden_act" and legacy not in (None, config.hidden_act):
        yield "hidden_activation", legacy, f"hidden_act says {config.hidden_act!r}; remove one of them"


def layer_complaints(config: Any) -> Iterator[tuple[str, Any, str]]:
    """About which layers have a sliding window."""
    family, window = config.model_type, getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        return
    if len(kinds) < config.num_hidden_layers or not set(kinds) <= set(LAYER_TYPES):
        yield "layer_types", kinds, f"expected one of {either(LAYER_TYPES)} for each of {config.num_hidden_layers} layers"
        return
    sliding = kinds[: config.num_hidden_layers].count("sliding_attention")
    if sliding and window is None:
        yield "layer_types", kinds, "no sliding_window (or use_sliding_window = false) says how far those layers see; " + (
            "set one, or make them full_attention"
        )
    elif family in WINDOW_IN_ALL_OR_NONE and 0 < sliding < config.num_hidden_layers:
        yield "use_sliding_window", True, (
            f"{sliding} of {config.num_hidden_layers} layers have the window, and vLLM's {ARCHITECTURES[family]} gives it "
            f"to all or to none; set it to false, which is the same for sequences of at most {window} tokens, or use "
            "another model"
        )
    elif "layer_types" not in own_keys(config) and sliding not in (0 if window is None else config.num_hidden_layers,):
        yield "layer_types", kinds, f"transformers' {type(config).__name__} has the same attention in every layer; " + (
            "remove it, or use the family that the model is of"
        )


def number_complaints(config: Any) -> Iterator[tuple[str, Any, str]]:
    for key in ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"):
        value = getattr(config, key, None)
        if value is not None and not is_number(value, above=0):
            yield key, value, "must be a number above 0; correct it"
    if not is_number(config.rms_norm_eps, above=-1e-30):
        yield "rms_norm_eps", config.rms_norm_eps, "must be a number, 0 or above; correct it"
    window = getattr(config, "sliding_window", None)
    if window is not None and (not isinstance(window, int) or window < 1):
        yield "sliding_window", window, "must be a whole number above 0, or null for none; correct it"


def token_complaints(config: Any) -> Iterator[tuple[str, Any, str]]:
    """About tokens that the embedding has no row for."""
    rows = config.vocab_size
    pad, ends = config.pad_token_id, config.eos_token_id
    if pad is not None and not -rows <= pad < rows:
        yield "pad_token_id", pad, f"no token of the vocabulary, whose embedding has {rows} rows; set another, or null"
    for token in ends if isinstance(ends, list) else [] if ends is None else [ends]:
        if not isinstance(token, int) or not 0 <= token < rows:
            yield "eos_token_id", ends, f"no token of the vocabulary, whose embedding has {rows} rows; correct it"


def rotary_complaints(config: Any) -> Iterator[tuple[str, Any, str]]:
    """About rotary positions: transformers' functions are tried on what the configuration says."""
    parameters = config.rope_parameters
    for kind, values in rotary_parameters(config):
        key = f"rope_parameters.{kind}" if kind else "rope_parameters"
        part = values.get("partial_rotary_factor")
        if part is not None and not (is_number(part, above=0) and part <= 1):
            yield f"{key}.partial_rotary_factor", part, "must be above 0 and at most 1; correct it"
            return
        if config.model_type not in PARTLY_ROTATED and part not in (None, 1):
            yield "partial_rotary_factor", part, (
                f"transformers' {ARCHITECTURES[config.model_type]} rotates whole heads and vLLM's a part of them; use a "
                "model of another family"
            )
            return
        if not is_number(values.get("rope_theta"), above=0):
            yield f"{key}.rope_theta", values.get("rope_theta"), "must be a number above 0; correct it"
            return
    try:
        found = frequencies(config, 1) | {prefixed(kind, "long"): pair for kind, pair in frequencies(config).items()}
    except Exception as error:  # whatever transformers' functions make of a stranger's numbers
        yield "rope_parameters", parameters, f"no rotary frequencies follow from it ({type(error).__name__}: {error}); " + (
            "correct it"
        )
        return
    widths = {rotated(config, values) for _, values in rotary_parameters(config)}
    for inverse, scaling in found.values():
        usable = bool(inverse.isfinite().all()) and bool((inverse >= 0).all()) and is_number(scaling, above=0)
        if not usable or 2 * len(inverse) not in widths:
            yield "rope_parameters", parameters, "the rotary frequencies that follow from it are not usable; correct it"
            return


def settle(config: Any) -> list[str]:
    """Set in `config` what has to be the same for both graphs, and say, a sentence each, what is not obeyed."""
    notices = []
    for key in DROPOUTS:
        if getattr(config, key, None):
            notices.append(
                f"the model's {key} = {getattr(config, key)} is not applied: completions are sampled without dropout, and "
                "trained on as they were sampled (lora_dropout acts on the adapter alone)"
            )
            setattr(config, key, 0.0)
    for key, value in WITHOUT_EFFECT.items():
        setattr(config, key, value)
    strange = sorted(set(config.to_dict()) - own_keys(config) - base_keys() - OLD_SPELLINGS)
    if strange := [key for key in strange if not key.startswith(("_", "unsloth_"))]:
        notices.append(
            f"keys of the model's configuration that transformers' {type(config).__name__} does not have are not used: "
            f"{', '.join(strange)}"
        )
    for _, values in rotary_parameters(config):
        original = values.get("original_max_position_embeddings")
        if values.get("rope_type") == "longrope" and original is not None:
            notices.append(
                f"the model has rotary factors for sequences of at most {original:,} tokens and others for longer ones: "
                "all sequences get those of the longest that the configuration allows"
            )
    return notices


def served_values(config: Any) -> dict[str, Any]:
    """The configuration that vLLM gets: the family's keys with the rotary scaling left to `rope.share_positions`."""
    kept = own_keys(config) | {"head_dim"}
    values = {key: value for key, value in config.to_dict().items() if key in kept}
    return values | {
        "model_type": config.model_type,
        "architectures": [ARCHITECTURES[config.model_type]],
        "rope_parameters": plain_parameters(config),
    }


def own_keys(config: Any) -> set[str]:
    """The keys that transformers' class of `config` adds to those of all models."""
    return (set(type(config)().to_dict()) - base_keys()) | {"tie_word_embeddings"}


def base_keys() -> set[str]:
    """The keys that transformers' configurations of all models have."""
    from transformers import PretrainedConfig

    return set(PretrainedConfig().to_dict()) | set(WITHOUT_EFFECT) | {"use_cache"}


def is_number(value: Any, above: float) -> bool:
    """Whether it is a finite number above `above`."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > above


def either(names: tuple[str, ...]) -> str:
    return " or ".join(map(repr, names))


def shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 120 else f"{text[:120]}..."
