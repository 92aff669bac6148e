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
from dataclasses import asdict

from grpo.errors import UserError
from grpo.references import described, location
from grpo.rewards.builtin import ALIASES, BUILTIN, resolve_reward
from grpo.rewards.runtime.conventions import RewardFunction
from grpo.rewards.runtime.protocol import Setup, encode, failure, receive, reply, subject, unpack

PR_SET_PDEATHSIG = 1


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
            from grpo.rewards.runtime.coroutines import (
                run,  # here, as most workers need no event loop: it is slow to import
            )

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
        function = RewardFunction(resolve_reward(source), setup.name, options, any_option=not built_in)
    else:
        function = RewardFunction(source, setup.name, options)
    if example is not None:
        function.check_columns(example)
    return function


def serve(link: socket.socket, function: RewardFunction, setup: Setup) -> None:
    """Score the batches one after the other, in the order they were sent."""
    while (message := receive(link)) is not None:
        start = time.perf_counter()
        try:
            answer = encode(asdict(function.score(unpack(message))), message, start)
        except BaseException as error:
            answer = encode(failure(error, function, setup), message, start)
        reply(link, answer)
