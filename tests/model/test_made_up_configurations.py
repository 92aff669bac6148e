"""Whatever a made-up config.json says, a dry run and a start plan for it, or refuse it in one sentence that names it.

Not here: whether both graphs compute what is not refused (`test_config_keys.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoConfig

import grpo.session
from grpo.config.schema import Config, parse_config
from grpo.errors import UserError
from grpo.memory.gpus import gpu_named
from grpo.model.checks import largest_head
from grpo.model.config_keys import complaints
from grpo.model.families.table import family_of, listed
from grpo.run.device_memory import check_memory
from grpo.train import dry_run
from tests.helpers.families import NEWCOMERS, TAIL, family_config
from tests.helpers.tiny import COMMON, FAMILIES

ALL: dict[str, dict[str, Any]] = {**FAMILIES, **NEWCOMERS, **TAIL}
HYBRID = [family for family in ALL if family_of(family).mixers]
STRANGE = [
    0, -1, 1, 2, 3, 7, 1 << 22, 1 << 40, None, True, 1.5, 1e-320, float("nan"), float("inf"), "x", "1", [], {}, [[]],
    [1, 2], ["full_attention"], ["full_attention", "unheard-of"], ["sliding_attention"] * 2, ["linear_attention"] * 2,
    ["conv"] * 2, ["conv", "linear_attention"], {"1": 2}, {"rope_type": "yarn"}, {"rope_type": "default"},
    {"full_attention": {"rope_type": "default"}},
]  # fmt: skip
"""Values for any key at all."""
CHECKS = {"suppress_health_check": list(HealthCheck), "deadline": None, "derandomize": True, "database": None}


@st.composite
def made_up(draw: Callable) -> dict[str, Any]:
    """A tiny model's configuration, of any family, with up to three keys left out or changed."""
    family = draw(st.sampled_from(sorted(ALL)))
    values = {"model_type": family, **COMMON, **ALL[family]}
    keys = sorted({*values, *AutoConfig.for_model(family).to_dict()} - {"model_type", "transformers_version"})
    either = st.one_of(st.sampled_from(sorted(values)), st.sampled_from(keys))
    for key in draw(st.lists(either, min_size=1, max_size=3)):
        value = draw(st.sampled_from(["left out", *STRANGE]))
        if key == "model_type":
            continue
        if value == "left out":
            values.pop(key, None)
        elif not (key == "num_hidden_layers" and type(value) is int and 7 < value < 1 << 40):
            values[key] = value
    return values


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model whose weights are not asked for."""
    made = tmp_path_factory.mktemp("model")
    save_file({"another.weight": torch.zeros(1)}, made / "model.safetensors")
    return made


def run_of(folder: Path, values: dict[str, Any]) -> Config:
    (folder / "config.json").write_text(json.dumps(values))
    short = {"max_prompt_length": 16, "max_completion_length": 8}
    return parse_config({"model": {"name": str(folder)}, "task": {"name": "arithmetic"}, "rollout": short})


def check_sentence(error: UserError, folder: Path) -> None:
    sentence = str(error)
    assert str(folder) in sentence and "\n" not in sentence and len(sentence) < 600, sentence


@settings(max_examples=150, **CHECKS)
@given(made_up())
def test_a_dry_run_plans_for_a_configuration_or_refuses_it_in_a_sentence(folder: Path, values: dict[str, Any]) -> None:
    config = run_of(folder, values)
    for gpu in (None, gpu_named("A100")):
        try:
            assert "Memory" in dry_run(config, gpu)
        except UserError as error:
            check_sentence(error, folder)


def start(config: Config) -> None:
    """What a start asks of a model before its weights are read: of its files, and of its size on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo.session, "account", lambda source: [])
        patch.setattr(grpo.session, "stop_token_ids", lambda source, tokenizer: ())
        patch.setattr("grpo.model.safetensors_source.SafetensorsSource.tokenizer", lambda source: None)
        source = grpo.session.read_model(config, notice=lambda sentence: None).source
    text = source.config.get_text_config()
    grpo.session.check_length(config, source.config, source.path)
    assert largest_head(text) > 0
    gpu = gpu_named("A100")
    check_memory(config, text, 2, 1 << 60, 1 << 60, gpu, None)


@pytest.mark.vllm
@settings(max_examples=150, **CHECKS)
@given(made_up())
def test_a_start_goes_on_to_the_weights_or_ends_in_a_sentence(folder: Path, values: dict[str, Any]) -> None:
    try:
        start(run_of(folder, values))
    except UserError as error:
        check_sentence(error, folder)


@pytest.mark.parametrize("family", sorted(ALL))
def test_every_family_is_planned_for(family: str, folder: Path) -> None:
    config = run_of(folder, {"model_type": family, **COMMON, **ALL[family]})
    for gpu in (None, gpu_named("A100")):
        assert "weights" in dry_run(config, gpu)


@pytest.mark.parametrize("family", HYBRID)
def test_a_hybrid_without_attention_is_refused(family: str, folder: Path) -> None:
    kind = next(kind for kind in family_of(family).mixers if kind != "full_attention")
    kinds = [kind] * ALL[family].get("num_hidden_layers", COMMON["num_hidden_layers"])
    config = run_of(folder, {"model_type": family, **COMMON, **ALL[family], "layer_types": kinds})
    for ask in (dry_run, start):
        with pytest.raises(UserError, match=r"layer_types = .*: none of the \d layers has attention"):
            ask(config)


@pytest.mark.vllm
@pytest.mark.wide
@pytest.mark.timeout(600)
@pytest.mark.parametrize("heads", [(32, 192), (64, 128)])
def test_heads_that_are_not_the_hidden_size_are_computed_by_both_or_refused(heads: tuple[int, int]) -> None:
    """Whatever is not refused vLLM builds, its attention of the heads that the graph has."""
    from grpo.rollout.layout_trace import trace

    sizes = {"head_dim": heads[0], "hidden_size": heads[1]}
    sized = {"phi3"}  # whose rotary factors are as many as a head has
    made = {family: family_config(family, **sizes) for family in (NEWCOMERS | TAIL).keys() - sized}
    served = {family: config for family, config in made.items() if not list(complaints(config))}
    assert "helium" not in served and len(served) > 10
    for family, config in served.items():
        assert trace(config), family


def test_what_is_known_not_to_be_served_says_what_it_is(folder: Path) -> None:
    """Before a key of it is found fault with."""
    inner = {"model_type": "gemma3n_text", **COMMON, "intermediate_size": [128, 128]}
    for values in (inner, {"model_type": "gemma3n", "text_config": inner}):
        config = run_of(folder, values)
        for ask in (dry_run, start):
            with pytest.raises(UserError, match=r"'gemma3n_text' is not supported: .*AltUp.*Laurel.*use Gemma 4"):
                ask(config)
    assert "gemma3n_text" not in listed()
