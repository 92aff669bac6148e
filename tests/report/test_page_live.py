"""The report while a run goes on: how often it is written, that it is never found in parts, and after a resume."""

from __future__ import annotations

import io
import itertools
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from grpo.monitor.run_log import RunLog
from grpo.report import page as report
from grpo.report.page import LiveReport, write_report
from tests.helpers.report_page import Page, copied, page_of
from tests.helpers.report_run import metrics, run_config, write_run


class Clock:
    """Seconds that pass only when a report is written or a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cost: float):
        self.now, self.written = 0.0, list[float]()
        monkeypatch.setattr(report, "write_report", self.write)
        self._cost = cost

    def __call__(self) -> float:
        return self.now

    def write(self, *arguments: Any, **options: Any) -> None:
        self.now += self._cost
        self.written.append(self.now)


@pytest.mark.parametrize("step_seconds", [0.05, 2.0, 300.0])
def test_reports_take_at_most_a_hundredth_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step_seconds: float
) -> None:
    clock = Clock(monkeypatch, cost=0.25)
    live = LiveReport(tmp_path, pytest.fail, clock)
    live.update(500)
    assert len(clock.written) == 1, "the first step is reported at once"
    for _ in range(499):
        clock.now += step_seconds
        live.update(500)
    spent = 0.25 * len(clock.written)
    assert spent <= 0.01 * clock.now + 0.25
    assert len(clock.written) >= min(500, int(0.009 * clock.now / 0.25)), "and no more seldom than that"


def test_the_last_step_is_always_in_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Each look at the clock is an hour after the one before, so a report seems to take an hour.
    clock = itertools.count(0, 3600)
    monkeypatch.setattr(report.LiveReport.__init__, "__defaults__", (lambda: next(clock),))
    folder = write_run(tmp_path / "stopped", 7, finished=False)
    page = Page(folder / "report.html")
    assert "step 7 of 7" in page.text and page.charts()["Reward"]["series"][0]["x"][-1] == 7
    assert page.data["end"] == 7


def test_a_reader_never_finds_half_a_report(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = copied(run, tmp_path / "copy")
    before = (copy / "report.html").read_bytes()
    monkeypatch.setattr(Path, "replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    said: list[str] = []
    live = LiveReport(copy, said.append)
    for _ in range(3):
        live.update(40)
        live.flush()
    assert (copy / "report.html").read_bytes() == before
    assert said == [
        "report.html cannot be written (OSError: [Errno 28] No space left on device); the run goes on without it"
    ]
    assert not [path for path in copy.iterdir() if path.name.startswith(".report")]


def test_no_report_is_written_where_the_configuration_says_so(tmp_path: Path) -> None:
    config = run_config(tmp_path / "quiet", log={"report": False})
    assert not (write_run(tmp_path / "quiet", 2, config=config) / "report.html").exists()


def test_a_report_is_read_while_lines_are_being_written(run: Path, tmp_path: Path) -> None:
    copy = copied(run, tmp_path / "copy")
    for name in ("metrics.jsonl", "eval.jsonl", "completions/step-1.jsonl"):
        with (copy / name).open("a") as file:
            file.write('{"step": 41, "rew')
    (copy / "summary.json").write_text('{"steps"')
    page = page_of(copy, out=tmp_path / "out.html")
    assert "step 40 of 40" in page.text


def test_a_write_is_cheap_beside_a_step(run: Path, tmp_path: Path) -> None:
    write_report([run], tmp_path / "out.html")
    started = time.process_time()
    write_report([run], tmp_path / "out.html")
    assert time.process_time() - started < 0.5


def test_a_resumed_run_reports_no_step_twice(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 6, finished=False)
    with RunLog(folder, run_config(folder), max_steps=6, console=Console(file=io.StringIO())) as log:
        log.resume(3)
        for step in range(4, 7):
            log.step(metrics(step, 6, reward=9.0))
    (reward,) = Page(folder / "report.html").charts()["Reward"]["series"]
    assert reward["x"] == [1, 2, 3, 4, 5, 6] and reward["y"][3:] == [9, 9, 9]
