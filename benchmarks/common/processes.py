"""Processes that a benchmark starts, waited for so long and ended with whatever they started; and what it writes.

They stay in the benchmark's process group, so that whoever ends that group ends them too. A result is written whenever
there is more of it, so that a benchmark that is ended leaves what it has measured.
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from grpo.run.versions import hardware, versions

TIME_UP = "stopped: the time was up"


def wait_or_end(process: subprocess.Popen[bytes], seconds: float) -> str | None:
    """None after a good end within so many seconds, else what happened; nothing of it runs on."""
    try:
        code = process.wait(max(0.1, seconds))
        return f"exit code {code}" if code else None
    except subprocess.TimeoutExpired:
        return TIME_UP
    finally:
        end(process)


@contextmanager
def turn(file: Path | None) -> Iterator[None]:
    """Inside, no other process that asks for a turn by the same file has one; without a file at once."""
    if file is None:
        yield
        return
    with open(file, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill `process` and its descendants."""
    end_family(process.pid)
    process.wait()


def end_family(pid: int) -> None:
    """Kill a process and its descendants."""
    try:
        first = psutil.Process(pid)
        family = [first, *first.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            pass


def write_result(file: Path | None, result: dict[str, Any]) -> None:
    """Note in `result` what it was measured on, and write it to `file`, if there is one, whole or not at all."""
    result |= {"hardware": hardware() | {"gpus": gpu_names()}, "versions": versions()}
    if file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    part.write_text(json.dumps(result, indent=1, default=str) + "\n")
    part.replace(file)


def gpu_names() -> list[str]:
    """The GPUs that this process may use. CUDA is not started, which would take memory."""
    if not (handles := nvml_handles()):
        return []
    import pynvml

    return [pynvml.nvmlDeviceGetName(handle) for handle in handles]


@functools.cache
def nvml_handles() -> list[Any]:
    """NVML's handles of the GPUs that CUDA_VISIBLE_DEVICES leaves; none without NVML."""
    if find_spec("pynvml") is None:
        return []
    import pynvml

    try:
        pynvml.nvmlInit()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        numbers = range(pynvml.nvmlDeviceGetCount()) if visible is None else map(int, filter(None, visible.split(",")))
        return [pynvml.nvmlDeviceGetHandleByIndex(number) for number in numbers]
    except (pynvml.NVMLError, ValueError):  # no driver; GPUs named by their UUID
        return []
