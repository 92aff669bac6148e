"""The log of every rank but the first: what one rank writes for all is not written again.

Only notices are passed on, since memory may run out on one rank alone. For the record and the display see
grpo/monitor/run_log.py.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from grpo.config.schema import Config
from grpo.monitor.run_log import RunLog
from grpo.printable import printable
from grpo.run.samples import SampleGroup


class SilentLog(RunLog):
    """A RunLog that keeps nothing."""

    def __init__(self, rank: int, config: Config):
        self.rank = rank
        self.max_steps = config.train.max_steps or 0
        self._samples_every = config.log.samples_every

    def close(self) -> None:
        """There is nothing to close."""

    def resume(self, step: int) -> None:
        """There is nothing to drop."""

    def status(self, text: str) -> None:
        """Shown by the first rank."""

    def notice(self, text: str) -> None:
        """One sentence on standard error, with the rank."""
        print(f"rank {self.rank}: {printable(text)}", file=sys.stderr, flush=True)

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Recorded by the first rank."""

    def evaluation(self, step: int, result: Mapping[str, Any], groups: Sequence[SampleGroup] = ()) -> None:
        """Recorded by the first rank."""

    def samples(self, step: int, groups: Sequence[SampleGroup]) -> None:
        """Kept by the first rank."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Written by the first rank."""
