"""From scored groups to gradients: how a batch is cut never changes what is learned."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo.config.schema import Config, parse_config
from grpo.model.base_weights import BaseWeights
from grpo.policy.policy import Policy
from grpo.rollout.sampler import Group
from grpo.training.advantages import Advantages
from grpo.training.learner import Learner
from tests.helpers.learner_batches import advantages_of, base_weights, moved_policy, random_groups
from tests.helpers.tiny import VOCABULARY, save_tiny

GENERATIONS = 3
REWARDS = [[1.0, 0.0, 0.5], [0.0, 0.0, 0.0], [0.0, 2.0, 1.0], [1.0, 1.0, 0.0]]  # the second group is all alike


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseWeights:
    folder = tmp_path_factory.mktemp("llama")
    save_tiny(folder, "llama")
    return base_weights(config_for(folder))


def config_for(folder: Path, *, train: dict[str, Any] | None = None, loss: dict[str, Any] | None = None) -> Config:
    return parse_config(
        {
            "model": {"name": str(folder), "load_in_4bit": False, "dtype": "float32"},
            "task": {"name": "arithmetic"},
            "lora": {"r": 4, "lora_alpha": 8},
            "rollout": {"num_generations": GENERATIONS, "prompts_per_step": 4, "max_completion_length": 16},
            "train": {"max_steps": 1, "max_mismatch_kl": "none", **(train or {})},
            "loss": loss or {},
        }
    )


def groups() -> list[Group]:
    """Prompts and completions of many lengths, with rollout logprobs a little off the trainer's."""
    return random_groups([4 + 5 * index for index in range(len(REWARDS))], GENERATIONS, (1, 16), VOCABULARY, -4)


class Recorder(Learner):
    """A learner that keeps the gradient of every optimiser step and moves nothing."""

    def clip_gradients(self) -> float:
        self.seen.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.parameters])
        return 0.0

    def apply_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)


def gradients(
    base: BaseWeights, part: slice = slice(None), **settings: Any
) -> tuple[list[list[Tensor]], dict[str, float]]:
    """The gradient of each optimiser step on the groups in `part`, and the metrics."""
    config = config_for(base.source_path, **settings)
    learner = Recorder(moved_policy(base, config), config, max_steps=1, notice=print)
    learner.seen = []
    metrics = learner.update(groups()[part], advantages(config, part), step=1)
    return learner.seen, metrics


def advantages(config: Config, part: slice = slice(None)) -> Advantages:
    return advantages_of(REWARDS[part], config)


def assert_same(found: list[list[Tensor]], expected: list[list[Tensor]], tolerance: float = 3e-5) -> None:
    assert len(found) == len(expected)
    for step, reference in zip(found, expected, strict=True):
        scale = max(float(tensor.abs().max()) for tensor in reference)
        assert scale > 0
        for tensor, other in zip(step, reference, strict=True):
            assert float((tensor - other).abs().max()) < tolerance * scale


LOSSES = [
    {},
    {"loss_type": "grpo", "beta": 0.1},
    {"loss_type": "bnpo"},
    {"loss_type": "dr_grpo", "scale_rewards": "none"},
    {"loss_type": "gspo"},
    {"top_entropy_quantile": 0.5},
    {"entropy_coef": 0.01},
    {"mask_truncated_completions": True},
]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: " ".join(map(str, loss.values())) or "dapo")
def test_the_gradient_does_not_depend_on_the_micro_batch(base: BaseWeights, loss: dict[str, Any]) -> None:
    expected, metrics = gradients(base, loss=loss, train={"tokens_per_micro_batch": 10_000})
    for tokens in (1, 40, 77):
        found, others = gradients(base, loss=loss, train={"tokens_per_micro_batch": tokens})
        assert_same(found, expected)
        assert others["loss"] == pytest.approx(metrics["loss"], rel=1e-5, abs=1e-6)
        assert others["entropy"] == pytest.approx(metrics["entropy"], rel=1e-4)


@pytest.mark.parametrize("chunk", [1, 3, 50])
def test_the_gradient_does_not_depend_on_the_chunk_of_logits(base: BaseWeights, chunk: int) -> None:
    loss = {"entropy_coef": 0.01, "beta": 0.1}
    expected, _ = gradients(base, loss=loss)
    assert_same(gradients(base, loss=loss, train={"logprob_chunk_tokens": chunk})[0], expected)


def test_each_optimiser_step_of_a_rollout_learns_from_its_own_prompts(base: BaseWeights) -> None:
    both, _ = gradients(base, train={"optimizer_steps_per_rollout": 2})
    first, _ = gradients(base, slice(0, 2))
    second, _ = gradients(base, slice(2, 4))
    assert_same(both, first + second)


def test_every_pass_takes_every_part(base: BaseWeights) -> None:
    twice, _ = gradients(base, train={"num_iterations": 2, "optimizer_steps_per_rollout": 2})
    once, _ = gradients(base, train={"optimizer_steps_per_rollout": 2})
    assert_same(twice, once + once)


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo", "dr_grpo"])
def test_skipping_groups_of_equal_rewards_leaves_the_gradient(
    base: BaseWeights, loss_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    score = Policy.score
    monkeypatch.setattr(Policy, "score", lambda self, p, *a, **k: (seen.append(len(p)), score(self, p, *a, **k))[1])
    skipped, _ = gradients(base, loss={"loss_type": loss_type})
    assert sum(seen) == 9, "the group without advantage was computed"
    monkeypatch.setattr("grpo.training.learner.may_skip_equal_groups", lambda settings: False)
    full, _ = gradients(base, loss={"loss_type": loss_type})
    assert sum(seen) == 9 + 12
    assert_same(skipped, full)


def test_groups_are_not_skipped_where_they_have_a_gradient(base: BaseWeights) -> None:
    """With a reference or an entropy term a group without advantage still pulls."""
    for loss in ({"beta": 0.1}, {"entropy_coef": 0.01}):
        (found,), _ = gradients(base, slice(1, 2), loss=loss)
        assert any(tensor.abs().max() > 0 for tensor in found)


def test_a_batch_of_idle_groups_moves_nothing_and_is_logged(base: BaseWeights) -> None:
    config = config_for(base.source_path)
    policy = Policy(base, config.lora, seed=1)
    before = [parameter.clone() for parameter in policy.parameters()]
    learner = Learner(policy, config, max_steps=1, notice=print)
    metrics = learner.update(groups()[1:2], advantages(config, slice(1, 2)), step=1)
    assert metrics["grad_norm"] == 0 and metrics["loss"] == 0
    assert all(parameter.equal(old) for parameter, old in zip(policy.parameters(), before, strict=True))


def test_the_state_of_the_optimiser_goes_on_where_it_stopped(base: BaseWeights) -> None:
    config = config_for(base.source_path, train={"learning_rate": 1e-2})
    policy = Policy(base, config.lora, seed=1)
    learner = Learner(policy, config, max_steps=3, notice=print)
    learner.update(groups(), advantages(config), step=1)
    state = copy.deepcopy(learner.state_dict())
    values = [parameter.clone() for parameter in policy.parameters()]
    learner.update(groups(), advantages(config), step=2)

    other = Policy(base, config.lora, seed=7)
    with torch.no_grad():
        for parameter, value in zip(other.parameters(), values, strict=True):
            parameter.copy_(value)
    continued = Learner(other, config, max_steps=3, notice=print)
    continued.load_state_dict(state)
    continued.update(groups(), advantages(config), step=2)
    assert all(p.equal(q) for p, q in zip(other.parameters(), policy.parameters(), strict=True))
