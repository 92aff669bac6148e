"""Benchmarks that are tables: no row costs another, and what has been measured is on the disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.paths import ROOT

SCRIPT = """
import os, sys, time
from benchmarks.common import rows

def measurer(options):
    print("loaded")
    pid = os.getpid()

    def measure(row):
        rows.tell({"begun": True})
        if row["way"] == "raises":
            raise ValueError("no such weather")
        if row["way"] == "dies":
            os._exit(7)
        if row["way"] == "hangs":
            time.sleep(100)
        return {"pid": pid, "figure": 2.5}

    if options.device == "nowhere":
        raise OSError("nothing to load")
    return measure

options = rows.parser("A table.", rank=4, chunk=8).parse_args()
jobs = [[{"way": way} for way in job.split("+")] for job in os.environ["JOBS"].split(",")]
conclude = lambda measured: {"benchmark": "test", "good": sum("figure" in row for row in measured)}
sys.exit(rows.run(options, jobs, measurer, lambda row: f"{row['way']} {row['figure']}", conclude))
"""


@pytest.fixture
def start(tmp_path: Path) -> Any:
    """Starts the script on jobs such as "good+raises,good", rows and jobs in this order; it writes `tmp_path`/out."""
    (tmp_path / "script.py").write_text(SCRIPT)

    def started(jobs: str, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(tmp_path / "script.py"), "--out", str(tmp_path / "out"), *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "JOBS": jobs}
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True,
            # A job in the background of a shell ignores the signal, and so would what it starts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip

    return started


def test_a_row_that_fails_keeps_its_reason_and_what_it_has_and_costs_no_other(start: Any, tmp_path: Path) -> None:
    output, _ = start("good+good+raises+good+dies,good").communicate(timeout=60)
    result = json.loads((tmp_path / "out").read_text())
    assert json.loads(output.splitlines()[-1]) == result
    assert {"benchmark", "hardware", "versions"} <= result.keys() and result["good"] == 4
    rows = result["rows"]
    assert [row["way"] for row in rows] == ["good", "good", "raises", "good", "dies", "good"]
    assert [row.get("figure") for row in rows] == [2.5, 2.5, None, 2.5, None, 2.5]
    assert all(row["begun"] for row in rows)
    assert rows[2]["failed"].startswith("exit code 1") and rows[2]["failed"].endswith("ValueError: no such weather")
    assert rows[4]["failed"].startswith("exit code 7")
    # A process for a job, and a new one where the first ended early.
    assert rows[0]["pid"] == rows[1]["pid"] and len({row["pid"] for row in rows if "pid" in row}) == 3
    assert "good 2.5" in output and "way dies: exit code 7" in output


def test_rows_without_time_left_say_so(start: Any, tmp_path: Path) -> None:
    output, _ = start("good+hangs+good,good", "--budget", "2").communicate(timeout=60)
    rows = json.loads((tmp_path / "out").read_text())["rows"]
    assert [row.get("figure") for row in rows] == [2.5, None, None, None]
    assert all("the time was up" in row["failed"] for row in rows[1:])


def test_what_cannot_be_loaded_fails_all_its_rows_once(start: Any, tmp_path: Path) -> None:
    start("good+good,good", "--device", "nowhere").communicate(timeout=60)
    rows = json.loads((tmp_path / "out").read_text())["rows"]
    assert [row["failed"].endswith("OSError: nothing to load") for row in rows] == [True] * 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_script_leaves_the_rows_it_has(start: Any, tmp_path: Path, number: int) -> None:
    script = start("good+hangs")
    end = time.monotonic() + 30
    while time.monotonic() < end and not ((tmp_path / "out").exists() and "hangs" in (tmp_path / "out").read_text()):
        time.sleep(0.05)
    os.killpg(script.pid, number)
    script.communicate(timeout=30)
    rows = json.loads((tmp_path / "out").read_text())["rows"]
    assert [row.get("figure") for row in rows] == [2.5, None]
