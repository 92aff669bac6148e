"""What a notebook cell shows while a run goes on: a line of figures and a plot of the rewards, redrawn in place.

It replaces the live table of a terminal. IPython's display handles suffice; widgets are not needed. Without matplotlib
the line stays and the plot is left out.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grpo.errors import UserError
from grpo.monitor.curves import Curve, draw, shown_metrics, title_of

SECONDS_BETWEEN_PLOTS = 1.0


@dataclass(frozen=True)
class Progress:
    """A run as it stands."""

    line: str
    """What is being done, or the figures of the last step."""
    series: Mapping[str, Sequence[float]]
    """Metric -> its values, a step each."""


class NotebookDisplay:
    """The live part of a cell's output. `progress` is asked at every change."""

    def __init__(self, progress: Callable[[], Progress]):
        self._progress = progress
        self._line: Any = None
        self._plot: Any = None
        self._drawn = (0.0, 0)
        """When the plot was drawn last, and of how many steps."""

    def start(self) -> None:
        """Show the first line, and keep the place below it for the plot."""
        from IPython.display import display

        self._line = display(self._shown_line(), display_id=True)
        self._plot = display(PlainLine(""), display_id=True)

    def refresh(self) -> None:
        """Show what has changed."""
        self._line.update(self._shown_line())
        self._draw(SECONDS_BETWEEN_PLOTS)

    def stop(self) -> None:
        """Show the last state and leave it there."""
        self._line.update(self._shown_line())
        self._draw(0.0)

    def _shown_line(self) -> PlainLine:
        return PlainLine(self._progress().line)

    def _draw(self, interval: float) -> None:
        """Redraw the plot if steps were added, at most every `interval` seconds."""
        series = self._progress().series
        when, steps_drawn = self._drawn
        steps = len(series.get("reward", ()))
        if steps == steps_drawn or time.perf_counter() - when < interval:
            return
        panels = {title_of(key): {"": curve(series[key])} for key in shown_metrics(list(series))}
        with contextlib.suppress(UserError):
            self._plot.update(draw(panels))
        self._drawn = time.perf_counter(), steps


@dataclass(frozen=True)
class PlainLine:
    """Text that a notebook shows without quotes and does not interpret."""

    text: str

    def __repr__(self) -> str:
        return self.text


def curve(values: Sequence[float]) -> Curve:
    """`values` over the steps 1, 2, ..."""
    return range(1, len(values) + 1), values
