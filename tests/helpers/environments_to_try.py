"""Environments for the tests: good ones, and one for every way in which one can go wrong."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import time
from typing import Any


async def letters(row: dict, sample: Any, delay: float = 0.0, turns: int = 3) -> float:
    """Share of letters in three turns, with answers that take a random time."""
    messages, found, total = list(row["prompt"]), 0, 0
    while True:
        turn = await sample(messages)
        total += max(len(turn.text), 1)
        found += sum(character.isalpha() for character in turn.text)
        turns -= 1
        if turn.last or not turns:
            return found / total
        await asyncio.sleep(random.SystemRandom().random() * delay)
        messages = [*messages, turn.message, {"role": "user", "content": f"{len(turn.text)} characters. Again."}]


def rewrites(row: dict, sample: Any) -> float:
    """Forgets what was said before each turn; not a coroutine."""
    first = sample(row["prompt"])
    second = sample([{"role": "user", "content": f"Go on from {len(first.text)}."}])
    return len(second.text) / 10


async def impatient(row: dict, sample: Any) -> float:
    """Asks twice at once; the second is refused and the first is answered all the same."""
    first = asyncio.ensure_future(sample(row["prompt"]))
    await asyncio.sleep(0)
    try:
        await sample(row["prompt"])
    except RuntimeError as refusal:
        return float("one turn at a time" in str(refusal) and (await first).text == "first")
    return 0.0


async def gives_up(row: dict, sample: Any) -> float:
    """Waits for a turn no longer than it likes, and asks for another once that one has come."""
    try:
        await asyncio.wait_for(sample(row["prompt"]), 0.05)
        return 0.0
    except TimeoutError:
        pass
    while True:
        try:
            return float((await sample(row["prompt"])).text == "second")
        except RuntimeError:
            await asyncio.sleep(0.01)


async def ends_unanswered(row: dict, sample: Any, how: str) -> float:
    """Ends while a turn is asked for that it no longer wants."""
    asked = asyncio.ensure_future(sample(row["prompt"]))
    await asyncio.sleep(0.05)
    if how == "gives up":
        asked.cancel()
    elif how == "raises":
        raise ValueError("no patience")
    return 0.25


async def raises(row: dict, sample: Any) -> float:
    await sample(row["prompt"])
    raise ValueError("no such luck")


async def hangs(row: dict, sample: Any) -> float:
    await sample(row["prompt"])
    while True:
        time.sleep(1)


async def exits(row: dict, sample: Any) -> float:
    await sample(row["prompt"])
    os._exit(7)


async def killed(row: dict, sample: Any) -> float:
    os.kill(os.getpid(), 9)
    return 0.0


async def kills_its_parent(row: dict, sample: Any) -> float:
    os.kill(os.getppid(), 9)
    time.sleep(5)
    return 0.0


async def forks(row: dict, sample: Any) -> float:
    """Leaves a process behind that has gone out of its session."""
    await sample(row["prompt"])
    command = [sys.executable, "-c", "import time; time.sleep(321.5)"]
    subprocess.Popen(command, start_new_session=True)
    return 1.0


async def megabytes(row: dict, sample: Any) -> float:
    turn = await sample(row["prompt"])
    await sample([*row["prompt"], turn.message, {"role": "user", "content": "many words " * 100_000}])
    return 1.0


async def eats_memory(row: dict, sample: Any) -> float:
    return float(len(bytearray(1 << 40)))


async def garbage(row: dict, sample: Any) -> float:
    sample._link.sendall(b"\xff" * 100)
    return 1.0


async def no_number(row: dict, sample: Any) -> str:
    return "good"


async def infinite(row: dict, sample: Any) -> float:
    return float("inf")


async def greedy(row: dict, sample: Any) -> float:
    """Never stops of its own will."""
    messages = list(row["prompt"])
    while True:
        turn = await sample(messages)
        messages = [*messages, turn.message, {"role": "user", "content": "More."}]


async def prints(row: dict, sample: Any) -> float:
    """Writes a megabyte, some of it bytes that are no text."""
    await sample(row["prompt"])
    for _ in range(64):
        os.write(1, b"\xff\x1b[31m" + b"x" * 16_000 + b"\n")
    return 1.0


async def late(row: dict, sample: Any) -> float:
    """Answers after its time is over."""
    await sample(row["prompt"])
    time.sleep(5)
    return 1.0


async def forks_a_bomb(row: dict, sample: Any) -> float:
    """Leaves a chain of processes, each out of the session of the one before."""
    await sample(row["prompt"])
    for _ in range(5):
        if os.fork() == 0:
            os.setsid()
            if os.fork():
                os._exit(0)
            time.sleep(321.5)
            os._exit(0)
    return 1.0


async def mixed(row: dict, sample: Any) -> Any:
    """Goes wrong as its row says."""
    return await globals()[row["how"]](row, sample)


class Counter:
    """As TRL's environments are."""

    def reset(self, **row: Any) -> str:
        self.total = 0
        return " Count."

    def add(self, amount: int) -> str:
        """
        Add to the total.

        Args:
            amount: How much.
        """
        self.total += amount
        return f"total {self.total}"

    def get_reward(self) -> float:
        return float(self.total)


class Echo:
    """Another of TRL's kind."""

    def reset(self, **row: Any) -> None:
        pass

    def echo(self, text: str) -> str:
        """
        Say it again.

        Args:
            text: What.
        """
        return text

    def get_reward(self) -> float:
        return 1.0


def add(a: int, b: int) -> int:
    """
    Add two numbers.

    Args:
        a: The first number.
        b: The second number.

    Returns:
        The sum.
    """
    if a > 90:
        raise ValueError("a is too large")
    return a + b


async def slowly(word: str) -> str:
    """
    Say a word.

    Args:
        word: Which.
    """
    await asyncio.sleep(0.01)
    return word
