"""What a model's configuration may say, checked before its weights are read.

vLLM and the training graph each compute what a configuration says, and not always the same: a key that one of them has
never heard of changes the policy in silence. So every key is one that both obey (tests compare their logprobs), one of
a few values that both compute, one that has no part in the computation, or one that transformers' class does not have,
which is named in a notice and reaches neither. Anything else is refused in a sentence that names it.

For sizes see `checks.py`, for how rotary frequencies reach both graphs `rope.py`.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from grpo.errors import UserError
from grpo.model.architectures import causal_class, vllm_class
from grpo.model.attention_layers import FULL, SLIDING, attention_layers
from grpo.model.checks import check_sizes, one_line
from grpo.model.decoder_config import IMAGE_POSITIONS, DecoderConfig
from grpo.model.families.table import family_of
from grpo.model.rope import (
    by_layer_type,
    frequencies,
    head_size,
    part_rotated,
    plain_parameters,
    rotary_parameters,
    rotated,
    unknown_parameters,
    unread_parameters,
)

LAYER_TYPES = (FULL, SLIDING)
LAST_PRODUCTS = (".o_proj", ".dense", ".out_proj")
"""What families call the product at the end of attention."""

WITHOUT_EFFECT = {"output_hidden_states": False, "output_attentions": False, "return_dict": True}
"""How transformers' models answer; we ask for what we need."""
OF_IMAGES = "vision"
"""Value of `use_bidirectional_attention` with which tokens of images see each other, and those of text are causal."""
OLD_SPELLINGS = {
    "rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor", "sliding_window_pattern", "head_dim",
    "is_causal", "layer_types", "hidden_activation", "torch_dtype", "quantization_config", "architectures",
    "model_type", "transformers_version",
}  # fmt: skip
"""Keys that transformers' classes do not list and that are read nonetheless, or checked here."""

TOKENS = {f"{name}_token_id" for name in ("unk", "cls", "sep", "mask")}
"""The tokenizer's business, which a GGUF file's metadata bring along: no graph reads them."""


class Complaint(NamedTuple):
    """A key that the two graphs would not compute alike."""

    key: str
    value: Any
    reason: str
    """What is wrong with the value, and what to do."""


def check_keys(config: DecoderConfig, where: str) -> None:
    """Raise UserError, naming file and key, unless both graphs compute what `config` says.

    config: transformers', of a text model; `where`: its model's folder or file.
    """
    file = str(Path(where) / "config.json") if Path(where).is_dir() else where
    check_sizes(config.to_dict(), Path(file))  # what config.json leaves out has values of transformers' class
    for key, value, reason in complaints(config):
        raise UserError(f"{file}: {key} = {shown(value)}: {reason}")


def complaints(config: DecoderConfig) -> Iterator[Complaint]:
    """What `check_keys` refuses, the most telling first."""
    yield from attention_complaints(config)
    yield from fixed_complaints(config)
    yield from activation_complaints(config)
    yield from layer_complaints(config)
    yield from number_complaints(config)
    yield from token_complaints(config)
    yield from rotary_complaints(config)
    yield from product_complaints(config)


def attention_complaints(config: DecoderConfig) -> Iterator[Complaint]:
    """About who sees whom, and heads."""
    if getattr(config, "is_heterogeneous", False) and not family_of(config.model_type).layers_differ:
        yield Complaint("per_layer_config", "...", "layers that differ in shape are not served; use a model without it")
    causal = "completions are sampled left to right; use a causal model"
    if (both_ways := getattr(config, "use_bidirectional_attention", None)) not in (None, False, OF_IMAGES):
        yield Complaint("use_bidirectional_attention", both_ways, causal)
    if getattr(config, "is_causal", True) is False:
        yield Complaint("is_causal", False, causal)
    if family_of(config.model_type).always_tied and not config.tie_word_embeddings:
        reason = f"the output head of {vllms(config)} is always the embedding; use a model whose weights are tied"
        yield Complaint("tie_word_embeddings", False, reason)
    derived = config.hidden_size // config.num_attention_heads
    if family_of(config.model_type).head_of_hidden_size and (head := head_size(config)) != derived:
        yield Complaint("head_dim", head, f"{vllms(config)} has heads of {derived}; use another model")


