"""The tasks of several turns, played by hand: what is right, what it is worth, and rows that differ."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.tasks import calculator, nim
from grpo.tasks.common import Row, load_task
from tests.helpers.task_files import refusal


def played(play: Any, row: Row, say: Callable[[list[dict[str, str]]], str], turns: int = 6) -> dict[str, Any]:
    """The result of an episode in which the policy says `say(messages)`."""
    said: list[str] = []

    async def sample(messages: list[dict[str, str]]) -> Any:
        said.append(say(messages))
        message = {"role": "assistant", "content": said[-1]}
        return SimpleNamespace(text=said[-1], message=message, last=len(said) == turns)

    return asyncio.run(play(row, sample))


def left_of(messages: list[dict[str, str]]) -> int:
    """The heap that the last message tells of."""
    said = re.search(r"(\d+) coins? (is|are) left", messages[-1]["content"])
    assert said is not None
    return int(said.group(1))


def best(heap: int) -> str:
    return str(heap % 4 or 1)


# Nim


def test_who_plays_well_wins_nearly_every_game() -> None:
    rows = load_task("nim", {"rows": 200}).train
    won = sum(played(nim.play, row, lambda messages: best(left_of(messages)))["success"] for row in rows)
    lost_by_rule = [row for row in rows if row["heap"] % 4]
    assert won > 180
    assert all(played(nim.play, row, lambda messages: best(left_of(messages)))["success"] for row in lost_by_rule)


def test_any_moves_win_some_games_and_an_opponent_of_skill_fewer() -> None:
    rows, draw = load_task("nim", {"rows": 300}).train, random.Random(0)

    def won(skill: float) -> float:
        async def play(row: Row, sample: Any) -> dict[str, Any]:
            return await nim.play(row, sample, skill=skill)

        move = lambda messages: str(draw.randint(1, min(3, left_of(messages))))  # noqa: E731
        return sum(played(play, row, move)["success"] for row in rows) / len(rows)

    assert 0.35 < won(0.0) < 0.65 and won(1.0) < 0.25


@pytest.mark.parametrize("said", ["", "4", "0", "two", "2 3", "I take 2", "22"])
def test_what_is_no_move_loses_at_once(said: str) -> None:
    (row,) = load_task("nim", {"rows": 1, "held_out": 0}).train
    assert played(nim.play, row, lambda messages: said) == {
        "reward": 0.0,
        "success": False,
        "metrics": {"illegal": 1.0},
    }


def test_a_game_lost_by_the_rules_is_worth_more_than_one_that_was_not_played() -> None:
    rows = load_task("nim", {"rows": 50}).train
    results = [played(nim.play, row, lambda messages: "1") for row in rows]
    assert {result["reward"] for result in results} == {nim.PLAYED, 1.0}


@given(st.integers(4, 30), st.integers(0, 10))
def test_the_opponent_takes_what_there_is(heap: int, seed: int) -> None:
    draw = random.Random(seed)
    for coins in range(1, heap):
        assert 1 <= nim.opponent(coins, draw, 0.5) <= min(3, coins)
        assert coins % 4 == 0 or nim.opponent(coins, draw, 1.0) == coins % 4


def test_a_game_too_small_is_refused() -> None:
    assert "low" in refusal(lambda: load_task("nim", {"low": 3}))


# Calculator


def test_the_calculator_answers_and_the_answer_counts() -> None:
    (row,) = load_task("calculator", {"rows": 1, "held_out": 0}).train
    asked = f"<calc>{row['question']}</calc>"
    opening = len(row["prompt"])
    right = played(calculator.play, row, lambda m: asked if len(m) == opening else m[-1]["content"], turns=3)
    assert right == {"reward": 1.0, "success": True}
    wrong = played(calculator.play, row, lambda m: asked if len(m) == opening else "7", turns=3)
    assert wrong == {"reward": calculator.ASKED_RIGHT, "success": False}
    guessed = played(calculator.play, row, lambda m: row["answer"], turns=3)
    assert guessed == {"reward": 0.0, "success": True}
