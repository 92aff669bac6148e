"""The soak's arithmetic: a leak shows as a slope, noise and a changing load do not."""

from __future__ import annotations

import random

import pytest

from benchmarks.soak import line, summary


def run(steps: int, leak_mib: float = 0.0, files: float = 0.0) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    draw = random.Random(0)
    seen = [
        {
            "step": float(step),
            "resident_mib": 900 + leak_mib * step + draw.uniform(-5, 5) + (300 if step <= 10 else 0),
            "open_files": 40 + files * step,
            "threads": 30.0,
            "children": 2.0,
        }
        for step in range(1, steps + 1)
    ]
    seen.append({name: 0.0 for name in seen[0]} | {"step": float(steps)})  # on its way out
    metrics = [
        {"step": step, "step_seconds": 2.0 + step / 50, "train_seconds": 1.0, "tokens": 100 + step}
        for step in range(1, steps + 1)
    ]
    return seen, metrics


def test_a_run_without_a_leak_is_flat_and_the_warm_up_is_left_out() -> None:
    result = summary(*run(200), warmup=10)
    assert result["grew"] == [] and result["steps"] == 200 and result["observations"] == 189
    assert abs(result["watched"]["resident_mib"]["slope_per_100_steps"]) < 3
    # Steps take longer as completions do; a token costs the same.
    assert result["watched"]["step_seconds"]["slope_per_100_steps"] == pytest.approx(2.0)
    assert abs(result["watched"]["seconds_per_token"]["share_per_100_steps"]) < 0.01


@pytest.mark.parametrize(("leak", "name"), [({"leak_mib": 0.5}, "resident_mib"), ({"files": 0.05}, "open_files")])
def test_a_leak_is_found(leak: dict[str, float], name: str) -> None:
    result = summary(*run(200, **leak), warmup=10)
    assert result["grew"] == [name]


def test_too_little_to_fit_a_line_is_left_out() -> None:
    assert line([(1.0, 2.0), (1.0, 3.0), (2.0, 4.0)]) is None
    assert summary([], [], warmup=0)["watched"] == {}
