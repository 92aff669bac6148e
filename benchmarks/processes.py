"""Processes that a benchmark starts: waited for so long, and ended together with whatever they started themselves.

They stay in the benchmark's process group, so that whoever ends that group ends them too.
"""

from __future__ import annotations

import subprocess

import psutil


def wait_or_end(process: subprocess.Popen[bytes], seconds: float) -> str | None:
    """None after a good end within so many seconds, else what happened; nothing of it runs on."""
    try:
        code = process.wait(max(0.1, seconds))
        return f"exit code {code}" if code else None
    except subprocess.TimeoutExpired:
        return "stopped: the time was up"
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill `process` and its descendants."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    process.kill()
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            pass
    process.wait()
