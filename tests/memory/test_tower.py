"""grpo/memory/tower.py: a tower's bytes by arithmetic are those of transformers' module, and a plan has them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from grpo.config.schema import Config, parse_config
from grpo.memory.fit import check_memory
from grpo.memory.plan import Shape, plan_memory
from grpo.memory.shapes import model_shape, model_tower
from grpo.memory.summary import memory_plan
from grpo.memory.tower import TowerSizes
from grpo.model.vision import Vision, tower_shapes
from tests.helpers.seeing import SEEING, TOKENS

QWEN_3B: dict[str, Any] = {
    "model_type": "qwen2_5_vl",
    "text_config": {
        "model_type": "qwen2_5_vl_text",
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 2048,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
}
"""The sizes of Qwen2.5-VL-3B."""


def config(name: str = "any", **sections: Any) -> Config:
    values: dict[str, Any] = {
        "model": {"name": name, "images": True},
        "task": {"name": "arithmetic"},
        "rollout": {"max_prompt_length": 1024, "prompts_per_step": 16},
    }
    for section, keys in sections.items():
        values[section] = values.get(section, {}) | keys
    return parse_config(values)


@pytest.mark.parametrize("family", [*SEEING, "qwen2_5_vl 3b"])
def test_parameters_of_a_tower_are_those_of_transformers_module(family: str) -> None:
    values = {**SEEING, "qwen2_5_vl 3b": QWEN_3B}[family]
    whole = AutoConfig.for_model(
        family.split()[0], **{key: value for key, value in values.items() if key != "model_type"}, **TOKENS
    )
    whole.text_config.rope_parameters = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    shapes = tower_shapes(Vision.of(whole, "here"))
    sizes = TowerSizes.of(whole.vision_config.to_dict())
    assert sizes.parameters() == sum(map(math.prod, shapes.values()))
    assert sizes.out in next(reversed(shapes.values()))
    assert TowerSizes.of(whole.to_dict()["vision_config"]) == sizes


def test_a_plan_has_the_tower_and_what_images_take(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN_3B))
    settings, shape = config(str(tmp_path)), Shape.of(QWEN_3B)
    tower = model_tower(settings.model)
    assert model_shape(settings.model) == shape and tower is not None
    plain, seeing = (plan_memory(settings, shape, 2, on_gpu=True, tower=each) for each in (None, tower))
    assert seeing.tower == tower.weight_bytes(2) == pytest.approx(1.34e9, rel=0.01)
    assert seeing.always - plain.always == seeing.tower + seeing.images
    assert all(seeing.peaks[mode] > peak for mode, peak in plain.peaks.items())
    moved = plan_memory(config(model={"offload_tower": True}), shape, 2, on_gpu=True, tower=tower)
    assert (moved.tower, moved.host) == (0, seeing.tower)
    assert model_tower(config(str(tmp_path), model={"images": False}).model) is None


def test_a_gpu_without_room_for_the_tower_is_told_to_offload_it() -> None:
    shape, tower = Shape.of(QWEN_3B), TowerSizes.of({**QWEN_3B["vision_config"], "depth": 160})
    rollout = {"max_completion_length": 64, "max_prompt_length": 64, "max_num_seqs": 4}
    tight = config(rollout=rollout, train={"tokens_per_micro_batch": 256})
    free = 9_000_000_000
    with pytest.raises(Exception, match=r"vision tower 6\.4, .*; set model.offload_tower = true"):
        check_memory(tight, shape, 2, free, free, tower=tower)
    assert check_memory(tight, shape, 2, free, free)


def test_a_dry_run_has_a_line_for_the_tower(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN_3B))
    device = {"device": "cpu"}
    lines = memory_plan(config(str(tmp_path), model=device))
    assert sum("vision tower" in line for line in lines) == 1
    assert not any(
        "vision tower" in line for line in memory_plan(config(str(tmp_path), model=device | {"images": False}))
    )
    del (blind := json.loads(json.dumps(QWEN_3B)))["vision_config"]
    (tmp_path / "config.json").write_text(json.dumps(blind))
    assert "tower" in memory_plan(config(str(tmp_path), model=device))[0]


def test_a_decoder_is_planned_as_the_family_that_computes_it() -> None:
    text = {
        "model_type": "qwen2_5_vl_text", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "vocab_size": 100,
    }  # fmt: skip
    assert Shape.of({"model_type": "qwen2_5_vl", "text_config": text}).model_type == "qwen2"
