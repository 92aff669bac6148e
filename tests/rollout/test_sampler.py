"""Groups and micro-batches for any sizes: nothing lost, nothing mixed up, in whatever order things finish."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.data import Prompt
from grpo.errors import UserError
from grpo.policy.packing import packed_row
from grpo.rewards.runtime.contract import RewardBatch, RewardResult
from grpo.rollout.engine import Completion, Request, SamplingSettings
from grpo.rollout.sampler import Sampler, sample_seed
from grpo.training.batch import TrainingSequence, pack


class Engine:
    """Finishes requests in an order of its own; what it samples depends on the request's seed alone."""

    def __init__(self, order: int):
        self.order = order
        self.requests: list[Request] = []

    def generate(self, requests: Sequence[Request], sampling: Any) -> Iterator[Completion]:
        self.requests += requests
        shuffled = list(requests)
        random.Random(self.order).shuffle(shuffled)
        for request in shuffled:
            draw = random.Random(request.seed)
            ids = [draw.randrange(100) for _ in range(draw.randint(1, 5))]
            yield Completion(request.id, ids, [-float(token) for token in ids], draw.choice(["stop", "length"]))


class Pool:
    """Scores a completion with the sum of its tokens, late."""

    def submit(self, batch: RewardBatch) -> Future[RewardResult]:
        future: Future[RewardResult] = Future()
        scores = [float(sum(ids)) for ids in batch.completion_ids]
        future.set_result(RewardResult({"sum": list(scores)}, {}, {}, {"sum": 0.1}))
        return future


def sampler(generations: int, order: int = 0, pool: Any = None) -> Sampler:
    return Sampler(
        Engine(order),  # type: ignore[arg-type]
        pool or Pool(),
        SamplingSettings(temperature=1.0, max_tokens=5),
        num_generations=generations,
        seed=3,
        max_steps=9,
        decode=lambda ids: " ".join(map(str, ids)),
    )


def prompts(rows: Sequence[int]) -> list[Prompt]:
    return [Prompt(row, "t", f"prompt {row}", {"answer": str(row)}, [row, row + 1]) for row in rows]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.integers(2, 5), st.integers(0, 999), st.integers(0, 999))
def test_groups_do_not_depend_on_the_order_in_which_completions_finish(
    rows: list[int], generations: int, one: int, other: int
) -> None:
    """A prompt may occur twice in a step; its completions differ then."""
    first, second = (sampler(generations, order).sample(prompts(rows), step=2) for order in (one, other))
    assert first.groups == second.groups and first.results == second.results
    assert [group.prompt.index for group in first.groups] == rows
    for group in first.groups:
        assert len(group.samples) == generations
        for sample in group.samples:
            assert sample.rewards == {"sum": float(sum(sample.token_ids))}
            assert sample.logprobs == [-float(token) for token in sample.token_ids]
            assert sample.text == " ".join(map(str, sample.token_ids))
    assert first.tokens == sum(len(sample.token_ids) for group in first.groups for sample in group.samples)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.integers(2, 5))
def test_every_completion_of_a_run_has_a_seed_of_its_own(rows: list[int], generations: int) -> None:
    drawn = sampler(generations)
    for step in (1, 2):
        for number in (0, 1):
            drawn.sample(prompts(rows), step, number)
    seeds = [request.seed for request in drawn.engine.requests]  # type: ignore[attr-defined]
    assert len(set(seeds)) == len(seeds) == 4 * len(rows) * generations
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert sample_seed(1, 23) != sample_seed(12, 3)


def test_a_failed_reward_ends_the_rollout_and_the_generation_with_it() -> None:
    class Failing(Pool):
        def submit(self, batch: RewardBatch) -> Future[RewardResult]:
            future: Future[RewardResult] = Future()
            future.set_exception(UserError("reward 'x' raised"))
            return future

    closed = []

    class Closing(Engine):
        def generate(self, requests: Sequence[Request], sampling: Any) -> Iterator[Completion]:
            try:
                yield from super().generate(requests, sampling)
            finally:
                closed.append(True)

    drawn = sampler(2, pool=Failing())
    drawn.engine = Closing(0)  # type: ignore[assignment]
    with pytest.raises(UserError, match="reward 'x' raised"):
        drawn.sample(prompts([0, 1, 2]), step=1)
    assert closed


def test_a_rollout_can_be_abandoned_while_a_reward_is_waited_for() -> None:
    class Never(Pool):
        def submit(self, batch: RewardBatch) -> Future[RewardResult]:
            return Future()

    drawn, calls = sampler(2, pool=Never()), Counter[str]()

    def check() -> None:
        calls["check"] += 1
        if calls["check"] == 2:
            raise KeyboardInterrupt

    drawn.check = check
    with pytest.raises(KeyboardInterrupt):
        drawn.sample(prompts([0]), step=1)


# Micro-batches


@st.composite
def groups(draw: Any) -> list[TrainingSequence]:
    """Completions of some prompts, group after group; neighbours may have the same prompt."""
    made = []
    for _ in range(draw(st.integers(0, 5))):
        prompt = draw(st.lists(st.integers(0, 2), min_size=1, max_size=6))
        for length in draw(st.lists(st.integers(1, 9), min_size=1, max_size=5)):
            made.append(TrainingSequence(prompt, list(range(length)), [0.0] * length, 1.0, False))
    return made


@given(groups(), st.integers(1, 40))
def test_packing_keeps_every_sequence_in_order_and_the_token_budget(
    sequences: list[TrainingSequence], budget: int
) -> None:
    batches = pack(sequences, budget)
    assert [id(one) for batch in batches for one in batch] == [id(one) for one in sequences]
    assert all(batches)
    for batch in batches:
        row = packed_row([one.prompt_ids for one in batch], [one.completion_ids for one in batch])
        assert len(row.tokens) <= budget or len(batch) == 1
        assert len(row.predicting) == sum(len(one.completion_ids) for one in batch)
    assert len(batches) == fewest(sequences, budget)


def fewest(sequences: list[TrainingSequence], budget: int) -> int:
    """Micro-batches where each takes the next sequence as long as it fits."""
    batches: list[list[TrainingSequence]] = []
    for one in sequences:
        more = [*(batches[-1] if batches else ()), one]
        row = packed_row([each.prompt_ids for each in more], [each.completion_ids for each in more])
        if batches and len(row.tokens) <= budget:
            batches[-1] = more
        else:
            batches.append([one])
    return len(batches)