def product_complaints(config: DecoderConfig) -> Iterator[Complaint]:
    """About heads that together are not as wide as the product behind them in transformers' graph: then one of the
    two is not of the size that the configuration says, and vLLM's is."""
    from grpo.model.meta_graph import graph_tensors

    try:
        linears = graph_tensors(config).linears
    except UserError:  # which is said where the graph is built
        return
    for number, layer in attention_layers(config).items():
        within, width = f"model.layers.{number}.self_attn", layer.query_heads * layer.head_size
        for name in (f"{within}{last}" for last in LAST_PRODUCTS):
            if name in linears and linears[name].columns != width:
                reason = (
                    f"transformers' {causal_class(config.model_type)} has a product of {linears[name].columns} numbers "
                    f"behind {layer.query_heads} heads, which have {width}"
                )
                yield Complaint("head_dim", layer.head_size, f"{reason}; use another model")
                return


def fixed_complaints(config: DecoderConfig) -> Iterator[Complaint]:
    """About keys that vLLM takes for granted."""
    for key, granted in family_of(config.model_type).taken_for_granted.items():
        if (value := getattr(config, key)) != granted:
            yield Complaint(key, value, f"{vllms(config)} computes with {shown(granted)}; use another model")


def activation_complaints(config: DecoderConfig) -> Iterator[Complaint]:
    """About the MLP's activation."""
    activation = family_of(config.model_type).activation
    if activation is None:
        return
    key, known = activation
    value, legacy = getattr(config, key), getattr(config, "hidden_activation", None)
    if value not in known:
        computed = " or ".join(map(repr, known))
        remedy = "name the same function so, or use another model"
        yield Complaint(key, value, f"{vllms(config)} computes {computed} alone; {remedy}")
    if key == "hidden_act" and legacy not in (None, value):
        yield Complaint("hidden_activation", legacy, f"hidden_act is {value!r}; remove one of the two")


def layer_complaints(config: DecoderConfig) -> Iterator[Complaint]:
    """About which layers have a sliding window."""
    window, layers = getattr(config, "sliding_window", None), config.num_hidden_layers
    kinds = getattr(config, "layer_types", None)
    shared = getattr(config, "num_kv_shared_layers", None) or 0
    if shared and not set((kinds or [FULL])[:layers]) <= set((kinds or [FULL] * layers)[: max(0, layers - shared)]):
        reason = f"of the {layers} layers those have no keys of their own, and some are of a kind that none before has"
        yield Complaint("num_kv_shared_layers", shared, f"{reason}; correct it")
    if not kinds:
        return
    known = tuple(family_of(config.model_type).mixers) or LAYER_TYPES
    if len(kinds) < layers or not set(kinds) <= set(known):
        kind = " or ".join(map(repr, known))
        yield Complaint("layer_types", kinds, f"must be {kind} for each of the {layers} layers; use another model")
        return
    if not {FULL, SLIDING} & set(kinds[:layers]):
        reason = f"none of the {layers} layers has attention, and vLLM's cache is one of keys and values"
        yield Complaint("layer_types", kinds, f"{reason}; use another model")
        return
    sliding = list(kinds[:layers]).count("sliding_attention")
    if sliding and window is None:
        lacking = "sliding_window (or use_sliding_window) says that there is no window"
        yield Complaint("layer_types", kinds, f"{lacking}; set one, or make all layers full_attention")
    elif window is None and family_of(config.model_type).needs_window:
        must = "must be a number of tokens for this family, also where no layer has the window; set one"
        yield Complaint("sliding_window", None, must)
    elif family_of(config.model_type).window_in_all_or_none and 0 < sliding < layers:
        reason = f"{sliding} of {layers} layers have the window, and {vllms(config)} gives it to all or to none"
        remedy = f"set it to false, which is the same for sequences of at most {window} tokens, or use another model"
        yield Complaint("use_sliding_window", True, f"{reason}; {remedy}")
    elif family_of(config.model_type).window_in_every_other and kinds[:layers] != every_other(layers):
        reason = f"{vllms(config)} gives the window to layers 0, 2, 4 and so on"
        yield Complaint("layer_types", kinds, f"{reason}; use another model")
    elif "layer_types" not in own_keys(config) and sliding != (0 if window is None else layers):
        alike = f"transformers' {type(config).__name__} has the same attention in every layer"
        yield Complaint("layer_types", kinds, f"{alike}; remove it, or name the family that the model is of")


