"""The run log: what is kept is exact and resumable, what is shown is harmless whatever a model writes."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import subprocess
import sys
import unicodedata
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from grpo.config.schema import parse_config
from grpo.monitor.run_log import RunLog, json_line, printable
from grpo.run.library_logs import quiet_libraries
from grpo.run.samples import Sample, SampleGroup
from tests.helpers.paths import ROOT
from tests.helpers.report_run import episode

CONFIG = parse_config({"model": {"name": "m"}, "task": {"name": "t"}, "log": {"samples_every": 4}})
ESCAPES = "\x1b[2J\x1b]0;title\x07\x9b31m\u202e\u2066\r\x00\x7f"


class Screen:
    """A console that writes into memory, as a terminal or as a file."""

    def __init__(self, terminal: bool, width: int = 100):
        self.file = io.StringIO()
        self.console = Console(file=self.file, force_terminal=terminal, width=width, height=60, color_system=None)

    @property
    def text(self) -> str:
        return self.file.getvalue()


def metrics(step: int, **more: Any) -> dict[str, Any]:
    values = {
        "step": step,
        "reward": step / 10,
        "reward_std": 0.5,
        "rewards/correctness": step / 20,
        "rewards/correctness/std": 9.0,
        "rewards/format": 0.25,
        "completion_length": 31.5,
        "tokens_per_second": 1234.5,
        "kl": 0.001,
        "mismatch_kl": 0.0002,
        "step_seconds": 30.0,
    }
    return {**values, **more}


def entries(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def screen() -> Screen:
    return Screen(terminal=False)


@pytest.fixture
def log(tmp_path: Path, screen: Screen) -> Iterator[RunLog]:
    with RunLog(tmp_path, CONFIG, max_steps=10, console=screen.console) as log:
        yield log


def test_each_step_is_on_the_disk_as_one_json_object_once_it_is_logged(log: RunLog, tmp_path: Path) -> None:
    assert list(tmp_path.iterdir()) == []
    for step in (1, 2):
        log.step(metrics(step))
        assert entries(tmp_path / "metrics.jsonl")[-1] == metrics(step)
    assert len(entries(tmp_path / "metrics.jsonl")) == 2


def test_numbers_of_any_library_are_kept_and_those_that_json_cannot_say_become_null(
    log: RunLog, tmp_path: Path
) -> None:
    odd = {
        "a": math.nan,
        "b": -math.inf,
        "c": torch.tensor(0.5),
        "d": torch.tensor(math.nan),
        "e": numpy.float32(0.25),
        "f": numpy.int64(3),
        "g": {"h": (1, math.nan)},
    }
    log.step(metrics(1, **odd))
    text = (tmp_path / "metrics.jsonl").read_text()
    found = json.loads(text, parse_constant=pytest.fail)
    assert {key: found[key] for key in odd} == {
        "a": None, "b": None, "c": 0.5, "d": None, "e": 0.25, "f": 3, "g": {"h": [1, None]}
    }  # fmt: skip


def test_resuming_drops_later_steps_so_that_none_appears_twice(tmp_path: Path, screen: Screen) -> None:
    groups = [SampleGroup("q", "a", [Sample("x", 1.0, {})])]
    with RunLog(tmp_path, CONFIG, max_steps=6, console=screen.console) as log:
        log.evaluation(0, {"eval/accuracy": 0.1})
        for step in range(1, 6):
            log.step(metrics(step, run=1))
            log.samples(step, groups)
        log.evaluation(5, {"eval/accuracy": 0.9})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "rew')  # cut short by a crash
    with RunLog(tmp_path, CONFIG, max_steps=6, console=screen.console) as log:
        log.resume(3)
        for step in range(4, 7):
            log.step(metrics(step, run=2))
        log.finish({})
    found = entries(tmp_path / "metrics.jsonl")
    assert [(entry["step"], entry["run"]) for entry in found] == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2)]
    assert entries(tmp_path / "eval.jsonl") == [{"step": 0, "eval/accuracy": 0.1}]
    assert sorted(path.name for path in (tmp_path / "completions").iterdir()) == [f"step-{n}.jsonl" for n in (1, 2, 3)]
    # The summary knows the steps before the resumption.
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 6 and summary["seconds"] == 180 and summary["first"]["reward"] == pytest.approx(0.2)


def test_the_summary_compares_the_first_five_steps_with_the_last_five(
    log: RunLog, tmp_path: Path, screen: Screen
) -> None:
    log.evaluation(0, {"eval/accuracy": 0.125})
    for step in range(1, 11):
        log.step(metrics(step, **({"rewards/format": math.nan} if step == 2 else {})))
    log.evaluation(10, {"eval/accuracy": 0.75})
    log.finish({"adapter": tmp_path / "adapter", "extra": 1})
    summary = json.loads((tmp_path / "summary.json").read_text())
    wanted = {"reward": 0.3, "rewards/correctness": 0.15, "rewards/format": 0.25, "eval/accuracy": 0.125}
    assert summary["first"] == pytest.approx(wanted)
    wanted = {"reward": 0.8, "rewards/correctness": 0.4, "rewards/format": 0.25, "eval/accuracy": 0.75}
    assert summary["last"] == pytest.approx(wanted)
    assert summary["adapter"] == str(tmp_path / "adapter") and summary["extra"] == 1
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["hardware"]["cores"] >= 1 and summary["hardware"]["memory_gib"] > 0
    shown = screen.text[screen.text.index("Done: 10 steps in 5:00") :]
    assert " ".join(shown.split()).startswith(
        "Done: 10 steps in 5:00. first 5 steps last 5 steps change reward 0.300 0.800 +0.500 correctness "
        "0.150 0.400 +0.250"
    )
    assert f"The adapter is in {tmp_path / 'adapter'}" in shown.replace("\n", "")


@pytest.mark.parametrize("steps", range(1, 13))
def test_no_step_is_among_the_first_and_the_last(log: RunLog, tmp_path: Path, screen: Screen, steps: int) -> None:
    for step in range(1, steps + 1):
        log.step(metrics(step))
    log.finish({})
    summary = json.loads((tmp_path / "summary.json").read_text())
    count = min(5, max(1, steps // 2))
    means = [sum(numbers) / count / 10 for numbers in (range(1, count + 1), range(steps - count + 1, steps + 1))]
    assert [summary["first"]["reward"], summary["last"]["reward"]] == pytest.approx(means)
    assert f"first {count} steps" in screen.text or (count == 1 and "first step" in screen.text)


def test_a_run_without_a_single_step_ends_without_a_traceback(log: RunLog, tmp_path: Path) -> None:
    log.finish({})
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 0


def test_without_a_terminal_each_step_is_one_line(log: RunLog, screen: Screen) -> None:
    log.status("starting vLLM")
    log.step(metrics(1))
    log.status("sampling")
    log.step(metrics(2, kl=None))
    assert screen.text.splitlines() == [
        "starting vLLM",
        "step 1/10  reward 0.100 (correctness 0.050, format 0.250)  length 32  1,234 tokens/s  kl 0.00100  "
        "mismatch 0.00020  30.0 s  left 4:30",
        "step 2/10  reward 0.200 (correctness 0.100, format 0.250)  length 32  1,234 tokens/s  mismatch 0.00020  "
        "30.0 s  left 4:00",
    ]


def test_a_terminal_shows_rewards_speed_and_time_left_in_one_redrawn_table(tmp_path: Path) -> None:
    screen = Screen(terminal=True)
    with RunLog(tmp_path, CONFIG, max_steps=10, console=screen.console) as log:
        log.status("starting vLLM")
        log.step(metrics(1))
        log.step(metrics(2))
    last = screen.text[screen.text.rindex("step 2/10") :]
    assert "4:00 left" in last and "1,234 tokens/s" in last and "mismatch kl" in last
    rows = {line.split()[0]: line.split()[1:] for line in last.splitlines() if line.split()}
    assert rows["reward"] == ["0.200", "0.200", "0.100"]
    assert rows["correctness"] == ["0.100", "0.100", "0.050"]
    assert "starting vLLM" in screen.text and "starting vLLM" not in last


def test_a_held_out_line_says_each_figure_once_with_its_interval(log: RunLog, screen: Screen, tmp_path: Path) -> None:
    interval = {"eval/strict_accuracy/low": 0.33, "eval/strict_accuracy/high": 0.52}
    log.evaluation(
        0, {"eval/strict_accuracy": 0.42, **interval, "eval/pass@1": 0.42, "eval/pass@4": 0.6, "eval_seconds": 9.0}
    )
    assert screen.text == "held out after step 0: strict accuracy 0.420 [0.330, 0.520], pass@4 0.600\n"
    log.step(metrics(1))
    log.finish({})
    assert "pass@1" not in screen.text and "held-out pass@4" in screen.text
    assert entries(tmp_path / "eval.jsonl")[0]["eval/pass@1"] == 0.42


def test_the_answers_of_an_evaluation_are_kept_and_dropped_like_samples(
    log: RunLog, screen: Screen, tmp_path: Path
) -> None:
    for step in (0, 5):
        log.evaluation(step, {"eval/x": 0.5}, [SampleGroup("q", "a", [Sample(f"after {step}", 1.0, {"strict": 1.0})])])
    kept = tmp_path / "completions"
    assert entries(kept / "eval-5.jsonl")[0]["samples"][0]["text"] == "after 5"
    assert "after" not in screen.text.replace("held out after", ""), "questions of an evaluation are not printed"
    log.resume(3)
    assert sorted(path.name for path in kept.iterdir()) == ["eval-0.jsonl"]


def test_verbose_shows_lines_on_a_terminal_too(tmp_path: Path) -> None:
    screen = Screen(terminal=True)
    with RunLog(tmp_path, CONFIG, max_steps=10, verbose=True, console=screen.console) as log:
        log.step(metrics(1))
    assert screen.text.startswith("step 1/10") and len(screen.text.splitlines()) == 1


SAMPLES = [
    Sample("middling", 1.0, {"correctness": 1.0, "format": 0.0}, "5", 3, "stop"),
    Sample("the best\nanswer", 2.5, {"correctness": 2.0, "format": 0.5}, "4", 4, "stop"),
    Sample("the worst", None, {"correctness": None, "format": None}, None, 9, "length"),
]


def test_a_sample_shows_question_answer_best_and_worst_completion_and_their_rewards(
    log: RunLog, screen: Screen, tmp_path: Path
) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?"}]
    group = SampleGroup(chat, "4", SAMPLES, "sums")
    log.samples(3, [group, SampleGroup("not shown", None, SAMPLES)])
    shown = [" ".join(line.split()) for line in screen.text.splitlines()]
    for line in ("Sample of step 3", "question What is 2 + 2?", "answer 4", "best of 3 the best", "extracted 4",
                 "reward 2.5 (correctness 2, format 0.5)", "worst of 3 the worst",
                 "reward - (correctness -, format -)"):  # fmt: skip
        assert line in shown, line
    assert "middling" not in screen.text and "not shown" not in screen.text
    kept = entries(tmp_path / "completions" / "step-3.jsonl")
    assert len(kept) == 2 and kept[0]["prompt"] == chat and kept[0]["task"] == "sums"
    assert [sample["text"] for sample in kept[0]["samples"]] == ["middling", "the best\nanswer", "the worst"]
    assert kept[0]["samples"][1]["rewards"] == {"correctness": 2.0, "format": 0.5}


def test_of_an_episode_the_whole_conversation_is_shown(log: RunLog, screen: Screen) -> None:
    turns = episode(1, turns=3, text="seen \x1b[2J " + "x" * 2000)
    log.samples(3, [SampleGroup("Go.", None, [Sample("the last words", 1.0, {"tools": 1.0}, turns=turns)])])
    shown = " ".join(screen.text.split())
    for said in (
        "assistant: Turn 0 of step 1.",
        '"name": "look"',
        "tool: seen \\x1b[2J",
        "assistant: Turn 2 of step 1.",
    ):
        assert said in shown, said
    assert "x" * 500 not in shown.replace(" ", "") and "\x1b[2J" not in screen.text, "a turn is cut to its share"


def test_long_completions_are_cut_on_the_screen_and_whole_in_the_file(
    log: RunLog, screen: Screen, tmp_path: Path
) -> None:
    log.samples(1, [SampleGroup("q", None, [Sample("x" * 5000, 1.0, {})])])
    assert "(5000 characters)" in screen.text and screen.text.count("x") < 1000
    assert entries(tmp_path / "completions" / "step-1.jsonl")[0]["samples"][0]["text"] == "x" * 5000


@pytest.mark.parametrize("terminal", [True, False])
def test_what_a_model_writes_reaches_neither_the_terminal_nor_rich_as_a_command(tmp_path: Path, terminal: bool) -> None:
    screen = Screen(terminal, width=400)
    evil = f"[red]markup[/red] [/nonsense] {ESCAPES} :smile:"
    group = SampleGroup(evil, evil, [Sample(evil, 1.0, {evil: 1.0}, evil)])
    with RunLog(tmp_path, CONFIG, max_steps=3, console=screen.console) as log:
        log.status(evil)
        log.notice(evil)
        log.step(metrics(1, **{f"rewards/{evil}": 1.0}))
        log.samples(1, [group])
        log.finish({"adapter": evil})
    for command in ("\x1b[2J\x1b]", "\x1b]0;title", "\x07", "\x9b", "\u202e", "\u2066", "\x00", "\x7f"):
        assert command not in screen.text, repr(command)
    assert "[red]markup[/red] [/nonsense]" in screen.text and ":smile:" in screen.text
    assert "\\x1b[2J" in screen.text
    for path in (tmp_path / "metrics.jsonl", tmp_path / "completions" / "step-1.jsonl"):
        assert printable(path.read_text()) == path.read_text()
    assert entries(tmp_path / "completions" / "step-1.jsonl")[0]["samples"][0]["text"] == evil


@given(st.text(st.characters()))
def test_printable_text_has_no_control_character_but_tab_and_newline(text: str) -> None:
    shown = printable(text)
    assert not [c for c in shown if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") and c not in "\t\n"]
    shown.encode()


@given(st.text(st.characters()))
def test_a_json_line_is_one_harmless_line_that_reads_back_equal(text: str) -> None:
    line = json_line({"text": text})
    assert json.loads(line) == {"text": text}
    assert line.endswith("\n") and len(line.splitlines()) == 1 and printable(line) == line


def test_samples_are_wanted_on_the_first_the_last_and_every_nth_step(log: RunLog) -> None:
    assert [step for step in range(1, 11) if log.wants_samples(step)] == [1, 4, 8, 10]


def test_libraries_are_quiet_unless_verbose() -> None:
    script = """
