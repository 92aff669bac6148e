"""Alarms: which are raised, when they end, and that terminal, file and report say the same. Curves are made here.

How often they are false on real runs is in benchmarks/results/alarms.json, whose runs are judged again here.
"""

from __future__ import annotations

import io
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from benchmarks import alarms as benchmark
from grpo.config.schema import Alarms
from grpo.monitor.run_log import RunLog
from grpo.report.alarms import RULES, SAME_WINDOWS, TITLES, AlarmWatch, replayed, watch_of
from grpo.report.data import read_run
from grpo.report.page import render
from tests.helpers.paths import ROOT
from tests.helpers.report_run import run_config

STEPS = 60
RESULT = ROOT / "benchmarks" / "results" / "alarms.json"


def held_out(step: int, accuracy: float, half: float = 0.06) -> dict[str, Any]:
    found: dict[str, Any] = {"step": step}
    for kind in ("strict", "flexible"):
        found[f"eval/{kind}_accuracy"] = accuracy
        found |= {f"eval/{kind}_accuracy/low": accuracy - half, f"eval/{kind}_accuracy/high": accuracy + half}
    return found


def made(step: int, seed: int = 0, **changes: Callable[[float], float]) -> dict[str, Any]:
    """A step of a run that learns, with noise; `changes`: figures by the share of the run that is done."""
    done, noise = step / STEPS, random.Random(seed * 1000 + step)
    entry = {
        "reward": 0.5 + done + noise.gauss(0, 0.05),
        "reward_std": 0.5,
        "completion_length": 100 * (1 - 0.5 * done) * noise.uniform(0.9, 1.1),
        "clipped_ratio": 0.1,
        "entropy": 1.0 - 0.8 * done,
        "frac_reward_zero_std": 0.5 * done,
        "mismatch_kl": 0.001 * noise.uniform(0.5, 2.0),
    }
    return {"step": step, **entry, **{key: change(done) for key, change in changes.items()}}


def run(seed: int = 0, **changes: Callable[[float], float]) -> list[dict[str, Any]]:
    return [made(step, seed, **changes) for step in range(1, STEPS + 1)]


def names(watch: AlarmWatch) -> list[str]:
    return [alarm.name for alarm in watch.raised]


PLANTED: dict[str, dict[str, Callable[[float], float]]] = {
    "length_collapse": {"completion_length": lambda done: 100 if done < 0.5 else 10},
    "length_explosion": {"completion_length": lambda done: 100 * (1 + 4 * done)},
    "cut_completions": {"clipped_ratio": lambda done: done},
    "entropy_collapse": {"entropy": lambda done: 1.0 if done < 0.4 else 0.01},
    "equal_groups": {"frac_reward_zero_std": lambda done: 1.0 if done > 0.5 else 0.2},
    "adapter_survival": {"adapter_survival": lambda done: 0.2},
    "mismatch_kl": {"mismatch_kl": lambda done: 0.02},
    "mismatch_rise": {"mismatch_kl": lambda done: 0.0005 * (1 + 12 * done)},
}


@given(st.integers(0, 10**6))
def test_a_run_that_learns_raises_none(seed: int) -> None:
    watch = replayed(Alarms(), run(seed), [held_out(0, 0.3), held_out(30, 0.5), held_out(60, 0.7)])
    assert names(watch) == [] and not watch.standing


@pytest.mark.parametrize("name", RULES)
def test_each_alarm_is_raised_once_by_what_it_is_for_and_by_nothing_else(name: str) -> None:
    watch = replayed(Alarms(), run(**PLANTED[name]), [])
    assert names(watch) == [name] and list(watch.standing) == [name]
    (alarm,) = watch.raised
    assert re.search(r"\d", alarm.text) and f"alarms.{name} = " in alarm.said and alarm.title in alarm.said
    # The alarm comes after the step at which the figure went beyond the limit, and within a window of it.
    assert alarm.step <= STEPS


@pytest.mark.parametrize("name", [*RULES, "reward_without_accuracy"])
def test_none_switches_an_alarm_off_and_a_wider_limit_lets_more_pass(name: str) -> None:
    flat = [held_out(0, 0.3), held_out(60, 0.3)]
    steps = run(**PLANTED.get(name, {}))
    evaluations = [] if name in RULES else flat
    assert names(replayed(Alarms(), steps, evaluations)) == [name]
    assert names(replayed(Alarms.model_validate({name: "none"}), steps, evaluations)) == []
    below = name in ("length_collapse", "entropy_collapse", "adapter_survival")
    share = name in ("cut_completions", "equal_groups")
    wide = 0.001 if below else 1.0 if share else 1000.0
    assert names(replayed(Alarms.model_validate({name: wide}), steps, evaluations)) == []


@pytest.mark.parametrize(
    ("last", "said"), [(0.3, "did not rise beyond chance"), (0.1, "fell"), (0.36, "did not rise beyond chance")]
)
def test_a_reward_that_rises_without_accuracy_is_said_with_both(last: float, said: str) -> None:
    watch = replayed(Alarms(), run(), [held_out(0, 0.3), held_out(60, last)])
    (alarm,) = watch.raised
    assert alarm.name == "reward_without_accuracy" and alarm.step == 60
    assert f"accuracy {said}: from 30.0 % to {100 * last:.1f} % between steps 0 and 60" in alarm.text


