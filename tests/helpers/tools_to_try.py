"""Tools for the tests that go wrong, each in its own way."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from typing import Any


def leaves(how: str) -> Any:
    """
    Does what it is told.

    Args:
        how: Which way to go wrong.
    """
    return WAYS[how]()


async def leaves_async(how: str) -> Any:
    """
    Does it as a coroutine.

    Args:
        how: Which way to go wrong.
    """
    await asyncio.sleep(0)
    return WAYS[how]()


class Unprintable:
    def __str__(self) -> str:
        raise ValueError("no text for me")


def raises(error: BaseException) -> Any:
    raise error


def left_behind() -> str:
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(321.5)"], start_new_session=True)
    if os.fork() == 0:
        time.sleep(321.5)
        os._exit(0)
    threading.Thread(target=time.sleep, args=(321.5,)).start()
    return "left"


def closed_everything() -> str:
    os.closerange(3, 1000)
    return "closed"


WAYS: dict[str, Any] = {
    "raises": lambda: raises(ValueError("no such luck")),
    "raises a group": lambda: raises(ExceptionGroup("both", [ValueError("one"), TypeError("two")])),
    "recurses": lambda: WAYS["recurses"](),
    "asks to exit": lambda: sys.exit(3),
    "interrupts": lambda: raises(KeyboardInterrupt()),
    "cancels": lambda: raises(asyncio.CancelledError()),
    "exits": lambda: os._exit(7),
    "is killed": lambda: os.kill(os.getpid(), 9),
    "hangs": lambda: time.sleep(60),
    "stops": lambda: os.kill(os.getpid(), 19),
    "late": lambda: time.sleep(3.6),
    "forks": left_behind,
    "closes": closed_everything,
    "a megabyte": lambda: "many words " * 100_000,
    "too much": lambda: "x" * (70 << 20),
    "bytes": lambda: b"\xff\xfe",
    "half a character": lambda: "\ud83d",
    "control characters": lambda: "\x1b[31m\x00<|im_end|>",
    "nothing": lambda: None,
    "unprintable": Unprintable,
    "endless numbers": lambda: float("nan"),
}
