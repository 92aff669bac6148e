"""Where the main thread of a Python process spends its wall time: its stack, looked at every few milliseconds.

A profiler that traces calls slows imports down severalfold, and a look costs microseconds. What passes between two
looks is counted for the later one, so a call into C that keeps the interpreter's lock has its whole time. The thread's
own processor time is counted too: what is missing from it was waited for, a disk or another thread.

Not here: other threads, other processes.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from types import FrameType
from typing import Any, NamedTuple

EVERY = 0.01
"""Seconds between two looks."""
UNSEEN = ("<frozen importlib", "<frozen runpy", "runpy.py", "contextlib.py", "threading.py")
"""Files whose frames say nothing of what is being done."""


class Place(NamedTuple):
    """A function, or a module that is being imported, and its file."""

    file: str
    function: str

    def __str__(self) -> str:
        parts = self.file.removesuffix(".py").removesuffix("/__init__").split("/")
        package = next((n for n, part in enumerate(parts) if part in ("site-packages", "dist-packages")), None)
        name = ".".join(parts[package + 1 :] if package is not None else parts[-3:])
        return f"import {name}" if self.function == "<module>" else f"{name}:{self.function}"


class StackSampler(threading.Thread):
    """Looks at the stack of the thread that makes it, from `start` to `stop`."""

    def __init__(self) -> None:
        super().__init__(daemon=True, name="stack-samples")
        self._watched, self._ends = threading.get_ident(), threading.Event()
        self._clock = time.pthread_getcpuclockid(self._watched)
        self.seconds: Counter[tuple[Place, ...]] = Counter()
        """Stack, outermost first -> seconds."""
        self.busy: Counter[tuple[Place, ...]] = Counter()
        """The same of processor time."""
        self.looks: list[tuple[float, float, tuple[Place, ...]]] = []
        """By the clock, seconds since the look before, stack."""

    def run(self) -> None:
        before, used = time.perf_counter(), time.clock_gettime(self._clock)
        while not self._ends.wait(EVERY):
            frame = sys._current_frames().get(self._watched)
            now, using = time.perf_counter(), time.clock_gettime(self._clock)
            stack = stack_of(frame)
            self.seconds[stack] += now - before
            self.looks.append((time.time(), now - before, stack))
            self.busy[stack] += using - used
            before, used = now, using

    def stop(self) -> None:
        self._ends.set()
        self.join()

    def tree(self, least: float) -> list[dict[str, Any]]:
        """What took at least `least` seconds, with what it called, as lines of a tree in the order of calls."""
        return lines(self.seconds, self.busy, least)


def stack_of(frame: FrameType | None) -> tuple[Place, ...]:
    places: list[Place] = []
    while frame is not None:
        code = frame.f_code
        if not code.co_filename.startswith(UNSEEN) and not code.co_filename.endswith(UNSEEN):
            places.append(Place(code.co_filename, code.co_name))
        frame = frame.f_back
    return tuple(reversed(places))


def phases(
    looks: list[tuple[float, float, tuple[Place, ...]]], marks: dict[str, tuple[str, str]]
) -> dict[str, list[float]]:
    """Phase -> [when it was first seen, its seconds], for marks of phases: (end of a file's name, function; a
    function's beginning is enough). A look belongs to the first of the marks that is on its stack, the outermost place,
    the program itself, left out."""
    found: dict[str, list[float]] = {}
    for at, spent, stack in looks:
        names = (
            name for name, (file, function) in marks.items()
            if any(place.file.endswith(file) and place.function.startswith(function) for place in stack[1:])
        )  # fmt: skip
        name = next(names, "other")
        found.setdefault(name, [at - spent, 0.0])[1] += spent
    return found


def with_below(seconds: Counter[tuple[Place, ...]]) -> dict[tuple[Place, ...], float]:
    """Every place's seconds with those of what it called, in the order of first looks."""
    inclusive: dict[tuple[Place, ...], float] = {}
    for stack, spent in seconds.items():
        for depth in range(1, len(stack) + 1):
            inclusive[stack[:depth]] = inclusive.get(stack[:depth], 0.0) + spent
    return inclusive


def lines(seconds: Counter[tuple[Place, ...]], busy: Counter[tuple[Place, ...]], least: float) -> list[dict[str, Any]]:
    """One entry a place that took `least` seconds: its depth, its name, its seconds with all below and alone, and of
    those with all below how many a processor worked."""
    inclusive, worked = with_below(seconds), with_below(busy)
    below: dict[tuple[Place, ...], list[tuple[Place, ...]]] = {}
    for stack in inclusive:
        below.setdefault(stack[:-1], []).append(stack)
    found: list[dict[str, Any]] = []

    def visit(stack: tuple[Place, ...], depth: int) -> None:
        children = [child for child in below.get(stack, []) if inclusive[child] >= least]
        if stack:
            alone = round(seconds.get(stack, 0.0), 2)
            # A function whose time is all in one it calls is left out.
            if len(children) != 1 or inclusive[children[0]] < 0.95 * inclusive[stack] or alone >= least:
                whole, used = round(inclusive[stack], 2), round(worked[stack], 2)
                found.append({"depth": depth, "what": str(stack[-1]), "s": whole, "own_s": alone, "busy_s": used})
                depth += 1
        for child in children:
            visit(child, depth)

    visit((), 0)
    return found