import logging, os, sys, warnings
from grpo.run.library_logs import quiet_libraries
quiet_libraries(verbose="--verbose" in sys.argv)
import transformers
transformers.logging.get_logger("transformers.x").warning("CHATTER")
logging.getLogger("vllm.engine").warning("CHATTER")
warnings.warn_explicit("CHATTER", FutureWarning, "x.py", 1, module="transformers.models")
warnings.warn_explicit("OWN WARNING", UserWarning, "x.py", 1, module="my_rewards")
transformers.logging.get_logger("transformers.x").error("AN ERROR")
print(os.environ.get("VLLM_LOGGING_LEVEL"), os.environ["DATASETS_VERBOSITY"])
"""
    environment = {key: value for key, value in os.environ.items() if "VERBOS" not in key and "LOGGING" not in key}
    environment["PYTHONPATH"] = str(ROOT)

    def run(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", script, *arguments]
        return subprocess.run(command, env={**environment, **more}, capture_output=True, text=True)

    quiet = run(DATASETS_VERBOSITY="debug")
    assert quiet.stdout == "ERROR debug\n", quiet.stderr
    assert "CHATTER" not in quiet.stderr
    assert "AN ERROR" in quiet.stderr and "OWN WARNING" in quiet.stderr
    loud = run("--verbose", DATASETS_VERBOSITY="debug")
    assert loud.stdout == "None debug\n" and loud.stderr.count("CHATTER") == 3


def test_verbose_changes_nothing_in_this_process() -> None:
    before = (dict(os.environ), logging.getLogger("vllm").level, list(warnings.filters))
    quiet_libraries(verbose=True)
    assert (dict(os.environ), logging.getLogger("vllm").level, list(warnings.filters)) == before
