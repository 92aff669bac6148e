"""Draws the reward curves of run folders, and sums them up: did the reward rise beyond noise, and where did time go.

    python -m benchmarks.plot_run runs/gsm8k-smollm2 --out benchmarks/results/gsm8k_smollm2

writes OUT.png and OUT.json. Several folders of the same experiment (seeds) are drawn together. Steps at which another
process took over are taken from processes.jsonl, where the run folder has one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ENDS = 10
"""Steps at either end that are compared."""
PHASES = ("rollout_seconds", "reward_seconds", "train_seconds", "sync_seconds")
CURVES = ("reward", "reward_std", "completion_length", "clipped_ratio", "entropy", "mismatch_kl", "mismatch_logp_mean")


def json_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def reward_names(steps: Sequence[dict[str, Any]]) -> list[str]:
    """Columns of single reward functions."""
    return [key for key in steps[0] if key.startswith("rewards/") and key.count("/") == 1]


def smoothed(values: Sequence[float], width: int) -> list[float]:
    """Mean of each value and its neighbours, `width` wide, narrower at the ends."""
    half = width // 2
    return [statistics.fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def mean_and_error(values: Sequence[float]) -> dict[str, float]:
    """Mean and its standard error, taking steps as independent."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return {"mean": round(statistics.fmean(values), 5), "standard_error": round(error, 5)}


def compare_ends(values: Sequence[float]) -> dict[str, Any]:
    """First against last steps. `z`: the difference in standard errors of the difference."""
    span = min(ENDS, len(values) // 2)
    first, last = mean_and_error(values[:span]), mean_and_error(values[-span:])
    error = (first["standard_error"] ** 2 + last["standard_error"] ** 2) ** 0.5
    difference = last["mean"] - first["mean"]
    return {"steps_compared": span, "first": first, "last": last, "z": round(difference / error, 2) if error else None}


def resumed_at(folder: Path) -> list[int]:
    """First step of every process but the first."""
    return [entry["first_step"] for entry in json_lines(folder / "processes.jsonl")][1:]


def continuity(steps: Sequence[dict[str, Any]], resumes: Sequence[int], span: int = 5) -> list[dict[str, Any]]:
    """Mean reward of the steps on either side of every resume, and the usual step-to-step difference beside it."""
    rewards = {entry["step"]: entry["reward"] for entry in steps}
    values = list(rewards.values())
    usual = statistics.fmean(abs(b - a) for a, b in zip(values, values[1:], strict=False)) if len(values) > 1 else None
    found = []
    for step in resumes:
        before = [rewards[s] for s in range(step - span, step) if s in rewards]
        after = [rewards[s] for s in range(step, step + span) if s in rewards]
        if before and after:
            means = {"before": round(statistics.fmean(before), 4), "after": round(statistics.fmean(after), 4)}
            found.append({"step": step, **means, "usual_change_per_step": round(usual, 4) if usual else None})
    return found


def time_spent(folder: Path, steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Seconds by phase, and rates over the whole run."""
    seconds = {phase: round(sum(entry.get(phase, 0) for entry in steps), 1) for phase in PHASES}
    whole = sum(entry["step_seconds"] for entry in steps)
    tokens = sum(entry["tokens"] for entry in steps)
    processes = json_lines(folder / "processes.jsonl")
    steady = sorted(entry["step_seconds"] for entry in steps)[len(steps) // 2]
    return {
        **seconds,
        "other_seconds": round(whole - sum(seconds.values()), 1),
        "all_steps_seconds": round(whole, 1),
        "median_step_seconds": round(steady, 3),
        "processes_seconds": round(sum(entry["seconds"] for entry in processes), 1) if processes else None,
        "sampled_tokens": tokens,
        "sampled_tokens_per_rollout_second": round(tokens / seconds["rollout_seconds"], 1),
        "sampled_tokens_per_second": round(tokens / whole, 1),
        "peak_memory_gib": round(max(entry.get("peak_memory_gib", 0) for entry in steps), 2),
    }


def summary(folder: Path) -> dict[str, Any]:
    """Everything about one run that a reader wants in numbers."""
    steps = json_lines(folder / "metrics.jsonl")
    resumes = resumed_at(folder)
    about = json.loads((folder / "summary.json").read_text()) if (folder / "summary.json").exists() else {}
    return {
        "steps": len(steps),
        "processes": json_lines(folder / "processes.jsonl"),
        "resumes": continuity(steps, resumes),
        "ends": {name: compare_ends([entry[name] for entry in steps]) for name in ("reward", *reward_names(steps))},
        "time": time_spent(folder, steps),
        "evaluations": json_lines(folder / "eval.jsonl"),
        "curves": {
            name: [None if entry[name] is None else round(entry[name], 5) for entry in steps]
            for name in (*CURVES, *reward_names(steps))
            if all(name in entry for entry in steps)
        },
        **{key: about[key] for key in ("versions", "hardware") if key in about},
    }


def draw(folders: Sequence[Path], file: Path, title: str, width: int) -> None:
    """One panel for the reward, one for its functions, one for lengths and time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, middle, bottom) = pyplot.subplots(3, 1, figsize=(8, 10), sharex=True, height_ratios=(3, 3, 2))
    for number, folder in enumerate(folders):
        steps = json_lines(folder / "metrics.jsonl")
        at = [entry["step"] for entry in steps]
        rewards = [entry["reward"] for entry in steps]
        colour = f"C{number}"
        label = folder.name if len(folders) > 1 else f"mean of {width} steps"
        top.plot(at, rewards, color=colour, alpha=0.3, linewidth=1)
        top.plot(at, smoothed(rewards, width), color=colour, linewidth=2, label=label)
        for place, step in enumerate(resumed_at(folder)):
            top.axvline(step - 0.5, color=colour, linestyle=":", label=None if place or number else "resumed")
        for index, name in enumerate(reward_names(steps)):
            own = smoothed([entry[name] for entry in steps], width)
            shown = name.removeprefix("rewards/") if number == 0 else None
            middle.plot(at, own, color=f"C{index}", linestyle=("-", "--", ":", "-.")[number % 4], label=shown)
        bottom.plot(at, smoothed([entry["completion_length"] for entry in steps], width), color=colour)
    top.set(ylabel="reward (sum)", title=title)
    middle.set(ylabel="reward by function")
    bottom.set(ylabel="completion length, tokens", xlabel="step")
    top.legend()
    middle.legend()
    for axis in (top, middle, bottom):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--out", type=Path, required=True, help="path without ending: OUT.png and OUT.json are written")
    parser.add_argument("--title", default="", help="above the picture; default: the folders' names")
    parser.add_argument("--smooth", type=int, default=5, help="steps that a drawn point averages over")
    options = parser.parse_args()
    for run in options.runs:
        if not json_lines(run / "metrics.jsonl"):
            parser.error(f"{run}: no steps in metrics.jsonl")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    title = options.title or ", ".join(run.name for run in options.runs)
    draw(options.runs, options.out.with_suffix(".png"), title, options.smooth)
    found = {run.name: summary(run) for run in options.runs}
    options.out.with_suffix(".json").write_text(json.dumps({"benchmark": "training_run", "runs": found}) + "\n")
    for name, run in found.items():
        for reward, ends in run["ends"].items():
            print(f"{name}  {reward:24} {ends['first']['mean']:8.4f} -> {ends['last']['mean']:8.4f}  z {ends['z']}")
        print(f"{name}  " + ", ".join(f"{key} {value}" for key, value in run["time"].items()))
    print(json.dumps({name: {"reward": run["ends"]["reward"], "time": run["time"]} for name, run in found.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
