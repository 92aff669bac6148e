"""What a training run left behind, read from its run folder: metrics, held-out figures, and their curves.

For runs of the Python API and of the command line alike: `TrainResult.read("runs/gsm8k")`.
"""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo.errors import UserError
from grpo.monitor.curves import Curve, Plot, draw, shown_metrics, title_of
from grpo.run.records import EVALUATIONS, METRICS, SUMMARY, read_entries

ENDS = 5
"""Steps that the first and the last figure are means over."""


@dataclass(frozen=True)
class TrainResult:
    """A run's record. A notebook shows it as a table with the curves."""

    folder: Path
    metrics: list[dict[str, Any]]
    """One dict a step, as in metrics.jsonl."""
    evaluations: list[dict[str, Any]]
    """One dict an evaluation, as in eval.jsonl."""
    summary: dict[str, Any]
    """As in summary.json; empty for a run that did not finish."""

    @classmethod
    def read(cls, folder: str | Path) -> TrainResult:
        """The run in `folder`. Raises UserError where no step was recorded."""
        folder = Path(folder)
        metrics = list(read_entries(folder / METRICS))
        if not metrics:
            raise UserError(f"{folder}: no run with a recorded step is here; pass the folder of a run")
        try:
            summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            summary = {}
        return cls(folder, metrics, list(read_entries(folder / EVALUATIONS)), summary)

    @property
    def rewards(self) -> dict[str, list[float | None]]:
        """Each reward function's mean at every step, and "reward", their weighted sum."""
        names = [key for key in self._keys() if key == "reward" or is_function(key)]
        return {name.removeprefix("rewards/"): self.history(name) for name in names}

    def history(self, metric: str) -> list[float | None]:
        """A metric at every step, None where it was not measured. Raises UserError for one that never was."""
        if metric not in self._keys():
            raise UserError(f"{self.folder}: no metric {metric!r} was logged; there are {', '.join(self._keys())}")
        return [entry.get(metric) for entry in self.metrics]

    def plot(self, *others: TrainResult, metrics: Sequence[str] | None = None) -> Plot:
        """The curves of `metrics` (the rewards and the length, by default), beside those of `others`.

        A point is a step, the line their mean over five. Raises UserError without matplotlib.
        """
        runs = named((self, *others))
        chosen = metrics or shown_metrics(list(dict.fromkeys(key for run in runs.values() for key in run._keys())))
        panels = {
            title_of(key): {name: run._curve(key) for name, run in runs.items() if key in run._keys()} for key in chosen
        }
        for key, curves in zip(chosen, panels.values(), strict=True):
            if not curves:
                self.history(key)
        return draw(panels)

    def _keys(self) -> list[str]:
        numbers = (key for entry in self.metrics for key, value in entry.items() if isinstance(value, int | float))
        return list(dict.fromkeys(key for key in numbers if key != "step"))

    def _curve(self, key: str) -> Curve:
        points = [(entry["step"], entry[key]) for entry in self.metrics if isinstance(entry.get(key), int | float)]
        return [step for step, _ in points], [value for _, value in points]

    def _table(self) -> list[tuple[str, float, float]]:
        """(name, mean of the first steps, mean of the last) of what is most asked for."""
        rows = []
        for key in shown_metrics(self._keys()):
            _, values = self._curve(key)
            first, last = values[:ENDS], values[-ENDS:]
            rows.append((title_of(key), math.fsum(first) / len(first), math.fsum(last) / len(last)))
        return rows

    def __repr__(self) -> str:
        figures = ", ".join(f"{name} {first:.3f} -> {last:.3f}" for name, first, last in self._table())
        return f"<{len(self.metrics)} steps in {self.folder}: {figures}>"

    def _repr_html_(self) -> str:
        span = min(ENDS, len(self.metrics))
        rows = "".join(
            f"<tr><td style='text-align:left'>{html.escape(name)}</td><td>{first:.3f}</td><td>{last:.3f}</td>"
            f"<td>{last - first:+.3f}</td></tr>"
            for name, first, last in self._table()
        )
        return (
            f"<table><tr><th></th><th>first {span} steps</th><th>last {span}</th><th>change</th></tr>{rows}</table>"
            f"<p>{len(self.metrics)} steps in {html.escape(str(self.folder))}</p>{self._picture()}"
        )

    def _picture(self) -> str:
        """The curves as an HTML image, or nothing where they cannot be drawn."""
        try:
            encoded = base64.b64encode(self.plot()._repr_png_()).decode()
        except UserError:
            return ""
        return f"<img src='data:image/png;base64,{encoded}' alt='curves of the run'>"


def is_function(key: str) -> bool:
    """Whether a metric is the mean of one reward function."""
    return key.startswith("rewards/") and key.count("/") == 1


def named(runs: Sequence[TrainResult]) -> dict[str, TrainResult]:
    """The runs by the names of their folders, or by their whole paths where two have the same name."""
    names = [run.folder.name for run in runs]
    return {run.folder.name if names.count(run.folder.name) == 1 else str(run.folder): run for run in runs}