def every_other(layers: int) -> list[str]:
    """`layer_types` of so many layers, of which the first and every other one have a window."""
    return [LAYER_TYPES[layer % 2 == 0] for layer in range(layers)]


def number_complaints(config: DecoderConfig) -> Iterator[Complaint]:
    """About numbers that would make every value infinite or none."""
    for key in ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"):
        value = getattr(config, key, None)
        if value is not None and not is_number(value, above=0):
            yield Complaint(key, value, "must be a number above 0; correct it")
    for key in ("rms_norm_eps", "layer_norm_eps", "norm_eps"):
        value = getattr(config, key, None)
        if value is not None and not (value == 0 or is_number(value, above=0)):
            yield Complaint(key, value, "must be a number, 0 or above; correct it")
    window = getattr(config, "sliding_window", None)
    none = window == 0 and "sliding_attention" not in (getattr(config, "layer_types", None) or ["sliding_attention"])
    if window is not None and not none and (not isinstance(window, int) or window < 1):
        yield Complaint("sliding_window", window, "must be a whole number above 0, or null for none; correct it")


def token_complaints(config: DecoderConfig) -> Iterator[Complaint]:
    """About tokens that the embedding has no row for."""
    rows, pad, ends = config.vocab_size, config.pad_token_id, config.eos_token_id
    reason = f"no token of the vocabulary, whose embedding has {rows} rows"
    if pad is not None and not -rows <= pad < rows:
        yield Complaint("pad_token_id", pad, f"{reason}; set another, or null")
    of_layers = getattr(config, "vocab_size_per_layer_input", None)
    if getattr(config, "hidden_size_per_layer_input", None) and of_layers != rows:
        key = "vocab_size_per_layer_input"
        yield Complaint(key, of_layers, f"must be vocab_size, {rows}, so that every token has a row; correct it")
    for token in ends if isinstance(ends, list) else [] if ends is None else [ends]:
        if not isinstance(token, int) or not 0 <= token < rows:
            yield Complaint("eos_token_id", ends, f"{reason}; correct it")


def rotary_complaints(config: DecoderConfig) -> Iterator[Complaint]:
    """About rotary positions: transformers' functions are tried on what the configuration says."""
    for key, value in unread_parameters(config).items():
        read = "for each of its layer types" if by_layer_type(config) else "for all layers at once"
        reason = f"transformers' {type(config).__name__} has rotary parameters {read}, and does not read this"
        yield Complaint(f"rope_parameters.{key}", value, f"{reason}; correct it")
    for kind, values in rotary_parameters(config):
        key = f"rope_parameters.{kind}" if kind else "rope_parameters"
        part, theta = values.get("partial_rotary_factor"), values.get("rope_theta")
        if part is not None and not (is_number(part, above=0) and part <= 1):
            yield Complaint(f"{key}.partial_rotary_factor", part, "must be above 0 and at most 1; correct it")
        elif part_rotated(values) != 1 and rotates_whole_heads(config):
            whole = f"transformers' {causal_class(config.model_type)} rotates whole heads, vLLM's a part of them"
            yield Complaint(f"{key}.partial_rotary_factor", part, f"{whole}; use a model of another family")
        elif not is_number(theta, above=0):
            yield Complaint(f"{key}.rope_theta", theta, "must be a number above 0; correct it")
    try:
        computed = [*frequencies(config, 1).values(), *frequencies(config).values()]
    except Exception as error:  # whatever transformers' functions make of untrusted numbers
        reason = f"transformers finds no rotary frequencies in it ({type(error).__name__}: {one_line(error)})"
        yield Complaint("rope_parameters", config.rope_parameters, f"{reason}; correct it")
        return
    widths = {rotated(config, kind, values) for kind, values in rotary_parameters(config)}
    for inverse, scaling in computed:
        usable = bool(inverse.isfinite().all()) and bool((inverse >= 0).all()) and is_number(scaling, above=0)
        if not usable or 2 * len(inverse) not in widths:
            reason = "the rotary frequencies that follow are not finite, or do not fit the heads; correct it"
            yield Complaint("rope_parameters", config.rope_parameters, reason)


