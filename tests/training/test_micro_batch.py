"""Running out of memory, the largest micro-batch, and float16: each injected on a tiny model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from grpo.config.schema import Config
from grpo.errors import UserError
from grpo.model.base_weights import BaseWeights
from grpo.model.source import open_source
from grpo.policy.policy import Policy
from grpo.training import micro_batch as micro_batches
from grpo.training.batch import TrainingSequence, filled, pack
from grpo.training.learner import Learner
from grpo.training.micro_batch import largest_batch
from grpo.training.optim import LossScaler, moments_like
from tests.helpers.tiny import save_tiny
from tests.training.test_learner import advantages, config_for, groups

BUDGET = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_tiny(folder, "llama")
    return folder


def base_of(folder: Path, dtype: torch.dtype = torch.float32) -> BaseWeights:
    model = config_for(folder).model
    return BaseWeights(open_source(model), model, device=torch.device("cpu"), dtype=dtype)


@pytest.fixture(scope="module")
def base(folder: Path) -> BaseWeights:
    return base_of(folder)


def learner_of(base: BaseWeights, notice: Callable[[str], None] = print, dropout: float = 0.0, **train: Any) -> Learner:
    config = config_for(base.source_path, train={"tokens_per_micro_batch": BUDGET, "learning_rate": 1e-2, **train})
    lora = config.lora.model_copy(update={"lora_dropout": dropout})
    return Learner(Policy(base, lora, seed=1), config, max_steps=4, notice=notice)


def step(learner: Learner, number: int = 1) -> dict[str, float | None]:
    torch.manual_seed(number)
    return learner.update(groups(), advantages(learner.config), number)


def adapter(learner: Learner) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in learner.parameters]


def fail(learner: Learner, monkeypatch: pytest.MonkeyPatch, *calls: int, after_backward: bool = False) -> None:
    """Let memory run out in the `calls`-th micro-batches, counted from 1 over the life of `learner`."""
    seen, micro_batch = [0], learner.micro_batch

    def counted(batch: Any, totals: Any) -> Any:
        seen[0] += 1
        loss, metrics = micro_batch(batch, totals)
        if seen[0] in calls:
            if after_backward:
                loss.backward()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return loss, metrics

    monkeypatch.setattr(learner, "micro_batch", counted)


# Out of memory


@pytest.mark.parametrize(("call", "after_backward", "dropout"), [(1, False, 0.0), (2, True, 0.0), (3, False, 0.3)])
def test_a_step_that_runs_out_of_memory_is_that_of_half_the_micro_batch(
    base: BaseWeights, monkeypatch: pytest.MonkeyPatch, call: int, after_backward: bool, dropout: float
) -> None:
    notices: list[str] = []
    learner = learner_of(base, notices.append, dropout)
    fail(learner, monkeypatch, call, after_backward=after_backward)
    metrics = step(learner)
    halved = learner_of(base, dropout=dropout, tokens_per_micro_batch=BUDGET // 2)
    assert metrics == step(halved)
    assert all(mine.equal(other) for mine, other in zip(adapter(learner), adapter(halved), strict=True))
    assert notices == ["out of memory; tried again with micro-batches of 30 tokens, which stay so"]


def test_running_out_of_memory_twice_is_an_error_that_names_what_to_lower(
    base: BaseWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = learner_of(base)
    before = adapter(learner)
    fail(learner, monkeypatch, 2, 4)
    with pytest.raises(UserError) as caught:
        step(learner)
    assert "ran out again with micro-batches of 30 tokens" in str(caught.value)
    assert "lower rollout.max_completion_length" in str(caught.value)
    assert 'train.gradient_checkpointing = "offload"' in str(caught.value)
    assert all(mine.equal(old) for mine, old in zip(adapter(learner), before, strict=True))
    assert all(parameter.grad is None for parameter in learner.parameters)


def test_memory_running_out_in_a_later_step_is_the_second_time(
    base: BaseWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = learner_of(base)
    fail(learner, monkeypatch, 1, 20)
    step(learner)
    with pytest.raises(UserError, match="ran out again"):
        for number in (2, 3, 4):
            step(learner, number)


def test_a_resumed_run_keeps_the_smaller_micro_batch(base: BaseWeights, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = learner_of(base)
    fail(learner, monkeypatch, 1)
    step(learner)
    state, values = copy.deepcopy(learner.state_dict()), adapter(learner)
    step(learner, 2)

    resumed = learner_of(base)
    with torch.no_grad():
        for parameter, value in zip(resumed.parameters, values, strict=True):
            parameter.copy_(value)
    resumed.load_state_dict(state)
    step(resumed, 2)
    assert resumed.budget.tokens == BUDGET // 2
    assert all(mine.equal(other) for mine, other in zip(adapter(resumed), adapter(learner), strict=True))


def test_old_logprobs_survive_running_out_of_memory(base: BaseWeights, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"num_iterations": 2}
    learner = learner_of(base, **settings)
    remember, failed = learner.remember_old_logprobs, []

    def once(sequences: Any) -> None:
        if not failed:
            failed.append(True)
            raise torch.OutOfMemoryError
        remember(sequences)

    monkeypatch.setattr(learner, "remember_old_logprobs", once)
    step(learner)
    halved = learner_of(base, tokens_per_micro_batch=BUDGET // 2, **settings)
    step(halved)
    assert all(mine.equal(other) for mine, other in zip(adapter(learner), adapter(halved), strict=True))


# Packing


SEQUENCES = st.lists(st.tuples(st.integers(0, 2), st.integers(1, 40)), max_size=30)
"""Which prompt, and how many tokens after it."""


@given(sequences=SEQUENCES, tokens=st.integers(1, 120), tree=st.booleans())
def test_micro_batches_are_in_order_within_the_budget_as_few_as_can_be_and_even(
    sequences: list[tuple[int, int]], tokens: int, tree: bool
) -> None:
    listed = [
        TrainingSequence([prompt] * (3 + 5 * prompt), [9] * length, [-1.0] * length, 1.0, False)
        for prompt, length in sequences
    ]
    batches = pack(listed, tokens, tree=tree)
    full, largest = filled(listed, tokens, tree=tree)
    assert [id(one) for batch in batches for one in batch] == list(map(id, listed))
    assert len(batches) == len(full)
    sizes = [sum(filled(batch, 10**9, tree=tree)[1]) for batch in batches]
    assert all(size <= tokens or len(batch) == 1 for batch, size in zip(batches, sizes, strict=True))
    assert max(sizes, default=0) <= max(largest, default=0)


def test_a_small_rest_is_shared_out() -> None:
    listed = [TrainingSequence([number], [9] * 10, [-1.0] * 10, 1.0, False) for number in range(13)]
    assert [len(batch) for batch in filled(listed, 60)[0]] == [6, 6, 1]
    assert [len(batch) for batch in pack(listed, 60)] == [5, 5, 3]


def alone(length: int, number: int) -> TrainingSequence:
    return TrainingSequence([number], [9] * length, [-1.0] * length, 1.0, False)


@given(lengths=st.lists(st.integers(1, 150), max_size=14), tokens=st.integers(10, 70), tree=st.booleans())
@example(lengths=[174, 13, 38, 43, 65, 176, 25, 64, 65, 5, 52], tokens=68, tree=False)
@example(lengths=[174, 13, 38, 43, 65, 176, 25, 64, 65, 5, 52], tokens=68, tree=True)
def test_sequences_beyond_the_budget_leave_the_others_within_it(lengths: list[int], tokens: int, tree: bool) -> None:
    listed = list(map(alone, lengths, range(len(lengths))))
    batches = pack(listed, tokens, tree=tree)
    assert all(sum(map(len, batch)) <= tokens or len(batch) == 1 for batch in batches)
    assert len(batches) == len(filled(listed, tokens, tree=tree)[0])


def test_a_small_rest_is_shared_out_behind_a_sequence_beyond_the_budget() -> None:
    listed = list(map(alone, [500, *[10] * 13], range(14)))
    assert [len(batch) for batch in pack(listed, 60)] == [1, 5, 5, 3]


# The largest micro-batch


@pytest.mark.parametrize("tokens", [1, 100, 1023, 1024, 3000, 8192])
def test_the_largest_micro_batch_fills_the_budget_and_is_one(folder: Path, tokens: int) -> None:
    config = config_for(folder)
    batch = largest_batch(config, tokens)
    assert pack(batch, tokens) == [batch]
    prompts, longest = config.rollout.max_prompt_length, config.max_seq_length - 1
    fed = sum(len(sequence) for sequence in batch)
    fed -= sum(len(b.prompt_ids) for a, b in zip(batch, batch[1:], strict=False) if a.prompt_ids == b.prompt_ids)
    assert fed == max(tokens, longest) or tokens - fed == 1
    assert all(len(sequence.prompt_ids) <= prompts and len(sequence) <= longest for sequence in batch)


def test_trying_the_largest_micro_batch_changes_nothing(base: BaseWeights, monkeypatch: pytest.MonkeyPatch) -> None:
    notices: list[str] = []
    learner, untouched = learner_of(base, notices.append, 0.3), learner_of(base, dropout=0.3)
    tried: list[int] = []
    micro_batch = learner.micro_batch
    monkeypatch.setattr(learner, "micro_batch", lambda b, t: (tried.append(len(b)), micro_batch(b, t))[1])
    torch.manual_seed(3)
    learner.probe_memory()
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert drawn.equal(torch.rand(1)), "the generator moved"
    assert len(tried) == 1 and notices == []
    assert all(parameter.grad is None for parameter in learner.parameters) and not learner.policy.model.training
    assert step(learner) == step(untouched)
    assert all(mine.equal(other) for mine, other in zip(adapter(learner), adapter(untouched), strict=True))


def test_a_form_that_does_not_fit_gives_way_before_the_first_step(
    base: BaseWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    notices: list[str] = []
    learner = learner_of(base, notices.append)
    assert learner.budget.mode == "none"
    fail(learner, monkeypatch, 1)
    learner.probe_memory()
    assert learner.budget.mode == "layer" and learner.budget.tokens == BUDGET
    assert notices == ['the largest micro-batch did not fit; train.gradient_checkpointing = "layer" is used']


def test_mlps_that_are_kept_beyond_the_form_give_way_first(base: BaseWeights, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(micro_batches, "checkpointing_mode", lambda *given: ("mlp", 1))
    monkeypatch.setattr(Policy, "recompute_layers", lambda policy, mode, kept_mlps=0: seen.append((mode, kept_mlps)))
    seen: list[tuple[str, int]] = []
    learner = learner_of(base)
    learner.budget.modes = ("none", "mlp")
    fail(learner, monkeypatch, 1)
    learner.probe_memory()
    assert seen == [("mlp", 1), ("mlp", 0)] and learner.budget.tokens == BUDGET


def test_a_form_that_is_set_stays_and_the_micro_batch_gives_way(
    base: BaseWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner = learner_of(base, gradient_checkpointing="none")
    fail(learner, monkeypatch, 1)
    learner.probe_memory()
    assert learner.budget.mode == "none" and learner.budget.tokens == BUDGET // 2
    other = learner_of(base)
    fail(other, monkeypatch, 1, 2, 3, 4)
    with pytest.raises(UserError, match="ran out again"):
        other.probe_memory()
    assert other.budget.mode == "offload"


def test_what_is_planned_decides_the_form(base: BaseWeights, monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        available = 10**12

    monkeypatch.setattr(micro_batches.psutil, "virtual_memory", lambda: Memory)
    assert learner_of(base).budget.mode == "none"
    with pytest.raises(UserError, match="needs the Triton kernels"):
        learner_of(base, gradient_checkpointing="mlp")
    planned = micro_batches.TrainingMemory.of(learner_of(base).config, base.config, 4, on_gpu=False)
    Memory.available = 2 * planned.peak("none") - 1
    assert learner_of(base).budget.mode == "layer"
    assert learner_of(base, gradient_checkpointing="offload").budget.mode == "offload"


def test_moments_are_those_of_the_optimiser(base: BaseWeights) -> None:
    learner = learner_of(base)
    expected = sum(tensor.nbytes for tensor in moments_like(learner.parameters, learner.config.train))
    step(learner)
    states = learner.optimizer.state.values()
    assert sum(state[key].nbytes for state in states for key in ("exp_avg", "exp_avg_sq")) == expected


# float16


@pytest.fixture(scope="module")
def half(folder: Path) -> BaseWeights:
    return base_of(folder, torch.float16)


def test_float16_follows_float32(base: BaseWeights, half: BaseWeights) -> None:
    exact, scaled = learner_of(base), learner_of(half)
    assert all(parameter.dtype == torch.float32 for parameter in scaled.parameters)
    before = adapter(exact)
    wanted, found = step(exact), step(scaled)
    assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=0.01)
    assert found["loss_scale"] == 2.0**16 and found["loss_scale_overflow"] == 0
    assert "loss_scale" not in wanted
    # In the first step only B moves, which begins at zero.
    moved = [
        (mine, other)
        for mine, other, old in zip(adapter(scaled), adapter(exact), before, strict=True)
        if old.any() == 0
    ]
    assert len(moved) == len(before) // 2
    assert all(torch.cosine_similarity(mine.flatten(), other.flatten(), 0) > 0.8 for mine, other in moved)


def test_without_the_scale_small_gradients_would_vanish(half: BaseWeights, base: BaseWeights) -> None:
    """The scale is what makes the difference: at 2^-12 of the loss, float16 keeps nothing right."""
    exact, scaled, unscaled = learner_of(base), learner_of(half), learner_of(half)
    unscaled.scaler.scale = 2.0**-12
    norm = step(exact)["grad_norm"]
    assert norm is not None
    assert abs(step(scaled)["grad_norm"] / norm - 1) < 0.01 < abs((step(unscaled)["grad_norm"] or 0) / norm - 1)


def test_an_overflow_is_skipped_and_halves_the_scale(half: BaseWeights, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = learner_of(half)
    learner.scaler.scale = 2.0**22
    before, state = adapter(learner), copy.deepcopy(learner.optimizer.state_dict())
    metrics = step(learner)
    assert metrics["loss_scale_overflow"] == 1 and metrics["loss_scale"] == 2.0**22 and metrics["grad_norm"] is None
    assert learner.scaler.scale == 2.0**21
    assert all(mine.equal(old) for mine, old in zip(adapter(learner), before, strict=True))
    assert learner.optimizer.state_dict() == state
    while step(learner, 2)["loss_scale_overflow"]:
        pass
    assert any(not mine.equal(old) for mine, old in zip(adapter(learner), before, strict=True))


def test_the_scale_is_resumed(half: BaseWeights) -> None:
    learner = learner_of(half)
    learner.scaler.scale, learner.scaler.good_steps = 2.0**14, LossScaler.GROWTH_INTERVAL - 1
    state, values = copy.deepcopy(learner.state_dict()), adapter(learner)
    step(learner)
    assert learner.scaler.scale == 2.0**15 and learner.scaler.good_steps == 0
    resumed = learner_of(half)
    with torch.no_grad():
        for parameter, value in zip(resumed.parameters, values, strict=True):
            parameter.copy_(value)
    resumed.load_state_dict(state)
    step(resumed)
    assert resumed.scaler.state_dict() == learner.scaler.state_dict()
    assert all(mine.equal(other) for mine, other in zip(adapter(resumed), adapter(learner), strict=True))


def test_a_loss_that_is_not_finite_is_not_taken_for_an_overflow() -> None:
    scaler = LossScaler(torch.float16)
    assert scaler.overflowed(1.0, float("inf")) and scaler.overflowed(None, float("nan"))
    assert not scaler.overflowed(float("nan"), float("nan"))
    scaler.scale = 1.0
    assert not scaler.overflowed(1.0, float("inf")), "no smaller scale would help"
    assert not LossScaler(torch.bfloat16).overflowed(1.0, float("inf"))


def test_other_types_are_not_scaled(base: BaseWeights) -> None:
    config: Config = config_for(base.source_path)
    assert config.model.dtype == "float32" and learner_of(base).scaler.scale == 1.0
