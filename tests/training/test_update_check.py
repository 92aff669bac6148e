"""Updates that must not be applied: recognised, left out whole, and dumped so that they can be computed again."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo.config.schema import Config, parse_config
from grpo.errors import UserError
from grpo.model.base_weights import BaseWeights
from grpo.replay import main, replay
from grpo.rollout.sampler import Group
from grpo.training.advantages import Advantages
from grpo.training.dump import KEPT_DUMPS, write_dump
from grpo.training.learner import Learner
from grpo.training.update_check import FEWEST, SkippedUpdate, UpdateCheck
from tests.helpers.learner_batches import advantages_of, base_weights, moved_policy, random_groups
from tests.helpers.small_chat import save_small_chat_model
from tests.helpers.tiny_run import run_tables

NAN, INF = math.nan, math.inf
REWARDS = [[1.0, 0.0, 0.5, 0.2], [0.0, 2.0, 1.0, 0.1]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guard")
    save_small_chat_model(folder / "model")
    return folder


@pytest.fixture(scope="module")
def base(home: Path) -> BaseWeights:
    return base_weights(config_for(home))


def config_for(home: Path, **train: Any) -> Config:
    # The rollout's logprobs below are made up, and so is its distance from the trainer.
    return parse_config(run_tables(home, train={"max_mismatch_kl": "none", **train}, lora={"lora_dropout": 0.1}))


@pytest.fixture
def learner(base: BaseWeights, home: Path) -> Learner:
    return learner_for(base, config_for(home))


def learner_for(base: BaseWeights, config: Config) -> Learner:
    return Learner(moved_policy(base, config), config, max_steps=9, notice=print)


def groups() -> list[Group]:
    return random_groups([6] * len(REWARDS), len(REWARDS[0]), (2, 9), 250, -6)


def advantages(config: Config, rewards: list[list[float]] = REWARDS) -> Advantages:
    return advantages_of(rewards, config)


def update(learner: Learner, step: int = 1, sampled: list[Group] | None = None) -> dict[str, float | None]:
    torch.manual_seed(step)
    return learner.update(sampled or groups(), advantages(learner.config), step)


def refused(learner: Learner) -> SkippedUpdate:
    with pytest.raises(SkippedUpdate) as caught:
        update(learner)
    return caught.value


def everything(learner: Learner) -> list[Tensor]:
    """All that an update may change."""
    moments = [value for state in learner.optimizer.state.values() for value in state.values()]
    return [value.detach().clone() for value in (*learner.parameters, *moments)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(a.equal(b) for a, b in zip(one, other, strict=True))


# What is recognised


def poison_loss(learner: Learner) -> None:
    loss = learner.loss
    learner.loss = lambda *arguments: (loss(*arguments)[0] * NAN, {})


def poison_gradient(learner: Learner) -> None:
    learner.parameters[3].register_hook(lambda gradient: gradient * INF)


def poison_weight(learner: Learner) -> None:
    with torch.no_grad():
        learner.parameters[0][0, 0] = NAN


@pytest.mark.parametrize(
    ("poison", "problem"),
    [
        (poison_loss, "the gradient norm is nan"),
        (poison_gradient, "the gradient norm is inf"),
        (poison_weight, "the loss is nan"),
    ],
)
@pytest.mark.parametrize("updates", [1, 2])
def test_a_non_finite_update_changes_nothing(
    base: BaseWeights, home: Path, poison: Callable[[Learner], None], problem: str, updates: int
) -> None:
    learner = learner_for(base, config_for(home, num_iterations=updates))
    update(learner)  # so that the optimiser has moments
    poison(learner)
    before, norms = everything(learner), list(learner.update_check.norms)
    assert refused(learner).problem == problem
    if poison is poison_weight:  # NaN equals nothing
        before, learner.parameters[0].data = (
            [tensor.nan_to_num() for tensor in before],
            learner.parameters[0].nan_to_num(),
        )
    assert same(everything(learner), before)
    assert list(learner.update_check.norms) == norms
    assert all(parameter.grad is None for parameter in learner.parameters)


def test_a_step_of_several_updates_is_undone_from_its_last(base: BaseWeights, home: Path) -> None:
    learner = learner_for(base, config_for(home, num_iterations=3))
    update(learner)
    before, calls, apply = everything(learner), 0, learner.apply_gradients

    def interrupted() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        apply()

    learner.apply_gradients = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        update(learner)
    assert calls == 3 and same(everything(learner), before)


def test_an_update_after_one_that_was_left_out_is_as_if_it_had_not_been(base: BaseWeights, home: Path) -> None:
    straight, other = (learner_for(base, config_for(home, num_iterations=2)) for _ in range(2))
    update(straight, 1)
    update(other, 1)
    loss = other.loss
    poison_loss(other)
    refused(other)
    other.loss = loss
    assert update(straight, 3) == update(other, 3)
    assert same(everything(straight), everything(other))


def test_a_mismatch_beyond_its_limit_is_refused(base: BaseWeights, home: Path) -> None:
    found = update(learner_for(base, config_for(home)))["mismatch_kl"]
    assert found is not None and found > 0.1
    assert update(learner_for(base, config_for(home, max_mismatch_kl=found * 1.01)))["mismatch_kl"] == found
    problem = refused(learner_for(base, config_for(home, max_mismatch_kl=found * 0.99))).problem
    assert problem.startswith("mismatch_kl is ") and "above train.max_mismatch_kl = " in problem


def test_a_spike_of_the_gradient_norm_is_refused_once_there_are_norms_to_compare_with() -> None:
    def check(update_check: UpdateCheck, norm: float) -> None:
        update_check.check_update({"loss": 0.0, "grad_norm": norm, "mismatch_kl": None}, None)  # type: ignore[arg-type]

    train = parse_config({"model": {"name": "m"}, "task": {"name": "t"}, "train": {"grad_norm_spike": 5.0}}).train
    update_check = UpdateCheck(train)
    check(update_check, 1000.0)
    for number in range(FEWEST - 1):
        check(update_check, 1.0 + number / 10)
        check(update_check, 0.0)  # a step without gradient says nothing about the usual norm
    check(update_check, 6.0)
    with pytest.raises(SkippedUpdate, match="the gradient norm is 8, more than train.grad_norm_spike = 5 times 1.5"):
        check(update_check, 8.0)
    copy = UpdateCheck(train)
    copy.load_state_dict(json.loads(json.dumps(update_check.state_dict())))
    with pytest.raises(SkippedUpdate):
        check(copy, 8.0)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_logprobs_of_the_rollout_that_are_not_finite_are_refused(learner: Learner, value: float) -> None:
    sampled = groups()
    learner.update_check.check_sampled(sampled, advantages(learner.config))
    sampled[1].samples[2].logprobs[0] = value
    with pytest.raises(SkippedUpdate, match="vLLM reported a logprob that is not finite"):
        learner.update_check.check_sampled(sampled, advantages(learner.config))


def test_an_infinite_sum_of_rewards_is_refused(learner: Learner) -> None:
    rewards = [[1.0, 0.0, INF, 0.5], REWARDS[1]]
    with pytest.raises(SkippedUpdate, match="a weighted sum of rewards is infinite"):
        learner.update_check.check_sampled(groups(), advantages(learner.config, rewards))


def test_a_run_stops_at_once_or_after_so_many_in_a_row(learner: Learner) -> None:
    def update_check(**train: Any) -> UpdateCheck:
        return UpdateCheck(parse_config({"model": {"name": "m"}, "task": {"name": "t"}, "train": train}).train)

    assert update_check(on_nonfinite="stop").ends_run()
    patient = update_check(max_nonfinite_steps=3)
    assert [patient.ends_run(), patient.ends_run()] == [False, False]
    patient.check_update({"loss": 0.0, "grad_norm": 1.0, "mismatch_kl": 0.0}, None)  # type: ignore[arg-type]
    assert [patient.ends_run() for _ in range(3)] == [False, False, True]


# What is dumped


def dumped(learner: Learner, home: Path, folder: Path, step: int = 7) -> Path:
    return write_dump(folder, step, learner.config, learner.policy, refused(learner))


def test_a_dump_computes_to_the_same_figures(base: BaseWeights, home: Path, tmp_path: Path) -> None:
    """Dropout included: the generators are where they were."""
    learner = learner_for(base, config_for(home, max_mismatch_kl=1e-9, tokens_per_micro_batch=20))
    result = replay(dumped(learner, home, tmp_path))
    assert result.problem.startswith("mismatch_kl is ") and result.first is None
    assert result.recorded["loss"] and result.recorded["grad_norm"]
    assert {name: result.figures[name] for name in result.recorded} == result.recorded


def huge_weight(learner: Learner) -> None:
    layer = learner.policy.adapter_layers()["model.layers.1.mlp.down_proj"]
    with torch.no_grad():
        layer.lora_A["default"].weight.fill_(3e38)
        layer.lora_B["default"].weight.fill_(3e38)


@pytest.mark.parametrize(
    ("poison", "first"),
    [
        (poison_weight, "the weight model.layers.0.self_attn.q_proj.lora_A: 1 of "),
        (huge_weight, "the output of model.layers.1.mlp.down_proj: "),
    ],
)
def test_replay_says_where_the_first_non_finite_value_is(
    learner: Learner, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], poison: Any, first: str
) -> None:
    poison(learner)
    dump = dumped(learner, home, tmp_path)
    assert main([str(dump)]) == 0
    printed = capsys.readouterr().out
    assert f"first non-finite value in {first}" in printed
    assert "left out because the loss is nan" in printed


def test_what_vllm_reported_is_named_by_replay(learner: Learner, home: Path, tmp_path: Path) -> None:
    sampled = groups()
    sampled[1].samples[2].logprobs[0] = NAN
    with pytest.raises(SkippedUpdate) as caught:
        learner.update_check.check_sampled(sampled, advantages(learner.config))
    dump = write_dump(tmp_path, 1, learner.config, learner.policy, caught.value)
    first = replay(dump).first
    assert first is not None and first.startswith("the rollout's logprobs of sequence 7: 1 of ")


def test_a_dump_holds_no_pickle_and_only_the_newest_are_kept(learner: Learner, home: Path, tmp_path: Path) -> None:
    poison_loss(learner)
    for step in (3, 9, 10, 27, 100):
        dump = dumped(learner, home, tmp_path, step)
    kept = {entry.name for entry in (tmp_path / "nonfinite").iterdir()}
    assert kept == {"step-10", "step-27", "step-100"} and len(kept) == KEPT_DUMPS
    files = {str(file.relative_to(dump)) for file in dump.rglob("*") if file.is_file()}
    assert {name.rpartition(".")[2] for name in files} <= {"safetensors", "json", "toml", "md"}
    assert files >= {"batch.safetensors", "report.json", "config.toml", "adapter/adapter_model.safetensors"}
    assert json.loads((dump / "report.json").read_text())["problem"] == "the gradient norm is nan"


@pytest.fixture(scope="module")
def whole(base: BaseWeights, home: Path) -> Path:
    """A dump to be damaged."""
    learner = learner_for(base, config_for(home))
    poison_loss(learner)
    return dumped(learner, home, home)


DUMP_FILES = ["report.json", "batch.safetensors", "config.toml", "adapter/adapter_model.safetensors"]


@pytest.mark.parametrize("file", DUMP_FILES)
@pytest.mark.parametrize("content", [None, b"", b'{"figures": 3}', b"\x80\x04."])
def test_a_damaged_dump_is_a_sentence(whole: Path, tmp_path: Path, file: str, content: bytes | None) -> None:
    shutil.copytree(whole, tmp_path / "dump")
    if content is None:
        (tmp_path / "dump" / file).unlink()
    else:
        (tmp_path / "dump" / file).write_bytes(content)
    with pytest.raises(UserError) as caught:
        replay(tmp_path / "dump")
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
