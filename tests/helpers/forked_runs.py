"""Runs of the trainer that start in no time: each is a process forked from one in which vLLM has started.

A forked run is a process like any other (`grpo.train.main` runs in it from the command line's arguments on), so that
it can be killed, interrupted and resumed in another; only the start of vLLM is shared. Nothing is trained in the
process that they are forked from. There, and so in all of them, whatever leads out of this machine raises and is
noted: `ForkedRuns.network`.

Faults are injected by name (`FAULTS`) into the run that is to fail, never into the one that resumes it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.helpers.paths import ROOT

# The side of the tests


class Finished:
    """How a run ended: its exit code, or minus the signal that ended it, and what it printed."""

    def __init__(self, code: int, output: Path):
        self.code, self.name = code, output.name
        self.out = output.with_suffix(".out").read_text()
        self.err = output.with_suffix(".err").read_text()

    @property
    def sentence(self) -> str:
        """The one line that `grpo.train` wrote about its end."""
        assert "Traceback" not in self.err, self.err
        (line,) = [line for line in self.err.splitlines() if line.startswith("grpo.train: ")]
        return line


class Started:
    """A run that goes on."""

    def __init__(self, runs: ForkedRuns, pid: int, output: Path):
        self.runs, self.pid, self.output = runs, pid, output

    def wait(self) -> Finished:
        return Finished(self.runs.ask(wait=self.pid)["code"], self.output)


class ForkedRuns:
    """The process with vLLM, on the model that `config` names; `home` is where outputs go. A context manager."""

    def __init__(self, config: Path, home: Path, **environment: str):
        self.home, self._count = home, 0
        one_thread = {"OMP_NUM_THREADS": "1"}  # a fork has none of OpenMP's other threads, and would wait for them
        command = [sys.executable, "-m", "tests.helpers.forked_runs", str(config), str(home)]
        self._errors = (home / "server.err").open("w")
        self._process = subprocess.Popen(
            command,
            cwd=home,
            env={**os.environ, **one_thread, "PYTHONPATH": str(ROOT), **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        assert self.answer() == {"ready": True}

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, (self.home / "server.err").read_text()
        return json.loads(line)

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self.answer()

    def start(
        self, *arguments: str | Path, fault: tuple[Any, ...] = (), environment: dict[str, str] | None = None
    ) -> Started:
        """Begin `grpo.train` with `arguments`, with the fault FAULTS[fault[0]](*fault[1:]) in it, and with further
        variables in its environment."""
        self._count += 1
        output = self.home / f"forked-{self._count}"
        request: dict[str, Any] = {"arguments": list(map(str, arguments)), "fault": list(map(str, fault))}
        request |= {"output": str(output), "environment": environment or {}}
        return Started(self, self.ask(**request)["pid"], output)

    def run(self, *arguments: str | Path, fault: tuple[Any, ...] = ()) -> Finished:
        return self.start(*arguments, fault=fault).wait()

    @property
    def network(self) -> str:
        """What tried to reach another machine, one address a line."""
        return (self.home / "network.txt").read_text()

    @property
    def unpickled(self) -> str:
        """What a run looked up for a pickle, one name a line."""
        return (self.home / "unpickled.txt").read_text()

    def __enter__(self) -> ForkedRuns:
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()
        self._errors.close()


# Faults


AT_END: list[Callable[[], None]] = []
"""Called in a run when `grpo.train.main` has returned."""


def kill_now() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def counted(when: int, what: Callable[[], None] = kill_now) -> Callable[[], None]:
    """A function whose call number `when` (from 1) does `what`."""
    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1
        if calls == when:
            what()

    return count


def on_events(place: tuple[str, str], count: Callable[[], None]) -> None:
    """Call `count` at every file operation within the function `place`: (module or module:class, name)."""
    inside = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        # Opening, renaming, removing; reading what a library imports is none of it.
        if inside and event in {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"}:
            count()

    sys.addaudithook(hook)

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            nonlocal inside
            inside = True
            try:
                return function(*arguments, **named)
            finally:
                inside = False

        return wrapped

    replace(place, wrap)


def replace(place: tuple[str, str], wrap: Callable[[Any], Any]) -> None:
    """Put wrap(f) where the function f stands: `place` is ("module" or "module:Class", name)."""
    import importlib

    module, _, owner = place[0].partition(":")
    holder: Any = importlib.import_module(module)
    holder = getattr(holder, owner) if owner else holder
    setattr(holder, place[1], wrap(getattr(holder, place[1])))


def in_rollout(session: Any, count: Callable[[], None]) -> None:
    """At every step of vLLM."""
    core = session.engine.llm.llm_engine
    step = core.step

    def stepping() -> Any:
        count()
        return step()

    core.step = stepping


def in_backward(session: Any, count: Callable[[], None]) -> None:
    """Whenever the gradient of one of the adapter's tensors is known."""
    for parameter in session.policy.parameters():
        parameter.register_hook(lambda gradient: count())


