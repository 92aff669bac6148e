"""Every argument of the libraries that people come from is taken, or answered with what to write instead."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import runpy
from typing import Any

import peft
import pytest
import transformers
import trl
from hypothesis import given
from hypothesis import strategies as st

import grpo
from grpo.api.keywords import SECTIONS, keys_of, tables_of
from grpo.api.loaded_policy import GENERATION_ARGUMENTS, LoadedPolicy, generation_arguments
from grpo.config.familiar_names import (
    ALWAYS_SO,
    ATTRIBUTES,
    CLASSES,
    INSTEAD,
    RENAMED,
    VALUES,
    NotHere,
    adapter_table,
    ours,
)
from grpo.config.schema import parse_config
from grpo.errors import UserError
from tests.helpers.paths import ROOT

OURS = {key for section in (*SECTIONS, "lora", "eval") for key in keys_of(section)} | {
    "model",
    "task",
    "rewards",
    "lora",
}
KNOWN = OURS | set(RENAMED) | set(ALWAYS_SO) | set(INSTEAD) | set(VALUES) | set(GENERATION_ARGUMENTS)

UNSLOTH = """model_name max_seq_length dtype load_in_4bit load_in_8bit load_in_16bit load_in_fp8 full_finetuning token
device_map rope_scaling fix_tokenizer trust_remote_code use_gradient_checkpointing resize_model_vocab revision
use_exact_model_name offload_embedding float32_mixed_precision local_files_only fast_inference gpu_memory_utilization
max_lora_rank float8_kv_cache disable_log_stats random_state unsloth_vllm_standby max_loras use_async use_engine
enforce_eager enable_prefix_caching compilation_config conservativeness max_logprobs max_num_seqs
max_num_batched_tokens return_args training r target_modules lora_alpha lora_dropout bias layers_to_transform
layers_pattern finetune_last_n_layers use_rslora modules_to_save init_lora_weights loftq_config use_dora
target_parameters ensure_weight_tying offload_layers checkpoint_skip_layers qat_scheme vllm_sampling_params
auto_model device_map_planner_kwargs fullgraph return_logits text_only unsloth_force_compile whisper_language
whisper_task on_model_resolved num_labels model_patcher tokenizer_name tokenizer_revision task_type
finetune_vision_layers finetune_language_layers finetune_audio_layers finetune_attention_modules finetune_mlp_modules
unsloth_num_chunks unsloth_logit_chunk_multiplier unsloth_grpo_mini_batch sampling_params lora_request""".split()
"""Arguments of its from_pretrained, get_peft_model and fast_generate, and what it adds to GRPOConfig (2026.10.9)."""


def fields(kind: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def parameters(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in ("self", "kwargs")]


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(fields(trl.GRPOConfig), id="GRPOConfig"),
        pytest.param(fields(transformers.TrainingArguments), id="TrainingArguments"),
        pytest.param(parameters(trl.GRPOTrainer.__init__), id="GRPOTrainer"),
        pytest.param(UNSLOTH, id="Unsloth"),
    ],
)
def test_every_argument_of_the_others_is_known(names: list[str]) -> None:
    assert not set(names) - KNOWN


def test_what_is_renamed_exists_here() -> None:
    assert set(RENAMED.values()) <= OURS | set(GENERATION_ARGUMENTS)
    assert not (set(RENAMED) | set(INSTEAD)) & (OURS - {"r", "bias", *keys_of("lora")})


@given(
    st.sampled_from(sorted(KNOWN)), st.sampled_from([None, True, False, 0, 1, 7, 0.3, "auto", "x", [1], {}, object()])
)
def test_a_call_is_taken_or_ends_with_a_sentence(name: str, value: Any) -> None:
    sections = tuple(section for section in SECTIONS if section != "model") + ("eval", "environment")
    try:
        tables_of(ours({name: value}, "policy.train"), "policy.train", sections, ("task", "rewards"))
    except UserError as error:
        assert str(error).startswith("policy.train: ") and name in str(error) or name in RENAMED or name in VALUES


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"model_name": "m", "fast_inference": True, "max_seq_length": 512}, {"model": "m", "max_seq_length": 512}),
        ({"dtype": None, "load_in_16bit": True}, {"dtype": "auto", "load_in_4bit": False}),
        ({"use_gradient_checkpointing": "unsloth"}, {"gradient_checkpointing": "offload"}),
        ({"random_state": 3407, "warmup_steps": 0}, {"seed": 3407}),
        ({"warmup_steps": 0.1}, {"warmup_ratio": 0.1}),
        ({"use_vllm": True, "vllm_mode": "colocate", "report_to": "none", "beta": 0.04}, {"beta": 0.04}),
        ({"optim": "adamw_torch", "scale_rewards": False, "bf16": True, "fp16": False},
         {"optim": "adamw", "scale_rewards": "none", "dtype": "bfloat16"}),
    ],
)  # fmt: skip
def test_what_means_the_same_is_taken(given: dict[str, Any], expected: dict[str, Any]) -> None:
    assert ours(given, "grpo.load") == expected


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4, "num_generations": 8},
            "here prompts_per_step=4",
        ),
        ({"per_device_train_batch_size": 8}, "here prompts_per_step=1"),
        ({"generation_batch_size": 64, "num_generations": 4}, "here prompts_per_step=16"),
        ({"warmup_steps": 20}, "write warmup_ratio with the share of the steps"),
        ({"warmup_steps": 0.1, "warmup_ratio": 0.1}, "warmup_steps and warmup_ratio are the same setting"),
        ({"overwrite_output_dir": True}, "a run folder is never overwritten"),
        ({"per_gpu_train_batch_size": 8}, "prompts_per_step"),
        ({"model_name": "a", "model": "b"}, "model_name and model are the same setting"),
        ({"args": {"beta": 1}}, "pass the settings themselves"),
        ({"peft_config": peft.LoraConfig()}, "decided at loading"),
    ],
)
def test_what_means_something_else_is_explained(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match="^policy.train: ") as error:
        ours(given, "policy.train")
    assert words in str(error.value)


def look(at: str) -> str:
    """Look.

    Args:
        at: what at
    """
    return at


class Game:
    """A TRL environment, for its name."""


@pytest.mark.parametrize(
    ("given", "environment"),
    [
        ({"tools": [look]}, {"tools": [look], "max_turns": 512, "max_turn_tokens": 512}),
        ({"environment_factory": Game, "max_completion_length": 99},
         {"factory": Game, "max_turns": 99, "max_turn_tokens": 99}),
        ({"tools": [look], "max_tool_calling_iterations": 3, "max_completion_length": 99},
         {"tools": [look], "max_turns": 4, "max_turn_tokens": 99}),
        ({"environment": {"tools": ["a:b"]}, "max_tool_calling_iterations": 0}, {"tools": ["a:b"], "max_turns": 1}),
        ({"tools": [], "environment_factory": None, "max_tool_calling_iterations": None}, None),
        ({"tools": None, "environment": {"program": "a.py:b"}}, {"program": "a.py:b"}),
    ],
)  # fmt: skip
def test_trls_tools_and_environments_are_the_environment(given: dict[str, Any], environment: Any) -> None:
    assert ours(given, "policy.train").get("environment") == environment


def test_a_grpo_config_brings_its_calls_to_the_tools() -> None:
    arguments = trl.GRPOConfig(output_dir="x", max_tool_calling_iterations=2, max_completion_length=64, use_cpu=True)
    found = ours({"args": arguments, "tools": [look]}, "policy.train")
    assert found["environment"] == {"tools": [look], "max_turns": 3, "max_turn_tokens": 64}
    assert "max_tool_calling_iterations" not in found and "tools" not in found


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tools": [look], "environment_factory": Game}, "tools and environment_factory are each an environment"),
        ({"tools": [look], "environment": {}}, "tools and environment are each an environment"),
        ({"max_tool_calling_iterations": 4}, "is for tools or environment_factory; pass one of them"),
        ({"tools": [look], "max_tool_calling_iterations": "4"}, "must be a whole number of at least 0"),
        ({"rollout_func": look}, 'write the same loop as environment={"program": ...}'),
    ],
)
def test_episodes_that_cannot_be_meant_are_explained(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match="^policy.train: ") as error:
        ours(given, "policy.train")
    assert words in str(error.value)


def test_loading_takes_no_tools() -> None:
    with pytest.raises(UserError, match="^grpo.load: tools=.*: pass it to policy.train, where it is environment="):
        ours({"tools": [look]}, "grpo.load")


def test_a_grpo_config_gives_what_it_sets(tmp_path: Any) -> None:
    arguments = trl.GRPOConfig(
        output_dir=str(tmp_path), learning_rate=5e-6, max_steps=250, lr_scheduler_type="cosine", beta=0.04,
        num_generations=8, max_completion_length=128, use_vllm=True, optim="adamw_8bit", report_to="none",
        logging_steps=1, use_cpu=True,
    )  # fmt: skip
    assert ours({"args": arguments, "reward_funcs": [len]}, "policy.train") == {
        "output_dir": str(tmp_path), "learning_rate": 5e-6, "max_steps": 250, "lr_scheduler_type": "cosine",
        "beta": 0.04, "max_completion_length": 128, "optim": "adamw_8bit", "rewards": [len],
    }  # fmt: skip


def test_pefts_configuration_is_an_adapters_shape() -> None:
    lora = peft.LoraConfig(r=32, lora_alpha=64, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    assert adapter_table(lora) == {"r": 32, "lora_alpha": 64, "target_modules": ["q_proj", "v_proj"]}
    with pytest.raises(UserError, match="must be a dict"):
        adapter_table(16)


def test_generations_names() -> None:
    assert generation_arguments({"max_new_tokens": 5, "do_sample": True}) == {"max_tokens": 5}
    for name, words in {
        "sampling_params": "pass temperature",
        "top_p_": "did you mean 'top_p'",
        "zzz": "there are",
    }.items():
        with pytest.raises(UserError, match="^policy.generate: ") as error:
            generation_arguments({name: 1})
        assert words in str(error.value)


def test_a_copied_cell_is_told_the_line_to_write() -> None:
    with pytest.raises(UserError, match="which model"):
        grpo.load()
    with pytest.raises(UserError, match=r"max_lora_rank=64: the rank is that of the adapter; write lora"):
        grpo.load(model_name="m", max_lora_rank=64)
    for name in CLASSES:
        with pytest.raises(UserError, match=f"grpo has no {name}: [a-zT]"):
            getattr(grpo, name)
    policy = LoadedPolicy.__new__(LoadedPolicy)
    with pytest.raises(UserError, match="one policy"):
        _model, _tokenizer = policy
    for name in ATTRIBUTES:
        with pytest.raises(NotHere, match=name):
            getattr(policy, name)
        assert not hasattr(policy, name)
    with pytest.raises(AttributeError, match="no attribute 'zzz'"):
        policy.zzz  # noqa: B018


# The pages


PAGES = ("trl", "unsloth")


def calls(page: str, function: str) -> list[dict[str, ast.expr]]:
    """The keywords of every call of `function` in the page's Python."""
    trees = [ast.parse(block) for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL)]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [
        {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg}
        for node in nodes
        if ast.unparse(node.func) == function
    ]


