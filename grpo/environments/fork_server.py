"""The process that loads an environment once, and from which every episode is forked into a process of its own.

A fresh interpreter, so it holds nothing of the trainer: no model, no vLLM, no threads of theirs. An episode that hangs,
exits or exhausts its memory harms no other, leaves no state behind, and finds the state that every other found.
Descriptors of the episodes' links come over the control link; on it go, up, how processes ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import resource
import select
import signal
import socket
import sys
from typing import Any

from grpo.environments.link import receive, send
from grpo.environments.program import Program, error_message, play
from grpo.environments.ways_in import load
from grpo.errors import UserError

SUBREAPER, PARENT_DEATH = 36, 1
ORDER = 64
"""Bytes of every order, so that none is read together with the next."""


def main(control: socket.socket) -> None:
    """Serve until the trainer closes `control`."""
    control.set_inheritable(False)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)  # type: ignore[union-attr]
    setup = receive(control)
    if setup is None:
        return
    on_linux(PARENT_DEATH, signal.SIGKILL)  # loading may hang, and then nobody reads the control link
    try:
        program = load(setup)
        facts = {**program.facts, "questions": questions_of(program, setup)}
    except UserError as problem:  # says itself what to do
        send(control, {"refused": str(problem)})
        return
    except BaseException as error:
        what = error_message(error, f"environment {setup['name']!r} failed to load with")
        send(control, {"refused": f"{what}; mend it"})
        return
    send(control, {"loaded": facts})
    on_linux(PARENT_DEATH, 0)
    on_linux(SUBREAPER, 1)  # what an episode starts and leaves behind comes here, and is ended here
    ForkServer(control, program, setup).serve()


def questions_of(program: Program, setup: dict[str, Any]) -> Any:
    """[rows to train on, held-out rows] of the environment's own, where it has any and they are wanted."""
    wanted = setup["questions"]
    return None if program.questions is None or wanted is None else program.questions(*wanted)


def on_linux(option: int, value: int) -> None:
    """One setting of this process, where the system has it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)


class ForkServer:
    """Forks episodes, ends them, and tells how they ended."""

    def __init__(self, control: socket.socket, program: Program, setup: dict[str, Any]):
        self.control, self.program, self.setup = control, program, setup
        self.running: dict[int, int] = {}
        """Process id -> the trainer's number of it."""
        self.wake, wake = os.pipe()
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def serve(self) -> None:
        """Until the trainer is gone."""
        try:
            while True:
                control = self.control.fileno()
                ready, _, _ = select.select([control, self.wake], [], [])
                if self.wake in ready:
                    os.read(self.wake, 1 << 12)
                self.reap()
                if control in ready and not self.command():
                    return
        finally:
            self.end_everything()

    def command(self) -> bool:
        """Obey one message; False where there will be none."""
        data, links, _, _ = socket.recv_fds(self.control, ORDER, 1)
        if len(data) < ORDER:
            return False
        order = json.loads(data)
        if "start" in order:
            self.start(order["start"], links[0])
        elif "end" in order:
            for process, number in list(self.running.items()):
                if number == order["end"]:
                    end_group(process)
        else:
            self.end_everything()
            send(self.control, {"swept": order["sweep"]})
        return True

    def start(self, number: int, link: int) -> None:
        """Fork a process for an episode, which waits for it at the link, the descriptor `link`."""
        process = os.fork()
        if process == 0:
            run_episode(self.program, self.setup, link, (self.control.fileno(), self.wake))
        os.close(link)
        self.running[process] = number

    def reap(self) -> None:
        """Tell of every process that has ended; a stranger's is only removed."""
        while True:
            try:
                process, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if process == 0:
                return
            number = self.running.pop(process, None)
            if number is not None:
                send(self.control, {"ended": number, "code": os.waitstatus_to_exitcode(status)})

    def end_everything(self) -> None:
        """Kill whatever descends from here, and wait for it."""
        while found := descendants(os.getpid()):
            for process in found:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(process, signal.SIGKILL)
            self.reap()


def end_group(process: int) -> None:
    """Kill the episode `process` and what it has started in its session."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(process, signal.SIGKILL)


def descendants(root: int) -> list[int]:
    """Process ids below `root`."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{entry}/stat", "rb") as file:
                parent = int(file.read().rpartition(b")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry))
    found, new = [], [root]
    while new:
        new = [child for parent in new for child in children.get(parent, ())]
        found += new
    return found


def run_episode(program: Program, setup: dict[str, Any], link: int, others: tuple[int, ...]) -> None:
    """In the forked process: play one episode and end."""
    code = 1
    try:
        os.setsid()
        on_linux(PARENT_DEATH, signal.SIGKILL)
        on_linux(SUBREAPER, 0)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for descriptor in others:
            os.close(descriptor)
        limit_memory(setup["memory_limit"])
        with socket.socket(fileno=link) as own:
            own.set_inheritable(False)
            start = receive(own)
            if start is not None:
                random.seed(start.get("seed", 0))
                play(program, start, own)
        code = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def limit_memory(limit: int) -> None:
    """Allocations beyond `limit` bytes raise MemoryError; should the machine run out, this process goes first."""
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_DATA, (limit if hard < 0 else min(limit, hard), hard))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