PHASES: dict[str, Callable[[Any, Callable[[], None]], None]] = {
    "rollout": in_rollout,
    "backward": in_backward,
    "checkpoint": lambda session, count: on_events(("grpo.training.trainer", "save"), count),
    "samples": lambda session, count: on_events(("grpo.monitor.run_log:RunLog", "samples"), count),
    "evaluation": lambda session, count: on_events(("grpo.training.trainer:Trainer", "evaluate"), count),
    "report": lambda session, count: on_events(("grpo.report.page", "write_report"), count),
    "finish": lambda session, count: on_events(("grpo.training.trainer:Trainer", "finish"), count),
}
"""Where a run can be hit, each with what counts the moments of that kind."""


def kill_at(session: Any, phase: str, moment: str) -> None:
    """SIGKILL at the moment number `moment` (from 1) of the run's `phase`."""
    PHASES[phase](session, counted(int(moment)))


def count_moments(session: Any, file: str) -> None:
    """No fault: write how many moments of each phase the run has to `file`, when `grpo.train.main` returns."""
    found = dict.fromkeys(PHASES, 0)

    def counter(phase: str) -> Callable[[], None]:
        def count() -> None:
            found[phase] += 1

        return count

    for phase, watch in PHASES.items():
        watch(session, counter(phase))
    AT_END.append(lambda: Path(file).write_text(json.dumps(found)))


def signal_at(session: Any, phase: str, moment: str, number: str, *again: str) -> None:
    """The signal `number`, and with `again` a second one, at that moment."""

    def send() -> None:
        for _ in range(1 + len(again)):
            os.kill(os.getpid(), int(number))

    PHASES[phase](session, counted(int(moment), send))


def stuck_after(session: Any, phase: str, moment: str, number: str, *again: str) -> None:
    """The signal `number` at that moment, in a main thread that then hangs in C code, as in a kernel without end.

    `again`: one more comes a second later. What a run may take to save itself is cut to three seconds.
    """
    import ctypes
    import functools

    def hang() -> None:
        os.kill(os.getpid(), int(number))
        if again:
            threading.Timer(1.0, os.kill, (os.getpid(), int(number))).start()
        for _ in range(100):  # a signal ends each sleep
            ctypes.CDLL(None).sleep(100)

    replace(("grpo.train", "leaving_at_once"), lambda leaving: functools.partial(leaving, 60.0 if again else 3.0))
    PHASES[phase](session, counted(int(moment), hang))


def refuse_writes(session: Any, phase: str, moment: str, name: str) -> None:
    """From that moment on, every file that is opened to be written raises the error `name`, such as ENOSPC."""
    refusing = False

    def refuse() -> None:
        nonlocal refusing
        refusing = True

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if refusing and event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            number = getattr(errno, name)
            raise OSError(number, os.strerror(number), str(arguments[0]))

    sys.addaudithook(hook)
    PHASES[phase](session, counted(int(moment), refuse))


def remove_at(session: Any, phase: str, moment: str, path: str) -> None:
    """Remove the file `path` at that moment."""
    PHASES[phase](session, counted(int(moment), lambda: os.remove(path)))


def set_clock(session: Any, phase: str, moment: str, seconds: str) -> None:
    """Move the wall clock by `seconds` at that moment."""
    import time

    true, shift = time.time, 0.0

    def move() -> None:
        nonlocal shift
        shift = float(seconds)

    time.time = lambda: true() + shift
    PHASES[phase](session, counted(int(moment), move))


