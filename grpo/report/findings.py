"""What the figures of a run suggest, as sentences: what went well, and what deserves a look and why.

Each rule is one that `docs/tutorial.md` explains under "Reading the metrics" and "When the reward stays flat"; none is
more than a hint. Compared are the first and the last fifth of the steps, so that single noisy steps say nothing. What
deserves a look as soon as it is seen is an alarm: alarms.py.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from grpo.report.data import RunData

FEWEST_STEPS = 15
"""With fewer steps nothing is said about a trend."""
EQUAL_GROUPS, CUT_SHARE, WAITING_SHARE = 0.5, 0.2, 0.25
STEEP_GRADIENT = 5
FEWEST_CALLS, FAILED_CALLS, LOST_EPISODES = 0.02, 0.3, 0.05


@dataclass(frozen=True)
class Finding:
    """One sentence or two."""

    good: bool
    text: str


def findings(run: RunData, alarms: Collection[str] = ()) -> list[Finding]:
    """What is worth saying of `run` besides its `alarms`, the good first; nothing for a run of a few steps."""
    if len(run.steps) < FEWEST_STEPS:
        return []
    sentences = [
        *reward_trend(run),
        *held_out(run),
        *(() if "equal_groups" in alarms else comparisons(run)),
        *(() if "cut_completions" in alarms else lengths(run)),
        *stability(run),
        *speed(run),
        *episodes(run),
    ]
    return sorted(sentences, key=lambda finding: not finding.good)


def fifths(run: RunData, key: str) -> tuple[float, float] | None:
    """Means over the first and the last fifth of the steps that have the metric; None where too few have."""
    values = run.known(key)
    if len(values) < FEWEST_STEPS:
        return None
    size = len(values) // 5
    return statistics.fmean(values[:size]), statistics.fmean(values[-size:])


def recent(run: RunData, key: str) -> float | None:
    """The mean over the last fifth."""
    both = fifths(run, key)
    return None if both is None else both[1]


def reward_trend(run: RunData) -> Iterator[Finding]:
    both = fifths(run, "reward")
    if both is None:
        return
    values = run.known("reward")
    size = len(values) // 5
    # Two standard errors of a difference of means, from how much neighbouring steps differ.
    steps = [b - a for a, b in zip(values, values[1:], strict=False)]
    error = 2 * statistics.pstdev(steps) / math.sqrt(size)
    span = f"from {both[0]:.3g} (mean of the first {size} steps) to {both[1]:.3g} (of the last {size})"
    if both[1] - both[0] > error:
        yield Finding(True, f"The reward rose {span}.")
    elif both[0] - both[1] > error:
        yield Finding(
            False, f"The reward fell {span}. A lower train.learning_rate or a small loss.beta holds it near its start."
        )
    else:
        yield Finding(
            False,
            f"The reward is flat: {span}. Look at groups without spread first, then read the completions; the order in "
            'which to go on is in docs/tutorial.md, "When the reward stays flat".',
        )


def held_out(run: RunData) -> Iterator[Finding]:
    if len(run.evaluations) < 2:
        return
    first, last = run.evaluations[0], run.evaluations[-1]
    strict, flexible = change(first, last, "strict_accuracy"), change(first, last, "flexible_accuracy")
    if strict is None:
        return
    said = (
        f"held-out accuracy went from {100 * first['eval/strict_accuracy']:.1f} % to "
        f"{100 * last['eval/strict_accuracy']:.1f} % (strict) between steps {first['step']} and {last['step']}"
    )
    if strict > 0:
        yield Finding(True, f"{said[0].upper()}{said[1:]}.")
        if flexible == 0:
            yield Finding(
                False,
                "Strict accuracy rose and flexible accuracy did not beyond its interval: so far the model has learned "
                "the format rather than to answer.",
            )
    elif strict < 0:
        yield Finding(False, f"{said[0].upper()}{said[1:]}; eval.keep_best kept the best adapter.")


def change(first: dict[str, Any], last: dict[str, Any], name: str) -> int | None:
    """-1, 0 or 1: whether an accuracy changed by more than either interval reaches; None where it is not known."""
    key = f"eval/{name}"
    if not all(f"{key}{end}" in entry for entry in (first, last) for end in ("", "/low", "/high")):
        return None
    if last[key] > first[f"{key}/high"] and first[key] < last[f"{key}/low"]:
        return 1
    return -1 if last[key] < first[f"{key}/low"] and first[key] > last[f"{key}/high"] else 0


def comparisons(run: RunData) -> Iterator[Finding]:
    equal = recent(run, "frac_reward_zero_std")
    if equal is not None and equal > EQUAL_GROUPS:
        yield Finding(
            False,
            f"{100 * equal:.0f} % of the last groups have equal rewards and teach nothing. With a reward near its top "
            "the task has become easy; near its bottom it is too hard, or the format is never hit.",
        )


def lengths(run: RunData) -> Iterator[Finding]:
    cut = recent(run, "clipped_ratio")
    if cut is not None and cut > CUT_SHARE:
        yield Finding(
            False,
            f"{100 * cut:.0f} % of the last completions were cut at rollout.max_completion_length before they ended. "
            "Raise it, or punish the last stretch with length_penalty.",
        )


def stability(run: RunData) -> Iterator[Finding]:
    limit, norm = run.setting("train", "max_grad_norm"), recent(run, "grad_norm")
    if limit and norm is not None and norm > STEEP_GRADIENT * limit:
        yield Finding(
            False,
            f"The gradient's norm is {norm:.3g} and is scaled down to {limit:g} at every step: the learning rate says "
            "less than it seems to.",
        )


def speed(run: RunData) -> Iterator[Finding]:
    waited, step = recent(run, "reward_seconds"), recent(run, "step_seconds")
    if waited and step and waited > WAITING_SHARE * step:
        yield Finding(
            False,
            f"{100 * waited / step:.0f} % of a step is waiting for rewards after the last completion: a reward "
            "function is the bottleneck.",
        )


def episodes(run: RunData) -> Iterator[Finding]:
    """What the figures of `[environment]` say."""
    calls, errors = recent(run, "environment/calls"), recent(run, "environment/call_errors")
    if calls is not None and calls < FEWEST_CALLS:
        yield Finding(
            False,
            "The tool is as good as never called. Show a call in the prompt, reward one, or warm up with examples "
            "(python -m grpo.sft).",
        )
    elif calls and errors is not None and errors > FAILED_CALLS * calls:
        yield Finding(False, f"{100 * errors / calls:.0f} % of the calls fail. Read some: is it the tool or its use?")
    lost = recent(run, "environment/lost")
    if lost is not None and lost > LOST_EPISODES:
        yield Finding(
            False, f"{100 * lost:.0f} % of the episodes are lost to errors of the environment; the output names them."
        )
    full = recent(run, "environment/out_of_room")
    if full is not None and full > CUT_SHARE:
        yield Finding(
            False,
            f"{100 * full:.0f} % of the episodes end because nothing fits any more; rollout.max_completion_length is "
            "for all turns together.",
        )
    waited, rollout = recent(run, "environment_wait_seconds"), recent(run, "rollout_seconds")
    if waited and rollout and waited > WAITING_SHARE * rollout:
        latency = run.setting("environment", "latency_steps")
        yield Finding(
            False,
            f"environment.latency_steps = {latency} is too small: the engine waits for the environment in "
            f"{100 * waited / rollout:.0f} % of a rollout. A larger one lets others' turns go on meanwhile.",
        )
