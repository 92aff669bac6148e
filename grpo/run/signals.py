"""SIGINT and SIGTERM: the first ends the run at the next safe point, the second at once.

`Interrupts` is the trainer's half: within `deferred()` a signal is only noted, and `check()`, called where nothing is
half done, raises. `leaving_at_once()` is the command line's half: a thread that the interpreter's C handler wakes, so
that a second signal, or the end of the grace period, ends the process even while the main thread is deep in C code.
For what is saved before leaving see the trainer.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE_SECONDS = 25.0
"""How long an interrupted run may take to save itself. Schedulers kill 30 seconds after SIGTERM."""
SHOW_CURSOR = b"\x1b[?25h"


class Interrupted(KeyboardInterrupt):
    """The run was asked to end by the signal `number`."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class Interrupts:
    """Holds SIGINT and SIGTERM while it is entered; in a thread other than the main one it does nothing."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._deferred = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._caught) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def _caught(self, number: int, frame: FrameType | None) -> None:
        again, self.number = self.number is not None, number
        if again or not self._deferred:
            raise Interrupted(number)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Within, the first signal waits for `check`."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self.number is not None:
            raise Interrupted(self.number)


@contextlib.contextmanager
def leaving_at_once(grace: float = GRACE_SECONDS) -> Iterator[None]:
    """Within, the process exits with code 128 + signal at the second signal, or `grace` seconds after the first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = socket.socketpair()
    writing.setblocking(False)
    before = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(reading, grace), name="signals", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        writing.close()
        watcher.join()
        reading.close()


def _watch(link: socket.socket, grace: float) -> None:
    """Read the numbers of caught signals from `link` until it closes."""
    first: int | None = None
    while True:
        try:
            data = link.recv(1)
        except TimeoutError:
            assert first is not None
            _leave(first)
        if not data:
            return
        if data[0] in SIGNALS:
            if first is not None:
                _leave(data[0])
            first = data[0]
            _say(f"\n{signal.Signals(first).name}: saving, then leaving; once more to leave at once\n".encode())
            link.settimeout(grace)


def _leave(number: int) -> None:
    _say(SHOW_CURSOR if sys.stderr.isatty() else b"")
    os._exit(128 + number)


def _say(text: bytes) -> None:
    """Past Python's streams, which the main thread may hold."""
    with contextlib.suppress(OSError):
        os.write(2, text)
