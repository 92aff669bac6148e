"""What a reward process and its parent say to each other: messages, their lengths, and how an error is passed on."""

from __future__ import annotations

import functools
import inspect
import json
import pickle
import socket
import sys
import time
import traceback
from dataclasses import dataclass
from typing import Any

from grpo.errors import UserError
from grpo.references import described, location
from grpo.rewards.runtime.contract import BadReturn, RewardBatch
from grpo.rewards.runtime.conventions import RewardFunction

HEADER = 8
MEND = 'mend the function, or set on_error = "skip" to score such batches as missing'


@dataclass(frozen=True)
class Setup:
    """The first message: which function to serve, and within which limits.

    Attributes:
        function: a pickled triple: the function or its reference, its options, and one row's columns to check what
            the function asks for (None: no check).
        timeout: seconds for one call of a coroutine function. Others are stopped by the parent.
        memory_limit: bytes.
        parent: the trainer's process id.
    """

    name: str
    function: bytes
    timeout: float
    memory_limit: int
    parent: int


def send(link: socket.socket, message: bytes) -> None:
    """Send one message. Raises OSError when the other side is gone, TimeoutError when it does not read."""
    link.sendall(len(message).to_bytes(HEADER, "big") + message)


def receive(link: socket.socket) -> bytes | None:
    """The next message, or None when the other side is gone."""
    try:
        header = _read(link, HEADER)
        return None if header is None else _read(link, int.from_bytes(header, "big"))
    except ConnectionError:
        return None


def _read(link: socket.socket, size: int) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        piece = link.recv(min(size - len(data), 1 << 20))
        if not piece:
            return None
        data += piece
    return bytes(data)


def code_of(function: Any) -> tuple[str, int] | None:
    """The file and first line of a function, partial or callable object; None for what is not written in Python."""
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function)
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    return (code.co_filename, code.co_firstlineno) if code else None


def unpack(message: bytes) -> RewardBatch:
    """The batch in a call's message, which starts with the call's number in 8 bytes."""
    return pickle.loads(memoryview(message)[HEADER:])


def encode(report: dict[str, Any], message: bytes, start: float) -> bytes:
    """The answer to a call's message: the report, the call's number and the seconds it took."""
    number = int.from_bytes(message[:HEADER], "big")
    return json.dumps(report | {"call": number, "seconds": time.perf_counter() - start}).encode()


def failure(error: BaseException, function: RewardFunction, setup: Setup) -> dict[str, Any]:
    """What is reported of an exception: a sentence, a remedy that it lacks, and the traceback if it is the user's."""
    if isinstance(error, UserError):
        return {"error": str(error), "remedy": "", "traceback": ""}
    if isinstance(error, BadReturn):
        return {"error": f"{subject(function)} {error}", "remedy": MEND, "traceback": ""}
    what, remedy = f"raised {described(error)}", MEND
    if isinstance(error, MemoryError):
        what = f"ran out of the {setup.memory_limit / 1e9:.3g} GB of memory that it may use"
        remedy = f"raise its memory_limit_gb, or {MEND}"
    code = code_of(function.function)
    where = location(error, code[0] if code else None)
    trace = "".join(traceback.format_exception(error))
    return {"error": f"{subject(function)} {what} at {where}", "remedy": remedy, "traceback": trace}


def subject(function: RewardFunction) -> str:
    """What an error sentence calls the function: its name and where it is defined."""
    code = code_of(function.function)
    return f"reward {function.name!r}" + (f" ({code[0]}:{code[1]})" if code else "")


def reply(link: socket.socket, answer: bytes) -> None:
    """Send an answer, after all that was printed for it."""
    sys.stdout.flush()
    sys.stderr.flush()
    send(link, answer)