def rotates_whole_heads(config: DecoderConfig) -> bool:
    """Whether transformers rotates all of each head, whatever part the configuration names."""
    plain = copy.deepcopy(config)
    for _, values in rotary_parameters(plain):
        values |= {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    return all(2 * len(inverse) == head_size(config, kind) for kind, (inverse, _) in frequencies(plain, 1).items())


def normalize_config(config: DecoderConfig) -> list[str]:
    """Set in `config` what has to be the same for both graphs, and say, a sentence each, what is not obeyed."""
    notices = []
    for key, value in dropouts(config):
        notices.append(
            f"the model's {key} = {value} is not applied, because completions are sampled without dropout; "
            "lora.lora_dropout acts on the adapter"
        )
        setattr(config, key, 0.0)
    for key, value in WITHOUT_EFFECT.items():
        setattr(config, key, value)
    if getattr(config, "use_bidirectional_attention", None) == OF_IMAGES:
        config.use_bidirectional_attention = None
    strange = sorted(set(config.to_dict()) - own_keys(config) - base_keys() - OLD_SPELLINGS - TOKENS)
    if strange := [key for key in strange if not key.startswith(("_", "unsloth_"))]:
        notices.append(
            f"keys of the model's configuration that transformers' {type(config).__name__} does not have are not used: "
            f"{', '.join(strange)}"
        )
    if unknown := unknown_parameters(config):
        notices.append(
            f"entries of the model's rope_parameters that have no part in its rotary positions are not used: "
            f"{', '.join(unknown)}"
        )
    for _, values in rotary_parameters(config):
        original = values.get("original_max_position_embeddings")
        if values.get("rope_type") == "longrope" and original is not None:
            notices.append(
                f"the model has rotary factors for at most {original:,} tokens and others for more; the longest "
                "sequence that rollout and evaluation may have decides for all which are used"
            )
    return notices


def dropouts(config: DecoderConfig) -> list[tuple[str, float]]:
    """The keys of the family that ask for dropout of any kind, and what they ask for."""
    values = [(key, getattr(config, key, None)) for key in sorted(own_keys(config)) if "drop" in key]
    return [(key, value) for key, value in values if isinstance(value, float | int) and value]


def served_values(config: DecoderConfig, *, images: bool = False) -> dict[str, Any]:
    """The configuration that vLLM gets: the family's keys with the rotary scaling left to `rope.share_positions`.

    `images`: with positions in images.
    """
    keys_served = own_keys(config) | {"head_dim"}
    values = {key: value for key, value in config.to_dict().items() if key in keys_served}
    values |= {
        "model_type": config.model_type,
        "architectures": [vllm_class(config.model_type)],
        "rope_parameters": plain_parameters(config),
    }
    if images:
        values["rope_parameters"] |= {key: config.rope_parameters[key] for key in IMAGE_POSITIONS}
    served = family_of(config.model_type).served
    return values if served is None else values | served(config)


def own_keys(config: DecoderConfig) -> set[str]:
    """The keys that transformers' class of `config` adds to those of all models."""
    return (set(type(config)().to_dict()) - base_keys()) | {"tie_word_embeddings"}


def base_keys() -> set[str]:
    """The keys that transformers' configurations of all models have."""
    from transformers import PretrainedConfig

    return set(PretrainedConfig().to_dict()) | set(WITHOUT_EFFECT) | {"use_cache"}


def is_number(value: Any, above: float) -> bool:
    """Whether it is a finite number above `above`."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > above


def vllms(config: DecoderConfig) -> str:
    """vLLM's class, in a sentence."""
    return f"vLLM's {vllm_class(config.model_type)}"


def shown(value: Any) -> str:
    """A value of the configuration as the file has it, cut to a readable length."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 120 else f"{text[:120]}..."
