"""`Runner`: the thread that owns one reward's process, hands it calls in order, and ends each call with an Outcome.

It starts the process, starts another after one has hung or died, and keeps the time. What an error means for the
batch, `on_error`, is `pool.py`'s.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo.errors import UserError
from grpo.references import described
from grpo.rewards.runtime.contract import Scores
from grpo.rewards.runtime.process import WorkerProcess
from grpo.rewards.runtime.protocol import HEADER, MEND, Setup

LOAD_SECONDS = 300.0
"""How long loading a function's module may take: a reward may bring a model of its own."""
CANCEL_SECONDS = 2.0
"""A coroutine function's worker cancels late calls itself; after this much longer it counts as hanging."""
SLOW = 'raise its timeout, mend the function, or set on_error = "skip" to score such batches as missing'


@dataclass(frozen=True)
class Outcome:
    """How one call ended: with scores, or with an error.

    Attributes:
        error: a sentence that names the function and the cause; empty for scores.
        remedy: what to do about it, if the sentence does not say.
        traceback: the user's, if there is one.
        seconds: spent in the function; for an error, since the call was sent.
    """

    scores: Scores | None
    seconds: float
    error: str = ""
    remedy: str = ""
    traceback: str = ""


@dataclass
class _Call:
    batch: bytes
    done: Callable[[Outcome], None]
    sent: float = 0.0
    deadline: float = 0.0


