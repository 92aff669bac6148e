"""Advantages of turns: the formula against plain floats, and what it is with one turn."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo.config.schema import Loss
from grpo.training.advantages import compute_advantages
from grpo.training.turn_advantages import returns_of, turn_advantages

TURN = st.floats(-2, 2, width=16)
EPISODES = st.lists(st.tuples(TURN, st.lists(TURN, min_size=1, max_size=4)), min_size=2, max_size=5)
SETTINGS = Loss(advantage_level="turn")


def plain(group: list[tuple[float, list[float]]]) -> list[list[float]]:
    """The advantages of each turn of one group's episodes, (extra reward at the end, rewards of turns) each."""
    returns = [[sum(turns[place:]) + extra for place in range(len(turns))] for extra, turns in group]
    result = []
    for own in returns:
        result.append([])
        for turn, value in enumerate(own):
            others = [one[turn] for one in returns if len(one) > turn]
            spread = statistics.stdev(others) if len(others) > 1 else 0.0
            result[-1].append((value - statistics.fmean(others)) / (spread + 1e-4))
    return result


@given(st.lists(EPISODES, min_size=1, max_size=3).map(lambda groups: [g[: min(map(len, groups))] for g in groups]))
def test_advantages_of_turns_are_the_plain_formula(groups: list[list[tuple[float, list[float]]]]) -> None:
    total = torch.tensor([[extra + math.fsum(turns) for extra, turns in g] for g in groups], dtype=torch.float64)
    values, equal = turn_advantages(total, [[turns for _, turns in group] for group in groups], SETTINGS)
    for place, group in enumerate(groups):
        for member, wanted in enumerate(plain(group)):
            found = values[place, member]
            assert found[len(wanted) :].tolist() == [0.0] * (len(found) - len(wanted))
            assert found[: len(wanted)].tolist() == pytest.approx(wanted, abs=1e-7, rel=1e-7)
        assert not equal[place] or not values[place].any()


@given(st.lists(TURN, min_size=2, max_size=6), st.sampled_from(["group", "batch", "none"]))
def test_with_one_turn_they_are_those_of_completions(rewards: list[float], scale: str) -> None:
    settings = Loss(advantage_level="turn", scale_rewards=scale)
    total = torch.tensor([rewards, rewards[::-1]], dtype=torch.float64)
    values, equal = turn_advantages(total, [[[0.0]] * len(rewards)] * 2, settings)
    whole = compute_advantages(total[..., None], torch.ones(1), settings)
    assert torch.equal(values[..., 0], whole.values) and torch.equal(equal, whole.zero_std)


def test_an_episode_without_a_reward_is_in_no_baseline() -> None:
    total = torch.tensor([[1.0, float("nan"), 3.0]], dtype=torch.float64)
    values, equal = turn_advantages(total, [[[0.0, 1.0], [0.0], [0.0, 3.0]]], SETTINGS)
    assert values[0, 1].tolist() == [0.0, 0.0] and values[0, 0, 0] == -values[0, 2, 0] != 0 and not equal[0]


def test_returns() -> None:
    assert returns_of(3.0, [1.0, 0.5, 0.5]) == [3.0, 2.0, 1.5]
