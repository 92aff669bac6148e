"""Reward functions that misbehave in every way at once, step after step: the trainer's process stays as it was.

Each function is well on most steps and fails in its own way on the others, at different steps, so that processes hang,
die and are replaced beside one another. A few steps here; two hundred in `make test-long`.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence

import psutil
import pytest

from grpo.rewards.runtime.contract import RewardBatch, RewardSpec
from grpo.rewards.runtime.pool import RewardPool

GROUPS, SIZE = 2, 4


def misbehaviours() -> list[Callable]:
    """Functions of a completion's step, nested so that they travel by value."""

    def raises(completions, step):
        if step[0] % 2 == 0:
            raise RuntimeError("no")
        return [1.0] * len(completions)

    def hangs(completions, step):
        if step[0] % 5 == 1:
            import time

            time.sleep(1000)
        return [1.0] * len(completions)

    def leaves(completions, step):
        if step[0] % 3 == 0:
            import os

            os._exit(7)
        return [1.0] * len(completions)

    def crashes(completions, step):
        if step[0] % 7 == 2:
            import ctypes

            ctypes.string_at(0)
        return [1.0] * len(completions)

    def hoards(completions, step):
        kept = []
        while step[0] % 4 == 1:
            kept.append(bytearray(1 << 24))
        return [1.0] * len(completions)

    def talks_nonsense(completions, step):
        nonsense = [None, "good", [1.0], [float("nan")] * len(completions), {"rewards": 3}, object()]
        return nonsense[step[0] % 6] if step[0] % 2 else [1.0] * len(completions)

    def floods(completions, step):
        print("\x1b[31m" + "x" * 100_000)
        return [1.0] * len(completions)

    def litters(completions, step):
        """Leaves threads, open files, and processes that outlive a call."""
        import subprocess
        import threading
        import time

        files.append(open("/dev/null"))
        threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
        subprocess.Popen(["sleep", "1000.25"])
        if step[0] % 3 == 1:
            raise MemoryError
        return [1.0] * len(completions)

    files: list = []
    return [raises, hangs, leaves, crashes, hoards, talks_nonsense, floods, litters]


def batch(step: int) -> RewardBatch:
    columns = {"step": [step] * SIZE}
    return RewardBatch(["q"] * SIZE, ["a"] * SIZE, [[1]] * SIZE, columns, step=step, max_steps=1000)


def state(process: psutil.Process) -> tuple[int, int, int]:
    return process.num_fds(), threading.active_count(), len(process.children(recursive=True))


def endure(steps: int) -> Sequence[int]:
    """Score `steps` steps with all of them; returns the resident bytes after each."""
    process = psutil.Process()
    RewardPool(["integer"]).close()  # what the first use leaves for good is not a leak
    before = state(process)
    rewards = [RewardSpec(function, on_error="skip", timeout=0.5, memory_limit_gb=0.4) for function in misbehaviours()]
    resident = []
    with RewardPool([*rewards, "integer"], on_output=lambda name, line: None) as pool:
        for step in range(1, steps + 1):
            futures = [pool.submit(batch(step)) for _ in range(GROUPS)]
            results = [future.result(timeout=60) for future in futures]
            for result in results:
                assert result.scores["integer"] == [0.0] * SIZE and result.scores["floods"] == [1.0] * SIZE
                assert result.scores["raises"] == ([None] if step % 2 == 0 else [1.0]) * SIZE
                assert result.scores["leaves"] == ([None] if step % 3 == 0 else [1.0]) * SIZE
                assert result.scores["hangs"] == ([None] if step % 5 == 1 else [1.0]) * SIZE
                assert result.scores["hoards"] == ([None] if step % 4 == 1 else [1.0]) * SIZE
                assert result.scores["talks_nonsense"] == ([None] if step % 2 else [1.0]) * SIZE
            resident.append(process.memory_info().rss)
    orphans = [other for other in psutil.process_iter() if is_litter(other)]
    assert orphans == [], "what a function started ends with its process"
    deadline = time.monotonic() + 5
    while state(process) != before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert state(process) == before
    return resident


def is_litter(process: psutil.Process) -> bool:
    try:
        return process.cmdline() == ["sleep", "1000.25"] and process.uids().real == os.getuid()
    except psutil.Error:
        return False


def test_a_few_steps_of_every_misbehaviour_leave_nothing_behind() -> None:
    endure(3)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_two_hundred_steps_of_every_misbehaviour_leak_nothing() -> None:
    resident = endure(200)
    early, late = sorted(resident[20:60])[20], sorted(resident[-40:])[20]
    assert late - early < 8 << 20, f"{early} bytes grew to {late}"