class Runner:
    """One reward function, served by one process at a time.

    Attributes:
        started: done when the function is loaded; a UserError if it cannot be.

    Args:
        function: the first message's `Setup.function`.
        timeout: seconds for one call, loading not included.
        memory_limit: bytes; None: half of the machine's.
        relay: called from the runner's thread with each line that the process prints.
    """

    def __init__(
        self, name: str, function: bytes, timeout: float, memory_limit: int | None, relay: Callable[[str], None]
    ) -> None:
        self.name = name
        self.started: Future[None] = Future()
        self._timeout = timeout
        self._relay = relay
        limit = memory_limit or machine_memory() // 2
        self._setup = Setup(name, function, timeout, limit, os.getpid())
        self._process: WorkerProcess | None = None
        self._ready: dict[str, Any] | None = None  # the worker's first answer
        self._load_deadline = 0.0
        self._subject = f"reward {name!r}"
        self._waiting: deque[_Call] = deque()
        self._running: dict[int, _Call] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()  # guards _ended and the wake pipe's life
        self._ended = False
        self._closing = False
        self._wake, self._wake_write = os.pipe()
        os.set_blocking(self._wake, False)
        os.set_blocking(self._wake_write, False)
        self._thread = threading.Thread(target=self._run, name=f"reward-{name}", daemon=True)
        self._thread.start()

    def put(self, batch: bytes, done: Callable[[Outcome], None]) -> None:
        """Queue a call with a pickled batch. `done` is called once: from the runner's thread, or here after its end."""
        with self._lock:
            if not self._ended:
                self._waiting.append(_Call(batch, done))
                self._signal()
                return
        done(Outcome(None, 0.0, f"reward {self.name!r} was closed"))

    def stop(self) -> None:
        """Begin to end: calls not answered yet end with an error. `join` waits for it."""
        self._closing = True
        with self._lock:
            if not self._ended:
                self._signal()

    def join(self) -> None:
        if threading.current_thread() is not self._thread:  # a future's callback may close the pool
            self._thread.join()

    def _signal(self) -> None:
        with contextlib.suppress(BlockingIOError):  # a full pipe will wake the thread too
            os.write(self._wake_write, b"\0")

    def _run(self) -> None:
        reason = f"reward {self.name!r} was closed"
        try:
            while not self._closing:
                self._turn()
        except BaseException as error:  # whatever it is, no future may stay open
            reason = f"reward {self.name!r}: its runner failed: {described(error)}"
            raise
        finally:
            if self._process is not None:
                self._process.close()
            with self._lock:
                self._ended = True
                os.close(self._wake)
                os.close(self._wake_write)
            for call in [*self._running.values(), *self._waiting]:
                call.done(Outcome(None, 0.0, reason))
            if not self.started.done():
                self.started.set_exception(UserError(reason))

    def _turn(self) -> None:
        """Pass on what may be passed on, wait until something happens, and deal with it."""
        if self._process is None and (self._waiting or not self.started.done()):
            self._start()
        while self._waiting and self._ready and (self._ready["concurrent"] or not self._running):
            self._send(self._waiting.popleft())
        for answer in self._wait():
            self._take(answer)
        if self._process is not None and time.monotonic() >= self._deadline():
            for answer in self._process.poll(0):  # this thread may be the late one: the answer may be there by now
                self._take(answer)
        if self._process is not None and self._process.ended:
            self._died()
        elif self._process is not None and time.monotonic() >= self._deadline():
            self._hung()

    def _start(self) -> None:
        self._load_deadline = time.monotonic() + LOAD_SECONDS
        try:
            self._process = WorkerProcess(self._setup, self._relay)
        except OSError as error:
            self._not_loaded(f"reward {self.name!r}: its process cannot be started: {error}")

    def _send(self, call: _Call) -> None:
        assert self._process is not None and self._ready is not None
        number = next(self._numbers)
        call.sent = time.monotonic()
        call.deadline = call.sent + self._timeout + (CANCEL_SECONDS if self._ready["concurrent"] else 0.0)
        self._running[number] = call
        self._process.send(number.to_bytes(HEADER, "big") + call.batch)

    def _deadline(self) -> float:
        if self._ready is None:
            return self._load_deadline
        return min((call.deadline for call in self._running.values()), default=float("inf"))

    def _wait(self) -> list[dict[str, Any]]:
        answers = []
        if self._process is None:
            poller = select.poll()
            poller.register(self._wake, select.POLLIN)
            poller.poll(None if not self._waiting else 0)
        else:
            deadline = self._deadline()
            timeout = None if deadline == float("inf") else deadline - time.monotonic()
            answers = self._process.poll(timeout, self._wake)
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake, 1 << 16)
        return answers

    def _take(self, answer: dict[str, Any]) -> None:
        if self._ready is None:
            if "error" in answer:
                self._not_loaded(answer["error"], answer["traceback"])
            else:
                self._ready = answer
                self._subject = answer["subject"]
                if not self.started.done():
                    self.started.set_result(None)
            return
        call = self._running.pop(answer["call"])
        if "overdue" in answer:
            call.done(Outcome(None, answer["seconds"], self._overdue(), SLOW))
        elif "error" in answer:
            call.done(Outcome(None, answer["seconds"], answer["error"], answer["remedy"], answer["traceback"]))
        else:
            call.done(Outcome(Scores(answer["values"], answer["metrics"], answer["extras"]), answer["seconds"]))

    def _died(self) -> None:
        assert self._process is not None
        while_loading = self._ready is None
        ending = how_it_ended(self._end_process())
        if while_loading:
            self._not_loaded(
                f"reward {self.name!r}: its process {ending} while loading; mend what its file does at import"
            )
        elif self._running:
            self._fail_running(f"{self._subject}: its process {ending} during a call", MEND)
        else:
            self._relay(f"{self._subject}: its process {ending} between calls; the next call starts another")

    def _hung(self) -> None:
        assert self._process is not None
        self._process.print_stack()
        while_loading = self._ready is None
        self._end_process()
        if while_loading:
            self._not_loaded(
                f"reward {self.name!r} did not load within {LOAD_SECONDS:g} s; mend what its file does at import"
            )
        else:
            self._fail_running(self._overdue(), SLOW)

    def _end_process(self) -> int:
        assert self._process is not None
        code = self._process.kill()
        self._process = None
        self._ready = None
        return code

    def _not_loaded(self, sentence: str, traceback: str = "") -> None:
        """The first time, the runner ends; later, the call that needed the process fails."""
        if self._process is not None:
            self._end_process()
        if not self.started.done():
            self._closing = True
            self.started.set_exception(UserError(sentence))
        elif self._waiting:
            self._waiting.popleft().done(Outcome(None, 0.0, sentence, traceback=traceback))

    def _fail_running(self, sentence: str, remedy: str) -> None:
        calls, self._running = self._running, {}
        for call in calls.values():
            call.done(Outcome(None, time.monotonic() - call.sent, sentence, remedy))

    def _overdue(self) -> str:
        return f"{self._subject} did not return within its timeout of {self._timeout:g} s"


def machine_memory() -> int:
    """Bytes of memory that this machine, or the container around it, has."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # absent, or "max"
            sizes.append(int(Path(file).read_text()))
    return min(sizes)


def how_it_ended(code: int) -> str:
    """A process's exit code, or minus its signal, in words that follow "its process"."""
    if code == -signal.SIGKILL:
        return "was killed (SIGKILL), most likely because the machine ran out of memory,"
    if code < 0:
        return f"was ended by signal {-code} ({signal.strsignal(-code)})"
    return f"ended itself with exit code {code}"
