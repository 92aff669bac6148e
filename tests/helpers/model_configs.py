"""Configurations of tiny models of every supported family, with every key varied that transformers' class has.

Some values no model has, some only transformers computes: whoever draws one expects equal logprobs or a sentence.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from tests.helpers.tiny import COMMON, FAMILIES, VOCABULARY

LONGEST = 48
"""Tokens of a sequence, in what the tests do with these models."""
HALF_HEAD = 16
"""Rotary frequencies of a head of 32."""

FACTORS = st.lists(st.sampled_from([0.5, 1.0, 1.5, 4.0, 20.0]), min_size=HALF_HEAD, max_size=HALF_HEAD)
ORIGINAL = st.sampled_from([16, 32, 64, 256])
PART = st.sampled_from([None, None, None, 1.0, 0.5, 0.75, 0.0, 2.0])


def rotary(**entries: Any) -> st.SearchStrategy[dict[str, Any]]:
    """`rope_parameters` with some of `entries` and a base, some of a part of the head."""
    common = {"rope_theta": st.sampled_from([10000.0, 500.0, 1e6, 0])}
    full = st.fixed_dictionaries(entries | common, optional={"partial_rotary_factor": PART})
    return full.map(lambda found: {key: value for key, value in found.items() if value is not None})


def kind(name: str) -> st.SearchStrategy[str]:
    return st.just(name)


SCALE = st.sampled_from([1.0, 2.0, 4.0, 8, 0])
ROPE = st.one_of(
    rotary(),
    rotary(rope_type=kind("linear"), factor=SCALE),
    rotary(rope_type=kind("dynamic"), factor=SCALE),
    rotary(
        rope_type=kind("yarn"),
        factor=SCALE,
        original_max_position_embeddings=ORIGINAL,
        attention_factor=st.sampled_from([None, 1.0, 1.3]),
        beta_fast=st.sampled_from([None, 16]),
        mscale=st.sampled_from([None, 0.7]),
        mscale_all_dim=st.sampled_from([None, 0.9]),
        truncate=st.sampled_from([None, False]),
    ),
    rotary(
        rope_type=kind("llama3"),
        factor=SCALE,
        original_max_position_embeddings=ORIGINAL,
        low_freq_factor=st.sampled_from([1.0, 2.0]),
        high_freq_factor=st.sampled_from([4.0, 2.0]),
    ),
    rotary(
        rope_type=kind("longrope"),
        short_factor=FACTORS,
        long_factor=FACTORS,
        original_max_position_embeddings=ORIGINAL,
        attention_factor=st.sampled_from([None, 1.2]),
        factor=st.sampled_from([None, 2.0]),
    ),
    rotary(rope_type=kind("proportional")),
    rotary(rope_type=kind("unheard-of")),
)
OF_EACH_TYPE = st.fixed_dictionaries({}, optional={"full_attention": ROPE, "sliding_attention": ROPE})
ACTIVATION = st.sampled_from(["silu", "gelu", "gelu_pytorch_tanh", "relu", "swish"])
CAP = st.sampled_from([None, 3.0, 20.0, 0.0])
DROPOUT = st.sampled_from([0.0, 0.1])
LAYER_TYPE = st.sampled_from(["full_attention", "sliding_attention"])
BOOLEAN = st.booleans()
TOKEN = st.sampled_from([None, 1, VOCABULARY - 1, VOCABULARY])

VALUES: dict[str, st.SearchStrategy[Any]] = {
    "attention_bias": BOOLEAN,
    "mlp_bias": BOOLEAN,
    "attention_dropout": DROPOUT,
    "embd_pdrop": DROPOUT,
    "resid_pdrop": DROPOUT,
    "attn_logit_softcapping": CAP,
    "final_logit_softcapping": CAP,
    "bos_token_id": TOKEN,
    "eos_token_id": st.one_of(TOKEN, st.just([1, 3])),
    "pad_token_id": TOKEN,
    "head_dim": st.sampled_from([32, 64]),
    "hidden_act": ACTIVATION,
    "hidden_activation": ACTIVATION,
    "hidden_size": st.sampled_from([64, 128]),
    "intermediate_size": st.sampled_from([64, 192]),
    "num_hidden_layers": st.sampled_from([1, 2, 3]),
    "num_attention_heads": st.sampled_from([2, 4]),
    "num_key_value_heads": st.sampled_from([1, 2]),
    "vocab_size": st.sampled_from([VOCABULARY]),
    "initializer_range": st.sampled_from([0.01, 0.5]),
    "layer_types": st.lists(LAYER_TYPE, min_size=1, max_size=3),
    "max_position_embeddings": st.sampled_from([LONGEST, 256]),
    "original_max_position_embeddings": ORIGINAL,
    "max_window_layers": st.sampled_from([0, 1, 28]),
    "pretraining_tp": st.sampled_from([1, 2]),
    "query_pre_attn_scalar": st.sampled_from([1, 32, 64, 0]),
    "rms_norm_eps": st.sampled_from([1e-6, 1e-2, 0.0, -1.0]),
    "rope_parameters": st.one_of(ROPE, OF_EACH_TYPE),
    "sliding_window": st.sampled_from([None, 1, 8, 16, 0]),
    "_sliding_window_pattern": st.sampled_from([1, 2, 6]),
    "tie_word_embeddings": BOOLEAN,
    "use_bidirectional_attention": st.sampled_from([None, False, True]),
    "use_sliding_window": BOOLEAN,
}
"""Every key of the supported families' classes -> values to try."""

