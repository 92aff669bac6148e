"""A run's record as curves and as a table; what a notebook shows while it goes on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from grpo.api.result import TrainResult
from grpo.errors import UserError
from grpo.monitor.curves import shown_metrics
from grpo.monitor.notebook import NotebookDisplay, Progress


def test_runs_are_drawn_beside_one_another_with_gaps_left_out(tmp_path: Path) -> None:
    entries = [{"step": 1, "reward": 0.0, "kl": None}, {"step": 2, "reward": 1.0, "kl": 0.5}]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    one, two = (TrainResult.read(tmp_path / name) for name in ("one", "two"))
    assert one.history("kl") == [None, 0.5]
    figure = one.plot(two, metrics=["kl", "reward"]).figure
    kl, reward = figure.axes
    assert [line.get_label() for line in reward.lines if not line.get_label().startswith("_")] == ["one", "two"]
    assert list(kl.lines[0].get_xdata()) == [2] and list(reward.lines[1].get_ydata()) == [0.0, 0.5]
    with pytest.raises(UserError, match="no run with a recorded step"):
        TrainResult.read(tmp_path)


def test_the_weighted_sum_is_drawn_where_there_is_something_to_add() -> None:
    logged = ["loss", "rewards/a", "rewards/a/std", "reward", "completion_length"]
    assert shown_metrics(logged) == ["rewards/a", "completion_length"]
    assert shown_metrics([*logged, "rewards/b"]) == ["reward", "rewards/a", "rewards/b", "completion_length"]


def test_without_matplotlib_a_plot_is_a_sentence_and_the_table_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = TrainResult.read(tmp_path)
    with pytest.raises(UserError, match="pip install matplotlib"):
        result.plot()
    assert "<table>" in result._repr_html_() and "<img" not in result._repr_html_()


class Handle:
    """One place in a cell's output, as IPython's display handle: what it has shown."""

    def __init__(self, first: Any):
        self.shown = [first]

    def update(self, value: Any) -> None:
        self.shown.append(value)


def test_a_cell_shows_a_line_and_a_plot_and_redraws_both_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    handles: list[Handle] = []

    def display(first: Any, display_id: bool) -> Handle:
        handles.append(Handle(first))
        return handles[-1]

    monkeypatch.setattr("IPython.display.display", display)
    monkeypatch.setattr("grpo.monitor.notebook.SECONDS_BETWEEN_PLOTS", 0.0)
    series: dict[str, list[float]] = {}
    line = "starting vLLM"
    shown = NotebookDisplay(lambda: Progress(line, series))
    shown.start()
    for said, reward in (("step 1", 0.5), ("evaluating", None), ("step 2", 0.7)):
        line = said
        if reward is not None:
            series.setdefault("reward", []).append(reward)
            series.setdefault("grad_norm", []).append(1.0)
        shown.refresh()
    shown.stop()
    text, plots = handles
    assert list(dict.fromkeys(map(repr, text.shown))) == ["starting vLLM", "step 1", "evaluating", "step 2"]
    _, first, second = plots.shown
    assert first.titles == second.titles == ["reward (weighted sum)"], "one plot a step, of what matters"
    assert list(second.figure.axes[0].lines[0].get_ydata()) == [0.5, 0.7]


def test_a_cell_without_matplotlib_keeps_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    handles: list[Handle] = []
    monkeypatch.setattr(
        "IPython.display.display", lambda first, display_id: handles.append(Handle(first)) or handles[-1]
    )
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    shown = NotebookDisplay(lambda: Progress("step 1", {"reward": [0.5]}))
    shown.start()
    shown.stop()
    assert [len(handle.shown) for handle in handles] == [2, 1]
