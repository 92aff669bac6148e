"""The parent side of one reward process: start it, exchange messages without blocking, relay its output, end it.

A fresh interpreter is started (fork and exec at once), so the worker holds nothing of the trainer: no CUDA context,
no vLLM, no file handles. It does not run the user's `__main__` again. Timeouts and restarts are `runner.py`'s.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from grpo.rewards.runtime.protocol import HEADER, Setup

BOOT = (
    "import json, socket, sys; sys.path[:] = json.loads(sys.argv[2]); from grpo.rewards.runtime.worker import main; "
    "main(socket.socket(fileno=int(sys.argv[1])))"
)
CLOSE_SECONDS = 1.0
"""How long a worker may take to end by itself before it is killed."""
CHUNK = 1 << 16
MOST_CHUNKS = 64
"""Read from a worker's output at a time: 4 MiB, more than a pipe holds."""
STACK_SECONDS = 0.5
"""How long a hanging worker may take to print where it hangs."""


class WorkerProcess:
    """A running worker. Not thread-safe, and to be started, used and ended by one long-lived thread: Linux ends the
    worker when the thread that started it ends.

    Attributes:
        ended: the link is closed: the process has died or is about to.

    Raises OSError when no process can be started.
    """

    def __init__(self, setup: Setup, relay: Callable[[str], None]) -> None:
        self.ended = False
        self._relay = relay
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._line = ""
        self._incoming = bytearray()
        self._outgoing = bytearray()
        self._link, theirs = socket.socketpair()
        path = json.dumps([entry or os.getcwd() for entry in sys.path])
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", BOOT, str(theirs.fileno()), path],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                bufsize=0,
            )
        except BaseException:
            self._link.close()
            raise
        finally:
            theirs.close()
        assert self._process.stdout is not None
        self._output: int | None = self._process.stdout.fileno()
        os.set_blocking(self._output, False)
        self._link.setblocking(False)
        self.send(pickle.dumps(setup))

    def send(self, message: bytes) -> None:
        """Queue a message; `poll` passes it on."""
        self._outgoing += len(message).to_bytes(HEADER, "big") + message

    def poll(self, timeout: float | None, wake: int | None = None) -> list[dict[str, Any]]:
        """Wait up to `timeout` seconds (None: for ever) until something happens, also on the descriptor `wake`.

        Passes messages and output on, and returns what the worker answered. Output that preceded an answer has been
        relayed when it is returned.
        """
        poller = select.poll()
        if wake is not None:
            poller.register(wake, select.POLLIN)
        if not self.ended:
            poller.register(self._link, select.POLLIN | (select.POLLOUT if self._outgoing else 0))
        if self._output is not None:
            poller.register(self._output, select.POLLIN)
        poller.poll(None if timeout is None else max(0.0, timeout) * 1000)
        self._write()
        self._read()
        messages = self._messages()
        self._relay_output(flush=bool(messages))
        return messages

    def print_stack(self) -> None:
        """Have the worker print where it is, and relay that."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGUSR1)
        self._linger(STACK_SECONDS)

    def close(self) -> None:
        """End the process and all it has started: by closing the link, and by force if that takes too long."""
        if not self.ended:
            with contextlib.suppress(OSError):
                self._link.shutdown(socket.SHUT_WR)
            self._linger(CLOSE_SECONDS)
        self.kill()

    def kill(self) -> int:
        """End the process and all it has started at once; returns its exit code, or minus the signal that ended it."""
        give_up = time.monotonic() + (CLOSE_SECONDS if self.ended else 0)
        status = os.WEXITED | os.WNOHANG | os.WNOWAIT  # not reaped yet: its id still names the group to kill
        while os.waitid(os.P_PID, self._process.pid, status) is None and time.monotonic() < give_up:
            time.sleep(0.002)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        code = self._process.wait()
        self._relay_output(flush=True)
        self._link.close()
        assert self._process.stdout is not None
        self._process.stdout.close()
        return code

    def _linger(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self.ended and time.monotonic() < end:
            self.poll(end - time.monotonic())

    def _write(self) -> None:
        try:
            while self._outgoing:
                sent = self._link.send(self._outgoing[:CHUNK])
                del self._outgoing[:sent]
        except BlockingIOError:
            pass
        except OSError:
            self._outgoing.clear()  # the worker is gone, which reading the link will tell

    def _read(self) -> None:
        try:
            while not self.ended:
                piece = self._link.recv(CHUNK)
                self._incoming += piece
                self.ended = not piece
        except BlockingIOError:
            pass
        except OSError:
            self.ended = True

    def _messages(self) -> list[dict[str, Any]]:
        messages = []
        while len(self._incoming) >= HEADER:
            end = HEADER + int.from_bytes(self._incoming[:HEADER], "big")
            if len(self._incoming) < end:
                break
            messages.append(json.loads(self._incoming[HEADER:end]))
            del self._incoming[:end]
        return messages

    def _relay_output(self, flush: bool) -> None:
        """Relay complete lines; with `flush` an unfinished one too. A flood is left for the next turn."""
        for _ in range(MOST_CHUNKS):
            try:
                data = b"" if self._output is None else os.read(self._output, CHUNK)
            except BlockingIOError:
                break
            if not data:
                self._output = None
                break
            *lines, self._line = (self._line + self._decoder.decode(data)).split("\n")
            for line in lines:
                self._relay(line)
        if self._line and (flush or len(self._line) > CHUNK):
            self._relay(self._line)
            self._line = ""
