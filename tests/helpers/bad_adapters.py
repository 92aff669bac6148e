"""Broken adapters to start from, each with what has to be said of it."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.helpers.bad_cases import Tables, Trap, case, cut, put

# Adapters


def adapter(home: Path, shape: Tables | None = None) -> Path:
    """A good adapter of the rank and targets that the runs have, but for `shape`."""
    key = json.dumps(shape)
    if key not in ADAPTERS:
        ADAPTERS[key] = made_adapter(home, shape or {})
    (home / "adapter").mkdir()
    for name, content in ADAPTERS[key].items():
        (home / "adapter" / name).write_bytes(content)
    return home / "adapter"


ADAPTERS: dict[str, dict[str, bytes]] = {}


def made_adapter(home: Path, shape: Tables) -> dict[str, bytes]:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(home / "model")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings: Tables = {"r": 4, "lora_alpha": 8, "target_modules": targets, "task_type": "CAUSAL_LM", **shape}
    get_peft_model(model, LoraConfig(**settings)).save_pretrained(home / "peft")
    content = {file.name: file.read_bytes() for file in (home / "peft").iterdir()}
    shutil.rmtree(home / "peft")
    return content


def init(home: Path) -> Tables:
    return {"lora": {"init": str(home / "adapter")}}


@case("adapter: no adapter_config.json", "pass the folder of a peft adapter")
def an_adapter_that_does_not_exist(home: Path) -> Tables:
    return init(home)


@case("adapter_config.json: r = 8, the configuration says 4", "set lora.r = 8")
def an_adapter_of_another_rank(home: Path) -> Tables:
    adapter(home, {"r": 8})
    return init(home)


@case("adapter_config.json: lora_alpha = 16", "set lora.lora_alpha = 16")
def an_adapter_of_another_scale(home: Path) -> Tables:
    adapter(home, {"lora_alpha": 16})
    return init(home)


@case(
    'adapter_config.json: target_modules = ["q_proj"], the configuration says [', 'set lora.target_modules = ["q_proj"]'
)
def an_adapter_of_other_layers(home: Path) -> Tables:
    adapter(home, {"target_modules": ["q_proj"]})
    return init(home)


@case("adapter_config.json:1: not valid JSON")
def an_adapter_configuration_that_is_not_json(home: Path) -> Tables:
    put(adapter(home) / "adapter_config.json", "{")
    return init(home)


@case("adapter_config.json: lora_alpha is missing", "copy the adapter again")
def an_adapter_configuration_without_targets(home: Path) -> Tables:
    put(adapter(home) / "adapter_config.json", '{"peft_type": "LORA", "r": 4}')
    return init(home)


@case("no adapter_model.safetensors", "pickled adapters are never loaded")
def a_pickled_adapter(home: Path) -> Tables:
    (adapter(home) / "adapter_model.safetensors").unlink()
    put(home / "adapter" / "adapter_model.bin", pickle.dumps(Trap(home / "trapped")))
    return init(home)


@case("adapter_model.safetensors: damaged safetensors", "copy the adapter again")
def a_truncated_adapter(home: Path) -> Tables:
    cut(adapter(home) / "adapter_model.safetensors", 0.5)
    return init(home)


@case("adapter_model.safetensors: damaged safetensors")
def a_pickle_in_place_of_an_adapter(home: Path) -> Tables:
    put(adapter(home) / "adapter_model.safetensors", pickle.dumps(Trap(home / "trapped")))
    return init(home)


def edit_adapter(home: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Tables:
    file = adapter(home) / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    file.unlink()
    save_file(tensors, file)
    return init(home)


NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@case("has shape (4, 64), on this base it has (4, 128)", "name the base")
def an_adapter_of_another_base(home: Path) -> Tables:
    return edit_adapter(home, lambda tensors: tensors.update({NAME: torch.zeros(4, 64)}))


@case(f"tensor {NAME} is missing", "name the base")
def an_adapter_without_one_of_its_weights(home: Path) -> Tables:
    return edit_adapter(home, lambda tensors: tensors.pop(NAME))


@case("layers.7.", "which is no A or B of a layer", "name the base")
def an_adapter_of_a_deeper_base(home: Path) -> Tables:
    return edit_adapter(home, lambda tensors: tensors.update({NAME.replace(".0.", ".7."): torch.zeros(4, 128)}))


@case("lora.target_modules names 'c_attn'", "name some of q_proj")
def target_modules_that_do_not_exist(home: Path) -> Tables:
    return {"lora": {"target_modules": ["c_attn"]}}


@case("adapter_config.json: r = 8, the configuration says 4", "set lora.r = 8, lora.lora_alpha = 16.0, lora.use_rslora")
def an_adapter_that_differs_in_several_keys(home: Path) -> Tables:
    adapter(home, {"r": 8, "lora_alpha": 16, "use_rslora": True})
    return init(home)


@case(
    'adapter_config.json: target_modules = ".*q_proj", the configuration says [', 'set lora.target_modules = ".*q_proj"'
)
def an_adapter_on_what_a_pattern_matches(home: Path) -> Tables:
    adapter(home, {"target_modules": ".*q_proj"})
    return init(home)


@case("adapter_config.json: rank_pattern = { q_proj = 8 }, the configuration says {}", "set lora.rank_pattern")
def an_adapter_of_several_ranks(home: Path) -> Tables:
    adapter(home, {"rank_pattern": {"q_proj": 8}})
    return init(home)


@case("adapter_config.json: layers_to_transform = [1], the configuration says []", "set lora.layers_to_transform = [1]")
def an_adapter_on_some_layers(home: Path) -> Tables:
    adapter(home, {"layers_to_transform": 1})
    return init(home)


@case("adapter_config.json: use_dora = true: DoRA scales the base's weights", "merge_and_unload")
def an_adapter_with_magnitudes(home: Path) -> Tables:
    adapter(home, {"use_dora": True})
    return init(home)


@case("lora.target_modules = '.*lm_head|.*q_proj' matches lm_head", "write a narrower pattern")
def a_pattern_that_matches_the_output_head(home: Path) -> Tables:
    return {"lora": {"target_modules": ".*lm_head|.*q_proj"}}


@case("lora.target_modules = 'q_proj', with what limits it, selects no linear layer; this model has q_proj")
def a_pattern_that_matches_nothing(home: Path) -> Tables:
    return {"lora": {"target_modules": "q_proj"}}


@case("lora.alpha_pattern: 'q_proj' and 'layers.0.self_attn.q_proj' both match", "write patterns of which only one")
def patterns_of_which_the_saved_order_would_take_the_other(home: Path) -> Tables:
    return {"lora": {"alpha_pattern": {"q_proj": 2, "layers.0.self_attn.q_proj": 4}}}