def test_it_ends_when_accuracy_follows_and_is_not_raised_for_a_reward_that_stands_still() -> None:
    assert not replayed(Alarms(), run(), [held_out(0, 0.3), held_out(20, 0.3), held_out(60, 0.8)]).standing
    still = run(reward=lambda done: 0.5 + 0.01 * done)
    assert names(replayed(Alarms(), still, [held_out(0, 0.3), held_out(60, 0.3)])) == []


def test_lengths_may_change_where_accuracy_rises() -> None:
    steps = run(**PLANTED["length_collapse"])
    assert names(replayed(Alarms(), steps, [held_out(0, 0.3), held_out(20, 0.6)])) == []


def test_an_odd_step_raises_nothing_and_a_short_run_proves_nothing() -> None:
    odd = {"entropy": 0.0, "mismatch_kl": 0.9, "completion_length": 5000.0, "frac_reward_zero_std": 1.0}
    steps = [entry | (odd if entry["step"] % 10 == 5 else {}) for entry in run()]
    assert names(replayed(Alarms(), steps, [])) == []
    assert names(replayed(Alarms(), run(**PLANTED["equal_groups"])[-15:], [])) == []


def test_an_alarm_that_comes_back_soon_is_the_same_and_later_another() -> None:
    def steps(quiet: int) -> list[dict[str, Any]]:
        shares = [0.0] * 20 + [1.0] * 20 + [0.0] * quiet + [1.0] * 20
        return [{"step": at, "frac_reward_zero_std": share} for at, share in enumerate(shares, 1)]

    window = Alarms().window
    soon = replayed(Alarms(), steps(2 * window), [])
    assert len(soon.raised) == 1 and soon.standing["equal_groups"].alarm == soon.raised[0]
    assert len(replayed(Alarms(), steps((SAME_WINDOWS + 4) * window), []).raised) == 2


@given(st.dictionaries(st.sampled_from(benchmark.WATCHED), st.sampled_from([None, "x", float("nan"), True, -1.0, 0.0])))
def test_strange_figures_end_nothing(odd: dict[str, Any]) -> None:
    replayed(Alarms(), [entry | odd for entry in run()], [{"step": 0}, held_out(60, 0.0, 0.0)])


# Where they are said


def logged(folder: Path, terminal: bool = False) -> str:
    """A run whose groups become equal, as its log shows it."""
    config = run_config(folder, train={"max_steps": STEPS})
    folder.mkdir(parents=True)
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=150, color_system=None)
    with RunLog(folder, config, max_steps=STEPS, console=console) as log:
        for entry in run(**PLANTED["equal_groups"]):
            log.step(entry)
        log.finish({"adapter": "a"})
    return screen.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_terminal_file_summary_and_report_say_the_same(tmp_path: Path, terminal: bool) -> None:
    shown = logged(tmp_path / "run", terminal)
    (line,) = [json.loads(text) for text in (tmp_path / "run" / "alarms.jsonl").read_text().splitlines()]
    assert line["alarm"] == "equal_groups" and line["value"] == 1.0 and line["limit"] == 0.9
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["alarms"] == [line]
    assert shown.count(f"alarm, step {line['step']}: {line['text']}") == 1
    assert "Alarms: groups without variance; docs/alarms.md says what to look at" in shown
    assert ("alarm: groups without variance" in shown) == terminal, "the live table names those that stand"
    page = render([read_run(tmp_path / "run")])
    assert "Groups without variance" in page and line["text"] in page and f"since step {line['step']}" in page
    assert [alarm.entry() for alarm in watch_of(read_run(tmp_path / "run")).raised] == [line]


def test_a_resumed_run_knows_its_alarms(tmp_path: Path) -> None:
    logged(tmp_path / "run")
    raised = json.loads((tmp_path / "run" / "alarms.jsonl").read_text())["step"]
    config = run_config(tmp_path / "run", train={"max_steps": STEPS})
    for step, count in ((raised + 2, 0), (raised - 2, 1)):
        screen = io.StringIO()
        with RunLog(tmp_path / "run", config, max_steps=STEPS, console=Console(file=screen, width=200)) as log:
            log.resume(step)
            for entry in run(**PLANTED["equal_groups"])[step:]:
                log.step(entry)
        assert screen.getvalue().count("alarm, step") == count
        assert len((tmp_path / "run" / "alarms.jsonl").read_text().splitlines()) == 1


# What is written about them


def test_every_alarm_has_its_setting_and_its_page() -> None:
    page = (ROOT / "docs" / "alarms.md").read_text()
    assert set(TITLES) == {*RULES, "reward_without_accuracy"} == set(Alarms.model_fields) - {"window"}
    headings = re.findall(r"^## (.+)$", page, re.MULTILINE)
    assert set(TITLES.values()) <= set(headings)
    for name, title in TITLES.items():
        part = page.split(f"## {title}\n")[1].split("\n## ")[0]
        default = Alarms.model_fields[name].default
        assert f"`alarms.{name} = {default:g}`" in part, f"{title} names its setting and default"


def test_recorded_runs_are_judged_as_the_result_says() -> None:
    assert json.loads(RESULT.read_text())["recorded"] == benchmark.judge_recorded()


def test_runs_that_learn_raise_no_alarm_and_planted_ones_theirs() -> None:
    result = json.loads(RESULT.read_text())
    if "runs" not in result:
        pytest.skip("no new runs are recorded")
    assert benchmark.judged(result["runs"]) == result["judged"]
    for one in result["runs"]:
        assert [[alarm.name, alarm.step] for alarm in benchmark.watch_of(one).raised] == one["alarms"]