OF_ALL_MODELS: dict[str, st.SearchStrategy[Any]] = {
    "output_hidden_states": BOOLEAN,
    "output_attentions": BOOLEAN,
    "return_dict": BOOLEAN,
    "use_cache": BOOLEAN,
    "is_encoder_decoder": BOOLEAN,
    "chunk_size_feed_forward": st.sampled_from([0, 2]),
    "dtype": st.sampled_from(["float16", "float32"]),
    "problem_type": st.sampled_from([None, "regression"]),
    "is_causal": BOOLEAN,
}
UNHEARD_OF: dict[str, st.SearchStrategy[Any]] = {
    "logit_scale": st.just(0.5),
    "bias": st.just(True),
    "qkv_bias": st.just(True),
    "qk_norm": st.just(True),
    "llama_4_scaling": st.just({"original_max_position_embeddings": 4, "beta": 0.1}),
    "attn_temperature_tuning": st.just(True),
    "invented": st.just([1, 2]),
}
"""Keys of other families' classes and of none: some are read by vLLM's code of ours."""


@st.composite
def configurations(draw: Any) -> tuple[str, dict[str, Any]]:
    """(family, what config.json says): a tiny model with a few keys changed."""
    from transformers import AutoConfig

    from grpo.model.config_keys import own_keys

    family = draw(st.sampled_from(sorted(FAMILIES)))
    own = own_keys(AutoConfig.for_model(family))
    keys = draw(st.lists(st.sampled_from(sorted(own)), min_size=2, max_size=4, unique=True))
    if draw(st.booleans()):
        keys.append("rope_parameters")
    changes = {key: draw(VALUES[key]) for key in keys}
    for others in (OF_ALL_MODELS, UNHEARD_OF, VALUES):
        if draw(st.integers(0, 4)) == 4:
            key = draw(st.sampled_from(sorted(others)))
            changes.setdefault(key, draw(others[key]))
    if "_sliding_window_pattern" in changes:
        changes["sliding_window_pattern"] = changes.pop("_sliding_window_pattern")
    if draw(st.booleans()):
        changes = old_spelling(changes)
    return family, {"model_type": family, **COMMON, **FAMILIES[family], **changes}


def old_spelling(changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` with the rotary scaling as most published models have it."""
    parameters = dict(changes.get("rope_parameters", {}))
    if "rope_theta" not in parameters:
        return changes
    rest = {key: value for key, value in changes.items() if key != "rope_parameters"}
    rest["rope_theta"] = parameters.pop("rope_theta")
    if "partial_rotary_factor" in parameters:
        rest["partial_rotary_factor"] = parameters.pop("partial_rotary_factor")
    return rest | ({"rope_scaling": parameters} if parameters else {})


def save_model(folder: Path, family: str, values: dict[str, Any]) -> Any:
    """Write a random model of `values` to `folder` and return it: transformers', or None where that builds none."""
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    torch.manual_seed(0)
    try:
        config = AutoConfig.from_pretrained(folder)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    except Exception:  # whatever transformers' checks raise
        save_file({"model.embed_tokens.weight": torch.zeros(2, 2)}, folder / "model.safetensors")
        return None
    config.return_dict = model.config.return_dict = True  # without it transformers' own model does not run
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            wide, middle = (0.2, 1) if "norm" in name else (0.5 if "embed" in name or "lm_head" in name else 0.12, 0)
            parameter.copy_(torch.randn_like(parameter) * wide + middle)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    save_file(tensors, folder / "model.safetensors")
    return model