@pytest.mark.parametrize("name", PAGES)
def test_the_others_code_uses_their_own_arguments(name: str) -> None:
    page = (ROOT / f"docs/coming-from-{name}.md").read_text()
    (configuration,) = calls(page, "GRPOConfig")
    assert set(configuration) <= set(fields(trl.GRPOConfig)) | {"warmup_ratio"}, "which Unsloth moves to warmup_steps"
    for trainer in calls(page, "GRPOTrainer"):
        assert set(trainer) <= set(parameters(trl.GRPOTrainer.__init__))
    for function in ("FastLanguageModel.from_pretrained", "FastLanguageModel.get_peft_model"):
        assert all(set(call) <= set(UNSLOTH) for call in calls(page, function))


@pytest.mark.parametrize("name", PAGES)
def test_our_code_on_those_pages_makes_a_configuration(name: str) -> None:
    page = (ROOT / f"docs/coming-from-{name}.md").read_text()
    (load,), (train,) = calls(page, "grpo.load"), calls(page, "policy.train")
    settings = {
        key: ast.literal_eval(value) for call in (load, train) for key, value in call.items() if key != "rewards"
    }
    tables = tables_of({key: value for key, value in settings.items() if key != "lora"}, name, (*SECTIONS, "eval"))
    tables["model"]["name"] = "m"
    config = parse_config({**tables, "lora": settings["lora"], "task": {"name": "arithmetic"}}, name)
    assert config.rollout.num_generations == 8 and config.train.max_steps in (100, 250)


def test_the_page_of_names_is_up_to_date() -> None:
    page = runpy.run_path(str(ROOT / "docs/make_names.py"))["page"]
    assert (ROOT / "docs/names.md").read_text() == page(), "run make docs"
