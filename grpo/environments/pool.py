"""The trainer's side of environments: starts the fork server, passes messages to and from episodes, ends what hangs.

Nothing here blocks longer than it is told to, and no thread is used: who plays episodes calls `collect` often. What an
episode says is in `inbox` until it is taken. An episode that dies, hangs or talks nonsense says `Lost`.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import selectors
import socket
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo.environments.fork_server import ORDER
from grpo.environments.link import Garbage, Inbox, packed
from grpo.errors import UserError

LOAD_SECONDS = 300.0
SWEEP_SECONDS = 10.0
BOOT = """
import importlib.util, json, os, socket, sys
if path := json.loads(sys.argv[3]): sys.path[:] = path
folder = os.path.dirname(sys.argv[2])
spec = importlib.util.spec_from_file_location("grpo", sys.argv[2], submodule_search_locations=[folder])
sys.modules["grpo"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from grpo.environments.fork_server import main
main(socket.socket(fileno=int(sys.argv[1])))
"""


@dataclass(frozen=True)
class Asked:
    """An episode's program wants a turn."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    max_tokens: int | None
    prompt_ids: list[int] | None = None
    """Tokens in place of messages, which are none then."""


@dataclass(frozen=True)
class Ended:
    """An episode's program has returned."""

    reward: float | None
    success: bool
    metrics: Mapping[str, float]
    over: str = ""
    turn_rewards: list[float] | None = None
    state: str | None = None
    """What its group is scored by, where that is done together."""


@dataclass(frozen=True)
class Scored:
    """The results of a group's episodes."""

    results: list[Ended]


@dataclass(frozen=True)
class Lost:
    """An episode that cannot go on. `problem` says why, in a clause."""

    problem: str
    traceback: str = ""


Said = Asked | Ended | Scored | Lost


@dataclass
class _Episode:
    process: int
    """The number that the fork server knows it by."""
    link: socket.socket
    inbox: Inbox
    outgoing: bytearray
    deadline: float | None = None
    """Until when it has to speak; None while it waits for the policy, or for its turn to work."""
    writes: bool = False
    """Whether `outgoing` waits for room in the link."""


class EnvironmentPool:
    """Episodes of one environment in processes.

    Args:
        name: what the environment is called in messages.
        kind, reference, options: which environment, as `ways_in.WAYS_IN` takes it.
        python: another interpreter to run it with; None: this one.
        processes: how many episodes may work at once; the others wait for their turn.
        timeout: seconds from what an episode is told until it speaks.
        memory_limit: bytes that an episode's process may allocate.
        on_output: called with each line that it prints.
        max_turns: what environments are told that count turns themselves.
        questions: how many rows of the environment's own `facts["questions"]` shall have, and how many held-out ones.

    Raises UserError where the environment cannot be loaded; then no process is left.
    """

    def __init__(
        self,
        name: str,
        kind: str,
        reference: Any,
        options: Mapping[str, Any],
        *,
        python: str | None,
        processes: int,
        timeout: float,
        memory_limit: int,
        on_output: Callable[[str], None],
        max_turns: int = 8,
        questions: tuple[int, int] | None = None,
    ):
        self.name, self.timeout, self.processes, self.on_output = name, timeout, processes, on_output
        setup = {"name": name, "kind": kind, "reference": reference, "options": dict(options)}
        self._setup = {**setup, "memory_limit": memory_limit, "max_turns": max_turns, "questions": questions}
        self._python = python
        self.inbox: dict[int, Said] = {}
        self._episodes: dict[int, _Episode] = {}
        self._episode_of: dict[int, int] = {}
        """Process -> episode."""
        self._spare: dict[int, socket.socket] = {}
        """Process without an episode yet -> link."""
        self._forked = 0
        self._waiting: deque[tuple[int, bytes]] = deque()
        self._selector = selectors.DefaultSelector()
        self._sweeps = 0
        self._start_server()

    # The fork server

    def _start_server(self) -> None:
        self._control, theirs = socket.socketpair()
        home = Path(__file__).resolve().parents[1] / "__init__.py"
        path = [entry or os.getcwd() for entry in sys.path] if self._python is None else None
        command = [self._python or sys.executable, "-P", "-c", BOOT, str(theirs.fileno()), str(home), json.dumps(path)]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                bufsize=0,
            )
        except OSError as error:
            self._control.close()
            raise UserError(
                f"environment {self.name!r}: {command[0]} cannot be started ({error.strerror}); mend environment.python"
            ) from None
        finally:
            theirs.close()
        self._reports, self._line = Inbox(), ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._swept = 0
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        self._selector.register(self._process.stdout, selectors.EVENT_READ, "output")
        self._selector.register(self._control, selectors.EVENT_READ, "control")
        self._finalizer = weakref.finalize(self, end_server, self._process, self._control)
        self._control.sendall(packed(self._setup))
        self.facts = self._load()

    def _load(self) -> dict[str, Any]:
        """Wait until the environment is loaded. Raises UserError where it cannot be."""
        self._loaded: dict[str, Any] | None = None
        self._gone = False
        give_up = time.monotonic() + LOAD_SECONDS
        while self._loaded is None and not self._gone and time.monotonic() < give_up:
            self.collect(0.2)
        if self._loaded is not None and "loaded" in self._loaded:
            return self._loaded["loaded"]
        self.close()
        if self._loaded is not None:
            raise UserError(self._loaded["refused"])
        problem = "its process ended while loading" if self._gone else f"it did not load within {LOAD_SECONDS:g} s"
        raise UserError(f"environment {self.name!r}: {problem}; mend what its file does at import")

    def _order(self, order: dict[str, int], *links: int) -> None:
        with contextlib.suppress(OSError):  # gone, which reading tells
            socket.send_fds(self._control, [json.dumps(order).encode().ljust(ORDER)], list(links))

    # Episodes

    def start(self, episode: int, row: Mapping[str, Any], seed: int) -> None:
        """Begin `episode`, a number that no other since the last `sweep` has."""
        self._begin(episode, {"row": dict(row), "seed": seed})

    def score(self, episode: int, states: Sequence[str]) -> None:
        """Score the episodes of one group by what they ended with; `episode` is a new number, and says `Scored`."""
        self._begin(episode, {"states": list(states)})

    def _begin(self, episode: int, message: dict[str, Any]) -> None:
        if self._gone:
            self._restart()
        if not self._spare:
            self._fork()
        process = min(self._spare)
        link = self._spare.pop(process)
        self._episodes[episode] = _Episode(process, link, Inbox(), bytearray())
        self._episode_of[process] = episode
        self._selector.register(link, selectors.EVENT_READ, episode)
        self.tell(episode, message)

    def prepare(self, episodes: int) -> None:
        """Fork processes for so many episodes that begin later, while there is time: each takes milliseconds."""
        for _ in range(0 if self._gone else min(episodes, self.processes) - len(self._spare)):
            self._fork()

    def _fork(self) -> None:
        """A process that waits for an episode."""
        mine, theirs = socket.socketpair()
        self._forked += 1
        self._order({"start": self._forked}, theirs.fileno())
        theirs.close()
        mine.setblocking(False)
        self._spare[self._forked] = mine

    def _drop_spare(self) -> None:
        for link in self._spare.values():
            link.close()
        self._spare.clear()

    def _restart(self) -> None:
        """Another fork server, after the last one was killed."""
        self._close_server()
        self._start_server()

    def tell(self, episode: int, message: dict[str, Any]) -> None:
        """Hand `message` to an episode as soon as it may work."""
        if episode in self._episodes:
            self._waiting.append((episode, packed(message)))
            self._hand_out()

    def _hand_out(self) -> None:
        working = 0
        if len(self._episodes) > self.processes:
            working = sum(one.deadline is not None for one in self._episodes.values())
        while self._waiting and working < self.processes:
            number, message = self._waiting.popleft()
            if number in self._episodes:
                self._episodes[number].deadline = time.monotonic() + self.timeout
                self._episodes[number].outgoing += message
                self._write(number)
                working += 1

    def _write(self, number: int) -> None:
        one = self._episodes[number]
        try:
            while one.outgoing:
                sent = one.link.send(one.outgoing)
                del one.outgoing[:sent]
        except BlockingIOError:
            pass
        except OSError:
            one.outgoing.clear()  # gone, which the fork server tells
        if one.writes != bool(one.outgoing):
            one.writes = bool(one.outgoing)
            events = selectors.EVENT_READ | (selectors.EVENT_WRITE if one.outgoing else 0)
            with contextlib.suppress(KeyError):
                self._selector.modify(one.link, events, number)

    def collect(self, seconds: float) -> None:
        """Pass on what there is, after waiting up to `seconds` for something."""
        soonest = min((one.deadline for one in self._episodes.values() if one.deadline is not None), default=None)
        if soonest is not None:
            seconds = max(min(seconds, soonest - time.monotonic()), 0.0)
        for key, events in self._selector.select(seconds):
            if key.data == "output":
                self._read_output()
            elif key.data == "control":
                self._read_control()
            elif key.data in self._episodes:
                if events & selectors.EVENT_WRITE:
                    self._write(key.data)
                if events & selectors.EVENT_READ:
                    self._read(key.data)
        now = time.monotonic()
        for number, one in list(self._episodes.items()):
            if one.deadline is not None and one.deadline <= now:
                self._read(number)  # this process may be the late one
                if number in self._episodes and one.deadline is not None:
                    self._lose(number, f"did not answer within its timeout of {self.timeout:g} s")

    def _read(self, number: int) -> None:
        one = self._episodes[number]
        try:
            while piece := one.link.recv(1 << 16):
                for message in one.inbox.feed(piece):
                    self._take(number, message)
                    if number not in self._episodes:
                        return
            self._selector.unregister(one.link)  # closed; how the process ended the fork server will tell
        except BlockingIOError:
            return
        except (KeyError, OSError):
            return
        except Garbage as garbage:
            self._lose(number, f"sent {garbage} to the trainer")

    def _take(self, number: int, message: dict[str, Any]) -> None:
        """What an episode said. Raises Garbage for what no program says."""
        one = self._episodes[number]
        if one.deadline is None:
            raise Garbage("a message out of turn")
        one.deadline = None
        try:
            if "turn" in message:
                self.inbox[number] = asked_of(message)
            elif "scored" in message:
                self.inbox[number] = Scored([Ended(**each) for each in message["scored"]])
                self._forget(number)
            elif "end" in message:
                self.inbox[number] = Ended(**message["end"])
                self._forget(number)
            else:
                self._lose(number, str(message["failed"]), str(message.get("traceback", "")))
        except (LookupError, TypeError):
            raise Garbage("a message that no program sends") from None
        self._hand_out()

    def _lose(self, number: int, problem: str, traceback: str = "") -> None:
        self.inbox[number] = Lost(problem, traceback)
        self._forget(number)
        self._hand_out()

    def _forget(self, number: int) -> None:
        """End an episode's process and what it started."""
        one = self._episodes.pop(number)
        with contextlib.suppress(KeyError):
            self._selector.unregister(one.link)
        one.link.close()
        del self._episode_of[one.process]
        self._order({"end": one.process})

    def _read_control(self) -> None:
        try:
            piece = self._control.recv(1 << 16)
        except OSError:
            piece = b""
        if not piece:
            self._gone = True
            self._selector.unregister(self._control)
            for number in list(self._episodes):
                self._lose(number, "was ended with the process that all episodes come from")
            self._drop_spare()
            return
        for report in self._reports.feed(piece):
            if "ended" in report:
                self._take_end(report["ended"], report["code"])
            elif "swept" in report:
                self._swept = report["swept"]
            else:
                self._loaded = report

    def _take_end(self, process: int, code: int) -> None:
        """A process has ended."""
        if (spare := self._spare.pop(process, None)) is not None:
            spare.close()
        if process in self._episode_of:
            self._read(self._episode_of[process])
        if process in self._episode_of:
            self._lose(self._episode_of[process], how_it_ended(code))

    def _read_output(self) -> None:
        assert self._process.stdout is not None
        for _ in range(64):
            try:
                data = os.read(self._process.stdout.fileno(), 1 << 16)
            except BlockingIOError:
                return
            if not data:
                self._selector.unregister(self._process.stdout)
                return
            *lines, self._line = (self._line + self._decoder.decode(data)).split("\n")
            for line in lines:
                self.on_output(line)
            if len(self._line) > 1 << 16:
                self.on_output(self._line)
                self._line = ""

    def sweep(self) -> None:
        """End all episodes and whatever they left behind, and forget what they said."""
        for number in list(self._episodes):
            self._forget(number)
        self._drop_spare()
        self._waiting.clear()
        self._sweeps += 1
        self._order({"sweep": self._sweeps})
        give_up = time.monotonic() + SWEEP_SECONDS
        while not self._gone and self._swept < self._sweeps:
            self.collect(0.1)
            if time.monotonic() > give_up:
                raise RuntimeError(f"environment {self.name!r}: processes of its episodes could not be ended")
        self.inbox.clear()

    def _close_server(self) -> None:
        for stream in (self._control, self._process.stdout):
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(stream)  # type: ignore[arg-type]
        self._finalizer()

    def close(self) -> None:
        """End all processes. May be called twice."""
        for number in list(self._episodes):
            self._forget(number)
        self._drop_spare()
        self._close_server()

    def __enter__(self) -> EnvironmentPool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def asked_of(message: dict[str, Any]) -> Asked:
    """What an episode asks for. Raises LookupError or TypeError for anything that no program asks for."""
    tools, limit, ids = message["tools"], message["max_tokens"], message.get("prompt_ids")
    if limit is not None and type(limit) is not int:
        raise TypeError("no limit")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise TypeError("no tools")
    if ids is None:
        return Asked(messages_of(message["turn"]), tools, limit)
    if not isinstance(ids, list) or not ids or not all(type(one) is int and one >= 0 for one in ids):
        raise TypeError("no tokens")
    return Asked([], tools, limit, ids)


def messages_of(value: Any) -> list[dict[str, Any]]:
    """`value` if it is a conversation. Raises TypeError for anything else."""
    if not isinstance(value, list) or not value:
        raise TypeError("no conversation")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise TypeError("no message")
    return value


def end_server(process: subprocess.Popen[bytes], control: socket.socket) -> None:
    """Close the link, upon which the fork server ends all that descends from it; kill it where it does not."""
    control.close()
    try:
        process.wait(SWEEP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def how_it_ended(code: int) -> str:
    """A process's exit code, or minus its signal, in words."""
    if code == -9:
        return "was killed (SIGKILL), most likely because the machine ran out of memory"
    return f"was ended by signal {-code}" if code < 0 else f"ended its process with exit code {code}"
