"""Random peft LoraConfigs of every kind that users save, on tiny models; whoever draws one may get one peft refuses."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

NAMES = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj", "gate_up_proj",
    "self_attn.q_proj", "layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj", "1.mlp.up_proj", "c_attn",
)  # fmt: skip
BEYOND = ("lm_head", "embed_tokens", "mlp", "input_layernorm", "proj")
WHOLE_PATTERNS = (
    r".*q_proj", r".*\.(q|v|o)_proj", r"model\.layers\.0\..*_proj", r".*(up|down)_proj$",
    r".*layers\.[1-9]\.mlp\..*_proj",
    r".*", "q_proj", "all-linear", "ALL-LINEAR", r".*lm_head|.*o_proj", r".*(?<!q)_proj", "",
)  # fmt: skip
END_PATTERNS = (
    "q_proj", "self_attn.q_proj", "layers.0.self_attn.o_proj", r"layers\.[01]\.mlp\..*", "proj", ".*_proj", "nothing",
    "^o_proj", r"model\.layers\.1\..*", "q_proj|v_proj", "layers.1.mlp.down_proj", r"[kv]_proj", "(",
)  # fmt: skip
SELDOM: tuple[dict[str, Any], ...] = (
    {"use_dora": True}, {"lora_bias": True}, {"bias": "all"}, {"bias": "lora_only"}, {"modules_to_save": ["lm_head"]},
    {"modules_to_save": ["norm"]}, {"trainable_token_indices": [1, 2]}, {"layer_replication": [(0, 2), (1, 2)]},
    {"fan_in_fan_out": True}, {"alora_invocation_tokens": [5]}, {"use_qalora": True}, {"ensure_weight_tying": True},
    {"task_type": None}, {"task_type": "SEQ_CLS"}, {"task_type": "FEATURE_EXTRACTION"}, {"inference_mode": True},
    {"velora_config": {}}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "pissa_niter_2"},
    {"init_lora_weights": "olora"}, {"init_lora_weights": "orthogonal"}, {"init_lora_weights": "mica"},
    {"init_lora_weights": "gaussian"}, {"init_lora_weights": "eva"}, {"init_lora_weights": False},
    {"target_parameters": ["self_attn.q_proj.weight"], "target_modules": []}, {"megatron_config": {"a": 1}},
    {"qalora_group_size": 8}, {"megatron_core": "elsewhere"}, {"revision": "main"}, {"lora_alpha": 0}, {"r": 600},
    {"lora_alpha": -3}, {"rank_pattern": {"q_proj": 0}}, {"alpha_pattern": {"q_proj": 0}}, {"lora_alpha": 1.5},
    {"lora_dropout": 1.0}, {"target_modules": None}, {"kasa_config": {}}, {"use_bdlora": {}},
)  # fmt: skip
"""What is added now and then to a configuration of the usual kinds."""


def some_of(values: tuple[str, ...], most: int) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(values), min_size=1, max_size=most, unique=True)


def patterns(values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(END_PATTERNS), values, max_size=3)


SHAPES = st.fixed_dictionaries(
    {"r": st.integers(1, 8), "lora_alpha": st.integers(1, 16), "use_rslora": st.booleans()},
    optional={
        "lora_dropout": st.sampled_from([0.0, 0.1]),
        "exclude_modules": st.one_of(some_of(NAMES, 3), st.sampled_from(WHOLE_PATTERNS), some_of(BEYOND, 2)),
        "rank_pattern": patterns(st.integers(1, 8)),
        "alpha_pattern": patterns(st.one_of(st.integers(1, 16), st.just(0.5))),
    },
)
BY_NAME = st.fixed_dictionaries(
    {"target_modules": st.one_of(some_of(NAMES[:7], 7), some_of((*NAMES, *BEYOND), 4))},
    optional={
        "layers_to_transform": st.sampled_from([0, 1, [0], [1], [0, 1], [5], []]),
        "layers_pattern": st.sampled_from(["layers", ["layers"], "h", ["blocks", "layers"], "lay.*", "", []]),
    },
)
BY_PATTERN = st.fixed_dictionaries({"target_modules": st.sampled_from(WHOLE_PATTERNS)})
SELDOM_ADDED = st.one_of(st.just({}), st.just({}), st.sampled_from(SELDOM))
LORA_CONFIGS: st.SearchStrategy[dict[str, Any]] = st.builds(
    lambda shape, targets, more: {"task_type": "CAUSAL_LM", **shape, **targets, **more},
    SHAPES, st.one_of(BY_NAME, BY_NAME, BY_PATTERN), SELDOM_ADDED,
)  # fmt: skip
"""Keyword arguments of a LoraConfig."""