def poison_updates(session: Any, what: str, *steps: str) -> None:
    """In these steps make `what` unusable: the loss is NaN, or vLLM's logprobs are."""
    bad = {int(step) for step in steps}
    if what == "rollout":
        replace(("grpo.training.trainer:Trainer", "sample"), lambda sample: rewriting(sample, bad))
        return
    now = 0

    def noting(update: Callable[..., Any]) -> Callable[..., Any]:
        def noted(self: Any, groups: Any, advantages: Any, step: int) -> Any:
            nonlocal now
            now = step
            return update(self, groups, advantages, step)

        return noted

    def poisoned(micro_batch: Callable[..., Any]) -> Callable[..., Any]:
        def computed(self: Any, *arguments: Any) -> Any:
            loss, metrics = micro_batch(self, *arguments)
            return (loss * float("nan") if now in bad else loss), metrics

        return computed

    replace(("grpo.training.learner:Learner", "update"), noting)
    replace(("grpo.training.learner:Learner", "micro_batch"), poisoned)


def rewriting(sample: Callable[..., Any], steps: set[int]) -> Callable[..., Any]:
    def rewritten(self: Any, step: int) -> Any:
        rollouts, scored = sample(self, step)
        if step in steps:
            for one in rollouts[0].groups[0].samples:
                one.logprobs = [float("nan")] * len(one.logprobs)
        return rollouts, scored

    return rewritten


FAULTS: dict[str, Callable[..., None]] = {
    "kill": kill_at,
    "count": count_moments,
    "signal": signal_at,
    "stuck": stuck_after,
    "refuse": refuse_writes,
    "remove": remove_at,
    "clock": set_clock,
    "poison": poison_updates,
}

# The side of the runs


def note_network(file: Path) -> None:
    """From now on, whatever in Python leads to another machine is noted in `file` and raises."""
    file.touch()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "socket.connect":
            address = arguments[1]
        elif event in {"socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"}:
            address = arguments[0]
        else:
            return
        if isinstance(address, str) or (isinstance(address, tuple) and address[0] in {"127.0.0.1", "localhost", "::1"}):
            if event == "socket.connect":
                return
        with file.open("a") as lines:
            lines.write(f"{event} {address!r}\n")
        raise OSError(errno.ENETUNREACH, "the network is blocked")

    sys.addaudithook(hook)


def note_pickles(file: Path) -> None:
    """From now on, whatever is unpickled that could run code is noted in `file`."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "pickle.find_class":
            with file.open("a") as lines:
                lines.write(f"{arguments[0]}.{arguments[1]}\n")

    sys.addaudithook(hook)


def serve(config: Path, home: Path) -> None:
    """Start vLLM on the model of `config`, then fork a run for every request on standard input."""
    note_network(home / "network.txt")
    (home / "unpickled.txt").touch()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    from grpo.run.library_logs import quiet_libraries

    quiet_libraries(False)
    import grpo.training.run
    from grpo.config.schema import read_config
    from grpo.session import open_session

    session = open_session(read_config(config))
    session.engine  # noqa: B018 - starts vLLM

    @contextlib.contextmanager
    def opened(config: Any, **_: Any) -> Iterator[Any]:
        session.config = config
        yield session

    grpo.training.run.open_session = opened  # type: ignore[assignment]
    answer(answers, ready=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            answer(answers, code=os.waitstatus_to_exitcode(status))
        elif pid := os.fork():
            answer(answers, pid=pid)
        else:
            run(session, request)
    os._exit(0)  # vLLM takes seconds to end in order


def answer(answers: Any, **content: Any) -> None:
    answers.write(json.dumps(content) + "\n")
    answers.flush()


def run(session: Any, request: dict[str, Any]) -> None:
    """In the forked process: the command line with the request's arguments. Does not return."""
    import traceback

    from grpo.train import main

    assert threading.active_count() == 1, "a forked process has only the thread that forked it"
    os.environ.update(request["environment"])
    output = Path(request["output"])
    note_pickles(output.parent / "unpickled.txt")
    for descriptor, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(output.with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    code = 1
    try:
        if request["fault"]:
            FAULTS[request["fault"][0]](session, *request["fault"][1:])
        code = main(request["arguments"])
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    for last in AT_END:
        last()
    os._exit(code)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), Path(sys.argv[2]))
