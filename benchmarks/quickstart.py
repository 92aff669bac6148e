"""Does the quickstart learn? Runs it for several seeds, compares the ends of each, draws the curves.

    python -m benchmarks.quickstart --seeds 0,1,2 --runs runs/seeds --out benchmarks/results/quickstart

Seeds whose run folder is already complete are not run again. Writes OUT.json and OUT.png; the last line of standard
output is the verdict as one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from grpo.run.versions import hardware, versions

ROOT = Path(__file__).resolve().parent.parent

CONFIG = ROOT / "configs" / "quickstart.toml"
HIGHEST_REWARD = 2.0
ENDS = 5
"""Steps at either end that are compared."""
WANTED_SHARE, WANTED_RISE = 0.5, 0.2
"""Of the distance to the highest reward, and of held-out correctness."""


def run(seed: int, folder: Path) -> None:
    """Train with `seed`, unless `folder` holds the finished run."""
    if not (folder / "summary.json").is_file():
        command = [sys.executable, "-m", "grpo.train", str(CONFIG), "--set", f"train.seed={seed}"]
        subprocess.run([*command, "--output", str(folder)], cwd=ROOT, check=True)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def summary(seed: int, folder: Path) -> dict[str, Any]:
    """What the run in `folder` learned, and how long its steps took."""
    steps, evaluations = lines(folder / "metrics.jsonl"), lines(folder / "eval.jsonl")
    rewards = [step["reward"] for step in steps]
    first, last = statistics.fmean(rewards[:ENDS]), statistics.fmean(rewards[-ENDS:])
    held_out = [
        {key: entry["eval/" + key] for key in ("flexible_accuracy", "strict_accuracy")} | {"step": entry["step"]}
        for entry in evaluations
    ]
    share = (last - first) / (HIGHEST_REWARD - first)
    rise = held_out[-1]["flexible_accuracy"] - held_out[0]["flexible_accuracy"]
    return {
        "seed": seed,
        "first_five": round(first, 4),
        "last_five": round(last, 4),
        "share_of_distance": round(share, 3),
        "held_out_rise": round(rise, 3),
        "holds": share >= WANTED_SHARE and rise >= WANTED_RISE,
        "held_out": held_out,
        "median_step_seconds": round(statistics.median(step["step_seconds"] for step in steps), 2),
        "median_rollout_seconds": round(statistics.median(step["rollout_seconds"] for step in steps), 2),
        "median_train_seconds": round(statistics.median(step["train_seconds"] for step in steps), 2),
        "all_steps_seconds": round(sum(step["step_seconds"] for step in steps), 1),
        "peak_memory_gib": round(max(step["peak_memory_gib"] for step in steps), 2),
        "curves": {
            name: [round(step[name], 4) for step in steps]
            for name in ("reward", "rewards/numeric_answer", "rewards/right_form", "mismatch_kl")
        },
    }


def draw(results: list[dict[str, Any]], file: Path) -> None:
    """Training reward and held-out correctness of every seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (training, held_out) = pyplot.subplots(1, 2, figsize=(10, 3.6))
    for result in results:
        reward, checks = result["curves"]["reward"], result["held_out"]
        label = f"seed {result['seed']}"
        training.plot(range(1, len(reward) + 1), reward, label=label)
        held_out.plot([c["step"] for c in checks], [c["flexible_accuracy"] for c in checks], "o-", label=label)
    training.set(xlabel="step", ylabel="mean reward", title="Training reward (at most 2)", ylim=(0, 2.05))
    held_out.set(xlabel="step", ylabel="accuracy", title="Held-out correctness, greedy", ylim=(0, 1))
    for axes in (training, held_out):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0,1,2", type=lambda text: [int(seed) for seed in text.split(",")])
    parser.add_argument("--runs", type=Path, default=Path("runs/seeds"), help="run folders go here, one a seed")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.png")
    options = parser.parse_args()
    results = []
    for seed in options.seeds:
        run(seed, options.runs / f"seed-{seed}")
        results.append(summary(seed, options.runs / f"seed-{seed}"))
        keys = ("seed", "first_five", "last_five", "share_of_distance", "held_out_rise", "median_step_seconds", "holds")
        print("  ".join(f"{key} {results[-1][key]}" for key in keys), flush=True)
    record = {"benchmark": "quickstart", "runs": results, "versions": versions(), "hardware": hardware()}
    if options.out:
        options.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        draw(results, options.out.with_suffix(".png"))
    print(json.dumps({"benchmark": "quickstart", "holds": [result["holds"] for result in results]}))


if __name__ == "__main__":
    main()
