"""The charts of a report as plain data: which figures, under which title, in which unit, thinned to a page's size.

The page's script draws what is listed here and knows nothing of training. A chart is

    {"title", "unit", "about", "kind": "line" | "stack" | "points", "format", "from_zero", "log", "wide",
     "series": [{"label", "x", "y", "low"?, "high"?, "trend"?, "colour"}], "marks": [{"label", "value"}]}

`x` are steps; where a run has more than `POINTS`, a point is the mean over `span` steps, with their extremes as `low`
and `high` unless the figure has a spread of its own. None in `y` is a gap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from grpo.report.chart_specs import AGREEMENT, COMPLETIONS, EPISODES, LEARNING, RESOURCES, Spec
from grpo.report.data import RunData, mean, rounded

POINTS = 300
"""At most so many points in a curve."""
TREND_SHARE = 0.05
"""Share of the run over which the trend of a noisy curve is a mean."""

Chart = dict[str, Any]
Series = dict[str, Any]


TIMES = {
    "rollout_seconds": "sampling",
    "reward_seconds": "waiting for rewards",
    "train_seconds": "training",
    "sync_seconds": "handing over the adapter",
}
OTHER_TIME, EVALUATION_TIME = "other", "evaluation"
SEGMENTS = [*TIMES.values(), OTHER_TIME, EVALUATION_TIME]


def sections(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """The report's charts by section, {"id", "title", "charts"}; sections without figures are left out."""
    titled = [
        ("reward", "Reward", reward_charts(runs)),
        ("evaluation", "Held-out questions", evaluation_charts(runs)),
        ("lengths", "Completions", line_charts(runs, COMPLETIONS)),
        ("episodes", "Episodes", line_charts(runs, EPISODES)),
        ("learning", "Learning", line_charts(runs, LEARNING)),
        ("agreement", "Sampler against trainer", line_charts(runs, AGREEMENT)),
        ("time", "Time and memory", [*time_charts(runs), *line_charts(runs, RESOURCES)]),
        ("more", "Everything else", other_charts(runs)),
    ]
    return [{"id": name, "title": title, "charts": charts} for name, title, charts in titled if charts]


def chart(spec: Spec, series: list[Series], runs: Sequence[RunData], **more: Any) -> Chart:
    marks = {mark for run in runs if (mark := spec.mark(run))[1] is not None} if spec.mark else set()
    return {
        "title": spec.title,
        "unit": spec.unit,
        "about": spec.about,
        "kind": "line",
        "format": spec.format,
        "log": spec.log,
        "from_zero": spec.from_zero,
        "series": series,
        # Runs with different limits would need a line each.
        "marks": [{"label": label, "value": value} for label, value in marks] if len(marks) == 1 else [],
        **more,
    }


def line_charts(runs: Sequence[RunData], specs: Sequence[Spec]) -> list[Chart]:
    """Those of `specs` that a run has figures for."""
    charts = []
    for spec in specs:
        if series := drawn(runs, spec):
            charts.append(chart(spec, series, runs))
    return charts


def drawn(runs: Sequence[RunData], spec: Spec) -> list[Series]:
    """The curves of `spec`: one a metric for a single run, one a run for several."""
    if len(runs) == 1:
        present = [(key, label) for key, label in spec.keys.items() if runs[0].known(key)]
        return [curve(runs[0], key, label, index, spec.noisy) for index, (key, label) in enumerate(present)]
    key = next(iter(spec.keys))
    return [curve(run, key, run.name, index, spec.noisy) for index, run in enumerate(runs) if run.known(key)]


