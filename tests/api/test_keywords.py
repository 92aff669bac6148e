"""Keyword arguments become tables of the configuration; an unknown one is refused with the nearest."""

from __future__ import annotations

from typing import Any

import pytest

from grpo.api.keywords import SECTIONS, tables_of, with_lengths
from grpo.errors import UserError


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_step": 3}, "policy.train: there is no keyword 'max_step'; did you mean 'max_steps'?"),
        ({"reward": []}, "policy.train: there is no keyword 'reward'; did you mean 'rewards'?"),
        ({"zzz": 1}, "policy.train: there is no keyword 'zzz'; docs/config.md lists them all"),
        ({"load_in_4bit": True}, "policy.train: 'load_in_4bit' is decided when the model is loaded; pass it to"),
        ({"every": 5}, "policy.train: 'every' belongs to eval; write eval={'every': ...}"),
        ({"rollout": 3}, "policy.train: rollout = 3 must be a dict of [rollout] keys"),
    ],
)
def test_a_keyword_that_is_none_is_told_with_the_nearest(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as error:
        tables_of(settings, "policy.train", [*SECTIONS[:-1], "eval"], ("task", "rewards"))
    assert str(error.value).startswith(expected)


def test_keywords_go_where_the_configuration_has_them() -> None:
    tables = tables_of(
        {"max_steps": 3, "num_generations": 4, "beta": 0.1, "eval": {"every": 2}, "train": {"seed": 7}},
        "policy.train",
        [*SECTIONS, "eval"],
    )
    assert tables == {
        "train": {"max_steps": 3, "seed": 7},
        "rollout": {"num_generations": 4},
        "loss": {"beta": 0.1},
        "eval": {"every": 2},
    }


@pytest.mark.parametrize(
    ("longest", "given", "expected"),
    [
        (4096, {}, (512, 512)),
        (200, {}, (100, 100)),
        (700, {"max_completion_length": 600}, (100, 600)),
        (None, {"max_completion_length": 600}, (None, 600)),
        (100, {"max_prompt_length": 90, "max_completion_length": 90}, (90, 90)),
    ],
)
def test_open_lengths_are_made_to_fit_the_longest_sequence(
    longest: int | None, given: dict[str, int], expected: tuple[int | None, int]
) -> None:
    model = {"max_seq_length": longest} if longest else {}
    rollout = with_lengths({"model": model, "rollout": given})["rollout"]
    assert (rollout.get("max_prompt_length"), rollout.get("max_completion_length")) == expected
