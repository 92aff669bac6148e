"""grpo/run/tied.py: what is started for a run ends with it, however the run ends, and by itself where it hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grpo.run import tied
from tests.helpers.paths import ROOT

HANGING = """
import os, sys, signal, pathlib
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
print("seen by nobody", flush=True); print("nor this", file=sys.stderr, flush=True)
pathlib.Path(sys.argv[1] + ".part").write_text(f"{os.getpid()} {os.environ['CUDA_VISIBLE_DEVICES']!r}")
os.rename(sys.argv[1] + ".part", sys.argv[1])
while True:
    sum(range(1000))
"""
PARENT = """
import sys, time
from grpo.run import tied
tied.start("hanging", sys.argv[1], seconds=60)
print("started", flush=True)
{end}
"""


def hanging(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that never ends; the file into which it writes its process's number."""
    (folder / "hanging.py").write_text(HANGING)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(ROOT)]))
    return folder / "number"


def number_in(file: Path) -> int:
    ends = time.monotonic() + 30
    while not file.exists():
        assert time.monotonic() < ends
        time.sleep(0.02)
    number, gpus = file.read_text().split()
    assert gpus == "''"
    return int(number)


def running(number: int) -> bool:
    """Whether there is such a process; one that ended and was not waited for is none."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def gone(number: int, seconds: float = 10) -> bool:
    ends = time.monotonic() + seconds
    while running(number) and time.monotonic() < ends:
        time.sleep(0.02)
    return not running(number)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_it_ends_with_whoever_started_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    file = hanging(tmp_path, monkeypatch)
    command = [sys.executable, "-c", PARENT.format(end="time.sleep(60)"), str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as parent:
        child = number_in(file)
        assert running(child)
        parent.send_signal(number)
        printed, said = parent.communicate(timeout=30)
    assert gone(child)
    assert printed == "started\n" and "nor this" not in said


@pytest.mark.parametrize("end", ["import os; os._exit(130)", "sys.exit(2)"])
def test_it_ends_with_a_parent_that_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    file = hanging(tmp_path, monkeypatch)
    wait = f"import os\nwhile not os.path.exists({str(file)!r}): time.sleep(0.02)\n"
    subprocess.run([sys.executable, "-c", PARENT.format(end=wait + end), str(file)], check=False, timeout=60)
    assert gone(number_in(file))


def test_one_that_comes_too_late_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = hanging(tmp_path, monkeypatch)
    late = [sys.executable, "-m", "grpo.run.tied", "1", "60", "hanging", str(file)]
    assert os.getpid() != 1 and subprocess.run(late, timeout=60, check=False).returncode == 1
    assert not file.exists()


def test_one_that_hangs_ends_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = hanging(tmp_path, monkeypatch)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    try:
        process = tied.start("hanging", str(file), seconds=2)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    assert process.wait(timeout=60) == -signal.SIGALRM


def test_files_in_the_current_folder_are_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ctypes.py").write_text("raise SystemExit(9)")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    assert tied.start("this", seconds=30).wait(timeout=60) == 0