def curve(run: RunData, key: str, label: str, colour: int, noisy: bool = False, spread: str = "") -> Series:
    """One metric over the steps. `spread`: the metric that is its standard deviation, drawn as a band."""
    values = run.series[key]
    size = -(-len(values) // POINTS)
    xs, means = thinned(run.steps, size, last), thinned(values, size, mean_of)
    series: Series = {"label": label, "colour": colour, "x": xs, "y": list(map(rounded, means))}
    if size > 1:
        series["span"] = size
    if spread in run.series:
        pairs = deviations(run, key, spread, size)
        series["band"] = "standard deviation"
    elif size > 1:
        pairs = list(zip(thinned(values, size, least), thinned(values, size, largest), strict=True))
        series["band"] = "least and largest"
    else:
        pairs = []
    if pairs:
        series["low"], series["high"] = ([rounded(pair[side]) for pair in pairs] for side in (0, 1))
    if noisy and len(means) >= 10:
        series["trend"] = list(map(rounded, smoothed(means, max(int(len(means) * TREND_SHARE), 3))))
    return series


def deviations(run: RunData, key: str, spread: str, size: int) -> list[tuple[float | None, float | None]]:
    """A standard deviation to either side of each mean of `size` steps, as far as the rewards of these steps reach."""
    prefix = spread.removesuffix("std")
    least_seen, largest_seen = extremes(run, key, prefix)
    columns = (
        thinned(run.series[key], size, mean_of),
        thinned(run.series[spread], size, mean_of),
        thinned(run.series.get(f"{prefix}min", [least_seen] * len(run.steps)), size, least),
        thinned(run.series.get(f"{prefix}max", [largest_seen] * len(run.steps)), size, largest),
    )
    return [
        (None, None) if at is None or width is None else (max_of(at - width, low), min_of(at + width, high))
        for at, width, low, high in zip(*columns, strict=True)
    ]


def extremes(run: RunData, key: str, prefix: str) -> tuple[float | None, float | None]:
    """The least and the largest reward of a run that did not log them at each step, from its means and completions.

    (None, None) where they are logged, and where the spread shows that there were others beyond them.
    """
    if f"{prefix}min" in run.series:
        return None, None
    name = key.removeprefix("rewards/")
    samples = [sample for group in run.groups if group["kind"] == "training" for sample in group["samples"]]
    shown = [sample["reward"] if key == "reward" else sample["rewards"].get(name) for sample in samples]
    low, high = least([*run.series[key], *shown]), largest([*run.series[key], *shown])
    if low is None or high is None:
        return None, None
    pairs = zip(run.series[key], run.series[f"{prefix}std"], strict=True)
    # No spread between two ends is larger than that of values at both ends alone; 1.5: of few values.
    inside = all(s * s <= 1.5 * (high - m) * (m - low) + 1e-9 for m, s in pairs if m is not None and s is not None)
    return (low, high) if inside else (None, None)


def max_of(value: float, bound: float | None) -> float:
    return value if bound is None else max(value, bound)


def min_of(value: float, bound: float | None) -> float:
    return value if bound is None else min(value, bound)


def thinned(values: Sequence[Any], size: int, reduce: Callable[[Sequence[Any]], Any]) -> list[Any]:
    """`reduce` of every `size` values."""
    return [reduce(values[start : start + size]) for start in range(0, len(values), size)]


def last(values: Sequence[Any]) -> Any:
    return values[-1]


def mean_of(values: Sequence[float | None]) -> float | None:
    return mean([value for value in values if value is not None])


def least(values: Sequence[float | None]) -> float | None:
    return min((value for value in values if value is not None), default=None)


def largest(values: Sequence[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def smoothed(values: Sequence[float | None], width: int) -> list[float | None]:
    """Means over `width` values around each, fewer at the ends."""
    half = width // 2
    return [mean_of(values[max(index - half, 0) : index + half + 1]) for index in range(len(values))]


# Reward


def reward_charts(runs: Sequence[RunData]) -> list[Chart]:
    """The total, and each function."""
    one = len(runs) == 1
    band = " The band is a standard deviation of the completions' rewards to either side." if one else ""
    about = f"Mean over the step's completions, thin; thick, averaged over neighbouring steps.{band}"
    total = Spec("Reward", "reward", about, {"reward": "reward"}, noisy=True)
    charts = [chart(total, reward_curves(runs, "reward", "reward_std"), runs, wide=True)]
    for name in dict.fromkeys(name for run in runs for name in run.rewards):
        key = f"rewards/{name}"
        weight = reward_weight(runs[0], name)
        about = "" if weight is None else f"Weight {weight:g} in the sum." if weight else "Logged only: weight 0."
        spec = Spec(name, "reward", about, {key: name}, noisy=True)
        charts.append(chart(spec, reward_curves(runs, key, f"{key}/std"), runs))
    return [made for made in charts if made["series"]]


def reward_curves(runs: Sequence[RunData], key: str, spread: str) -> list[Series]:
    one = len(runs) == 1
    return [
        curve(run, key, "mean" if one else run.name, index, noisy=True, spread=spread if one else "")
        for index, run in enumerate(runs)
        if run.known(key)
    ]


def reward_weight(run: RunData, name: str) -> float | None:
    """The weight of a reward function where the configuration lists it."""
    for table in run.config.get("rewards") or ():
        if name in (table.get("name"), str(table.get("function", "")).split(":")[-1].split(".")[-1]):
            return table.get("weight", 1.0)
    return None


# Evaluation


def evaluation_charts(runs: Sequence[RunData]) -> list[Chart]:
    """Accuracies with their intervals; with several tasks each also has its own chart."""
    prefixes = dict.fromkeys(prefix for run in runs for entry in run.evaluations for prefix in accuracy_prefixes(entry))
    charts = []
    for prefix in prefixes:
        series = [
            points(run, f"{prefix}{metric}", run.name if len(runs) > 1 else label)
            for run in runs
            for metric, label in (accuracies(run, prefix) if len(runs) == 1 else {"strict_accuracy": ""}).items()
        ]
        series = [{**one, "colour": index} for index, one in enumerate(one for one in series if one["x"])]
        task = prefix.removeprefix("eval/").rstrip("/")
        charts.append(
            {
                "title": f"Accuracy, {task}" if task else "Accuracy",
                "unit": "% of questions",
                "about": "Strict: right, in the format asked for. Flexible: right, wherever the answer stands. "
                "Bars are 95 % intervals." if len(runs) == 1 else "Strict, with 95 % intervals.",
                "kind": "points",
                "format": "percent",
                "from_zero": True,
                "log": False,
                "series": series,
                "marks": [],
            }
        )  # fmt: skip
    return charts + held_out_loss(runs)


def held_out_loss(runs: Sequence[RunData]) -> list[Chart]:
    """What a supervised run measures, below the loss of its own steps."""
    series = [points(run, "eval/loss", run.name if len(runs) > 1 else "held out") for run in runs]
    series = [{**one, "colour": index} for index, one in enumerate(one for one in series if one["x"])]
    about = "On examples that are not trained on. Where it rises again, the run has begun to learn them by heart."
    marks = {"kind": "points", "format": "number", "from_zero": False, "log": False, "marks": []}
    made = {"title": "Held-out loss", "unit": "nats per token", "about": about, "series": series, **marks}
    return [made] if series else []


def accuracy_prefixes(entry: dict[str, Any]) -> list[str]:
    return [key.removesuffix("strict_accuracy") for key in entry if key.endswith("/strict_accuracy")]


def accuracies(run: RunData, prefix: str) -> dict[str, str]:
    """Metric -> label of the accuracies below `prefix`; pass@1 is the accuracy itself."""
    names = {"strict_accuracy": "strict", "flexible_accuracy": "flexible"}
    for key in dict.fromkeys(key for entry in run.evaluations for key in entry):
        name = key.removeprefix(prefix)
        if key.startswith(prefix) and "/" not in name and "pass@" in name and not name.endswith("pass@1"):
            names[name] = name.replace("flexible_pass", "flexible pass")
    return names


def points(run: RunData, key: str, label: str) -> Series:
    """The evaluations of one accuracy."""
    entries = [entry for entry in run.evaluations if key in entry]
    return {
        "label": label,
        "x": [entry["step"] for entry in entries],
        "y": [rounded(entry[key]) for entry in entries],
        "low": [rounded(entry.get(f"{key}/low")) for entry in entries],
        "high": [rounded(entry.get(f"{key}/high")) for entry in entries],
        "band": "95 % interval",
    }


# Time


def time_charts(runs: Sequence[RunData]) -> list[Chart]:
    """Seconds a step by what took them, stacked; for several runs, their whole steps as curves."""
    spec = Spec("Time of a step", "seconds", "By what took it.", {"step_seconds": "step"}, from_zero=True)
    if len(runs) > 1:
        return line_charts(runs, [spec])
    run = runs[0]
    if not run.known("step_seconds"):
        return []
    series = []
    for index, (label, values) in enumerate(step_times(run).items()):
        size = -(-len(values) // POINTS)
        ys = list(map(rounded, thinned(values, size, mean_of)))
        if any(ys):
            series.append({"label": label, "colour": index, "x": thinned(run.steps, size, last), "y": ys})
            if size > 1:
                series[-1]["span"] = size
    return [chart(spec, series, runs, kind="stack", wide=True)]


def step_times(run: RunData) -> dict[str, list[float]]:
    """Label -> seconds at each step; "other" is what the step took beyond its measured parts."""
    count = len(run.steps)
    parts = {label: [value or 0.0 for value in run.series.get(key, [None] * count)] for key, label in TIMES.items()}
    whole = run.series.get("step_seconds", [None] * count)
    measured = [sum(values) for values in zip(*parts.values(), strict=True)]
    parts[OTHER_TIME] = [max((total or 0.0) - known, 0.0) for total, known in zip(whole, measured, strict=True)]
    return parts


def time_shares(run: RunData) -> list[dict[str, Any]]:
    """Where the run's time went: {"label", "seconds", "share", "colour"} of each part that took any."""
    totals = {label: sum(values) for label, values in step_times(run).items()}
    totals[EVALUATION_TIME] = sum(entry.get("eval_seconds", 0.0) for entry in run.evaluations)
    whole = sum(totals.values())
    return [
        {"label": label, "seconds": seconds, "share": seconds / whole, "colour": SEGMENTS.index(label)}
        for label, seconds in totals.items()
        if whole and seconds / whole >= 0.001
    ]


# The rest


def other_charts(runs: Sequence[RunData], most: int = 48) -> list[Chart]:
    """A small chart of every metric that has none above."""
    shown = {key for spec in (*COMPLETIONS, *EPISODES, *LEARNING, *AGREEMENT, *RESOURCES) for key in spec.keys}
    shown |= {*TIMES, "step_seconds", "reward", "reward_std", "reward_min", "reward_max"}
    names = {name for run in runs for name in run.rewards}
    shown |= {f"rewards/{name}{end}" for name in names for end in ("", "/std", "/min", "/max")}
    keys = [key for key in dict.fromkeys(key for run in runs for key in run.series) if key not in shown]
    specs = [Spec(key, "seconds" if key.endswith("seconds") else "", "", {key: key}) for key in keys[:most]]
    return line_charts(runs, specs)
