"""What training says while it goes on, and to whom: the interface of a log, and the one of ranks that write nothing.

What one rank writes for all is not written again by the others. The record and the display of the first are in
grpo/monitor/run_log.py.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

from grpo.config.schema import Config
from grpo.printable import printable
from grpo.run.samples import SampleGroup


class TrainingLog(Protocol):
    """A context manager: leaving it ends the display."""

    max_steps: int
    """May be set later, when the data are known."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def status(self, text: str) -> None:
        """Say what is being done now; replaced by the next status or step."""

    def notice(self, text: str) -> None:
        """One sentence that stays."""

    def resume(self, step: int) -> None:
        """Go on after `step`: what was recorded of later steps is dropped."""

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Record the metrics of one step, of which "step" (from 1) is required."""

    def evaluation(self, step: int, result: Mapping[str, Any], groups: Sequence[SampleGroup] = ()) -> None:
        """Record held-out figures after `step`, and the answers `groups` to some of the questions."""

    def wants_samples(self, step: int) -> bool:
        """Whether completions of this step are to be kept; the same on every rank."""

    def samples(self, step: int, groups: Sequence[SampleGroup]) -> None:
        """Keep the completions of `groups`."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Record the end of the run."""


def is_sampled(step: int, config: Config, max_steps: int) -> bool:
    """Whether completions of `step` are kept: the first, the last, and every `log.samples_every`."""
    return step in (1, max_steps) or step % config.log.samples_every == 0


class NullLog:
    """The log of every rank but the first: nothing is recorded or shown.

    Only notices are passed on, to standard error with the rank, since memory may run out on one rank alone.
    """

    def __init__(self, rank: int, config: Config):
        self.rank, self.config = rank, config
        self.max_steps = config.train.max_steps or 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def status(self, text: str) -> None: ...

    def notice(self, text: str) -> None:
        print(f"rank {self.rank}: {printable(text)}", file=sys.stderr, flush=True)

    def resume(self, step: int) -> None: ...

    def step(self, metrics: Mapping[str, Any]) -> None: ...

    def evaluation(self, step: int, result: Mapping[str, Any], groups: Sequence[SampleGroup] = ()) -> None: ...

    def wants_samples(self, step: int) -> bool:
        return is_sampled(step, self.config, self.max_steps)

    def samples(self, step: int, groups: Sequence[SampleGroup]) -> None: ...

    def finish(self, summary: Mapping[str, Any]) -> None: ...
