"""What the report says of a run in words: each trouble is named, and a healthy run gets no warning."""

from __future__ import annotations

from typing import Any

import pytest

from grpo.report.data import RunData
from grpo.report.findings import findings
from tests.helpers.report_run import held_out, metrics


def run_of(steps: int = 40, **changes: Any) -> RunData:
    """The simulated run with some metrics replaced by functions of the share of the run that is done."""
    made = [metrics(step, steps) for step in range(1, steps + 1)]
    series = {key: [entry[key] for entry in made] for key in made[0] if key != "step"}
    for key, function in changes.items():
        series[key] = [function(step / steps) for step in range(1, steps + 1)]
    return RunData("r", list(range(1, steps + 1)), series, config={"train": {"max_grad_norm": 1.0}})


def said(run: RunData) -> list[str]:
    return [finding.text for finding in findings(run)]


def test_a_healthy_run_gets_one_good_finding() -> None:
    (finding,) = findings(run_of())
    assert finding.good and finding.text.startswith("The reward rose from 0.678")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"reward": lambda done: 0.5 + 0.1 * (int(done * 40) % 3)}, "The reward is flat"),
        ({"reward": lambda done: 2 - done}, "The reward fell"),
        ({"frac_reward_zero_std": lambda done: done}, "of the last groups have equal rewards"),
        ({"clipped_ratio": lambda done: 0.5 * done}, "were cut at rollout.max_completion_length"),
        ({"grad_norm": lambda done: 50.0}, "The gradient's norm is 50"),
        ({"reward_seconds": lambda done: 4.0}, "40 % of a step is waiting for rewards"),
        ({"environment/calls": lambda done: 0.0}, "The tool is as good as never called"),
        (
            {"environment/calls": lambda done: 2.0, "environment/call_errors": lambda done: 1.0},
            "50 % of the calls fail",
        ),
        ({"environment/lost": lambda done: 0.1}, "10 % of the episodes are lost"),
        ({"environment/out_of_room": lambda done: 0.5}, "50 % of the episodes end because nothing fits"),
        (
            {"environment_wait_seconds": lambda done: 2.0, "rollout_seconds": lambda done: 5.0},
            "is too small: the engine waits for the environment in 40 % of a rollout",
        ),
    ],
)
def test_each_trouble_is_named(changes: dict[str, Any], sentence: str) -> None:
    assert [text for text in said(run_of(**changes)) if sentence in text]


def test_format_and_skill_are_told_apart() -> None:
    run = run_of()
    run.evaluations = [{"step": 0, **held_out(0.2)}, {"step": 40, **held_out(0.6)}]
    assert not [text for text in said(run) if "learned the format" in text]
    flexible = {key: value for key, value in held_out(0.2).items() if "flexible" in key}
    run.evaluations[1] |= flexible
    assert [text for text in said(run) if "learned the format" in text]
    run.evaluations = run.evaluations[::-1]
    assert [text for text in said(run) if "keep_best kept the best adapter" in text]


def test_a_few_steps_prove_nothing() -> None:
    assert findings(run_of(steps=10)) == []
