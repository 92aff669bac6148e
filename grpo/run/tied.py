"""Processes that do something ahead for a run and never outlive it: python -m grpo.run.tied PARENT SECONDS MODULE ...

Runs MODULE as `python -m MODULE ...` would, after it has arranged with Linux that it ends when PARENT does, however
that ends, and after SECONDS at the latest, whatever it does then. That comes before the first slow import, so no
process is without it for longer than Python takes to start. It yields to the run, prints nothing and sees no GPU.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

DONE, PARTLY = 0, 3
"""Exit codes of a process that went through all its work: all of it done, or some that cannot be."""
PR_SET_PDEATHSIG = 1
NICER = 5
"""Steps of priority below the run's."""


def start(module: str, *arguments: str, seconds: int) -> subprocess.Popen[bytes]:
    """Start `module` so; it ends with the calling thread. Raises OSError where there can be no further process."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    ours = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "grpo.run.tied", str(os.getpid()), str(seconds), module, *arguments],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | ours,
    )  # fmt: skip


def tie(parent: int, seconds: int) -> None:
    """End this process with `parent`, and after `seconds`."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # by the system itself: Python's handlers wait for C code to return
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    signal.alarm(seconds)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before it could be watched
        os._exit(1)
    os.nice(NICER)


def main(arguments: list[str]) -> None:
    tie(int(arguments[0]), int(arguments[1]))
    sys.argv = arguments[2:]
    runpy.run_module(arguments[2], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
