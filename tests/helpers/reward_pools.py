"""What tests of the reward pool share: batches, pools that are closed again, and the processes that they leave.

Reward functions are made inside the tests: a nested function travels by value, so a worker need not import their file.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from grpo.errors import UserError
from grpo.rewards.runtime.contract import RewardBatch
from grpo.rewards.runtime.pool import RewardPool


def batch(size: int = 3, **columns: Any) -> RewardBatch:
    texts = [f"<answer>{index}</answer>" for index in range(size)]
    columns = columns or {"answer": [str(index) for index in range(size)]}
    return RewardBatch(["q"] * size, texts, [[index] for index in range(size)], columns, step=1, max_steps=10)


class Pools:
    """Makes pools; `lines` is what their functions printed."""

    def __init__(self) -> None:
        self.made: list[RewardPool] = []
        self.lines: list[str] = []

    def __call__(self, *rewards: Any, **arguments: Any) -> RewardPool:
        arguments.setdefault("on_output", lambda name, line: self.lines.append(f"{name}: {line}"))
        self.made.append(RewardPool(rewards, **arguments))
        return self.made[-1]

    def __enter__(self) -> Pools:
        return self

    def __exit__(self, *error: object) -> None:
        for pool in self.made:
            pool.close()


def error_of(pool: RewardPool, given: RewardBatch | None = None) -> str:
    with pytest.raises(UserError) as error:
        pool.submit(given or batch()).result(timeout=20)
    assert "\n" not in str(error.value)
    return str(error.value)


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def wait_until(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def counting() -> Callable[..., list[float]]:
    """A function with a counter in its closure, that scores with its number of calls."""
    calls = 0

    def count(completions):
        nonlocal calls
        calls += 1
        return [float(calls)] * len(completions)

    return count
