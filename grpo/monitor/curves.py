"""Curves of one or several runs as a picture, for notebooks: a panel a metric, a colour a run.

matplotlib draws it, and is imported only here. What a run logged is given as lists; nothing is read or written but the
picture. The report in a run folder is another thing: `grpo.report`.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo.errors import UserError

Curve = tuple[Sequence[float], Sequence[float]]
"""Steps and values."""

WINDOW = 5
"""Steps that the line through the points is a mean over."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's palette, which most colour-blind people can tell apart."""
COLUMNS = 3
INCHES = (3.7, 2.5)
DOTS_PER_INCH = 96


class Plot:
    """A matplotlib figure that a notebook shows, whichever backend it uses. `figure` is open to changes."""

    def __init__(self, figure: Any, titles: Sequence[str]):
        self.figure = figure
        self.titles = list(titles)

    def save(self, path: str | Path) -> None:
        """Write the picture; the ending of `path` says in which format."""
        try:
            self.figure.savefig(path)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: the plot cannot be written ({error}); choose another file") from None

    def __repr__(self) -> str:
        return f"<curves of {', '.join(self.titles)}>"

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png")
        return buffer.getvalue()


def draw(panels: Mapping[str, Mapping[str, Curve]], x_label: str = "step") -> Plot:
    """A plot with a panel for each of `panels` (title -> run -> curve). Raises UserError without matplotlib.

    Each value is a point, and their mean over the last `WINDOW` steps a line.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        raise UserError("curves are drawn by matplotlib, which is not installed; pip install matplotlib") from None
    columns = 2 if len(panels) == 4 else max(min(COLUMNS, len(panels)), 1)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(INCHES[0] * columns, INCHES[1] * rows), dpi=DOTS_PER_INCH, layout="constrained")
    labels = list(dict.fromkeys(run for curves in panels.values() for run in curves))
    for index, (title, curves) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(rows, columns, index)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(x_label, fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        for run, (steps, values) in curves.items():
            colour = COLOURS[labels.index(run) % len(COLOURS)]
            axes.plot(steps, values, ".", color=colour, alpha=0.35, markersize=5)
            axes.plot(steps, rolling_mean(values), color=colour, linewidth=1.8, label=run)
        if index == 1 and len(labels) > 1:
            axes.legend(fontsize=8, frameon=False)
    return Plot(figure, list(panels))


def rolling_mean(values: Sequence[float]) -> list[float]:
    """At each value the mean of it and up to `WINDOW` - 1 before it."""
    windows = (values[max(end - WINDOW, 0) : end] for end in range(1, len(values) + 1))
    return [math.fsum(window) / len(window) for window in windows]


def shown_metrics(keys: Sequence[str]) -> list[str]:
    """Which of a run's metrics are drawn unless others are asked for: the reward, its functions, the length.

    One function alone is the reward, but for its weight.
    """
    functions = [key for key in keys if key.startswith("rewards/") and key.count("/") == 1]
    rewards = functions if len(functions) == 1 else ["reward", *functions]
    return [key for key in (*rewards, "completion_length") if key in keys]


TITLES = {
    "reward": "reward (weighted sum)",
    "completion_length": "completion length, tokens",
    "frac_reward_zero_std": "groups without spread, share",
}


def title_of(key: str) -> str:
    """A metric's name for people."""
    return TITLES.get(key, key.removeprefix("rewards/"))
