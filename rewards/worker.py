"""The child side of a reward process: load one function, then score batches as they come, until the link closes.

The link is a socket. Down come pickled messages, up go JSON ones, so that the trainer never unpickles what a user's
code made. Each is preceded by its length in 8 bytes. The main thread runs the function, so `signal.alarm` works in
it; coroutine functions share one event loop, in which several batches are scored at once.

Timeouts, restarts and what an error means for the run are the parent's: `process.py` and `pool.py`. This module must
stay quick to import: no torch, no pydantic.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import functools
import inspect
import io
import json
import os
import pickle
import resource
import signal
import socket
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from typing import Any

from grpo.errors import UserError
from grpo.rewards.builtin import ALIASES, BUILTIN
from grpo.rewards.contract import BadReturn, RewardBatch
from grpo.rewards.forms import RewardFunction
from grpo.rewards.resolve import described, location, resolve

HEADER = 8
PR_SET_PDEATHSIG = 1
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


def main(link: socket.socket) -> None:
    """Serve the function that the first message names until the link closes. Never raises on the user's account."""
    link.set_inheritable(False)
    for stream in (sys.stdout, sys.stderr):
        assert isinstance(stream, io.TextIOWrapper)
        stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
    message = receive(link)
    if message is None:
        return
    setup: Setup = pickle.loads(message)
    end_with_parent(setup.parent)
    limit_memory(setup.memory_limit)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=False)
    try:
        function = load(setup)
    except (Exception, SystemExit) as error:
        sentence = f"reward {setup.name!r} failed to load: {described(error)} at {location(error)}"
        report = {"error": str(error)} if isinstance(error, UserError) else {"error": sentence}
        reply(link, json.dumps(report | {"traceback": traceback.format_exc()}).encode())
        return
    reply(link, json.dumps({"concurrent": function.is_async, "subject": subject(function)}).encode())
    with contextlib.suppress(ConnectionError):
        if function.is_async:
            from grpo.rewards.coroutines import run  # here, as most workers need no event loop: it is slow to import

            run(link, function, setup)
        else:
            serve(link, function, setup)


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the trainer dies, even inside a C call that never returns.

    Where there is no such call (not Linux), the closed link ends the process after its current call.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def limit_memory(limit: int) -> None:
    """Allocations beyond `limit` bytes raise MemoryError; and should the machine run out, this process goes first.

    RLIMIT_DATA and not RLIMIT_AS: address space that CUDA or a memory-mapped file merely reserves does not count.
    """
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def load(setup: Setup) -> RewardFunction:
    """The function to serve. Raises UserError naming what is wrong with it, or what unpickling it raised."""
    source, options, example = pickle.loads(setup.function)
    if isinstance(source, str):
        built_in = source in BUILTIN | ALIASES
        function = RewardFunction(resolve(source), setup.name, options, any_option=not built_in)
    else:
        function = RewardFunction(source, setup.name, options)
    if example is not None:
        function.check_columns(example)
    return function


def code_of(function: Any) -> tuple[str, int] | None:
    """The file and first line of a function, partial or callable object; None for what is not written in Python."""
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function)
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    return (code.co_filename, code.co_firstlineno) if code else None


def serve(link: socket.socket, function: RewardFunction, setup: Setup) -> None:
    """Score the batches one after the other, in the order they were sent."""
    while (message := receive(link)) is not None:
        start = time.perf_counter()
        try:
            answer = encode(asdict(function.score(unpack(message))), message, start)
        except BaseException as error:
            answer = encode(failure(error, function, setup), message, start)
        reply(link, answer)


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
    place = location(error, code[0] if code else None)
    trace = "".join(traceback.format_exception(error))
    return {"error": f"{subject(function)} {what} at {place}", "remedy": remedy, "traceback": trace}


def subject(function: RewardFunction) -> str:
    """What an error sentence calls the function: its name and where it is defined."""
    code = code_of(function.function)
    return f"reward {function.name!r}" + (f" ({code[0]}:{code[1]})" if code else "")


def reply(link: socket.socket, answer: bytes) -> None:
    """Send an answer, after all that was printed for it."""
    sys.stdout.flush()
    sys.stderr.flush()
    send(link, answer)
