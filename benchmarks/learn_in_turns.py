"""Whether the two tasks of several turns are learned: held-out success before and after, for several seeds.

Runs configs/calculator.toml and configs/nim.toml as they are, one seed after another, and draws what they logged. A run
that has ended is not repeated, so that the script can be stopped and called again.

    python -m benchmarks.learn_in_turns --work /tmp/turns --out benchmarks/results/learn_in_turns   # half an hour
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from grpo.api.result import TrainResult
from grpo.monitor.curves import draw
from grpo.run.versions import hardware, versions
from grpo.tasks import nim
from grpo.tasks.common import load_task

ROOT = Path(__file__).resolve().parent.parent
TASKS = ("calculator", "nim")
RISE = 0.2
"""What held-out success shall rise by."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="where the runs are")
    parser.add_argument("--out", type=Path, help="the result, without its ending")
    parser.add_argument("--tasks", type=lambda text: text.split(","), default=list(TASKS), help="comma-separated")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="changes to the configurations")
    options = parser.parse_args()
    for task in options.tasks:
        for seed in range(options.seeds):
            finish(options, task, seed)
    tasks = {
        task: [run(options.work / f"{task}-{seed}", seed) for seed in range(options.seeds)] for task in options.tasks
    }
    for task, runs in tasks.items():
        for one in runs:
            ends = f"{one['before']:.2f} -> {one['after']:.2f}"
            print(f"{task:>12}  seed {one['seed']}  held out {ends}  {one['minutes']} min")
    learned = {task: sum(one["after"] - one["before"] >= RISE for one in runs) for task, runs in tasks.items()}
    result = {
        "benchmark": "learn_in_turns",
        "hardware": hardware(),
        "versions": versions(),
        "seeds_that_rose_by_0.2": learned,
        "tasks": tasks,
        "nim_players": {name: nim_success(move) for name, move in NIM_PLAYERS.items()},
    }
    if options.out:
        options.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        draw(panels(tasks)).save(options.out.with_suffix(".png"))
    print(json.dumps({key: value for key, value in result.items() if key != "tasks"}))
    return 0


def finish(options: argparse.Namespace, task: str, seed: int) -> None:
    """Run one seed to its end, if it has not ended. Raises CalledProcessError where it fails."""
    folder = options.work / f"{task}-{seed}"
    if (folder / "summary.json").exists():
        return
    changes = [f"train.seed={seed}", f"checkpoint.output_dir={folder}", *options.set]
    arguments = [str(ROOT / "configs" / f"{task}.toml"), *(word for change in changes for word in ("--set", change))]
    options.work.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".log").open("a") as log:
        command = [sys.executable, "-m", "grpo.train", *arguments]
        subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=True)


def run(folder: Path, seed: int) -> dict[str, Any]:
    """A run's ends and curves."""
    found = TrainResult.read(folder)
    held_out = [entry["eval/strict_accuracy"] for entry in found.evaluations]
    return {
        "seed": seed,
        "steps": len(found.metrics),
        "minutes": round(sum(entry["step_seconds"] for entry in found.metrics) / 60, 1),
        "before": held_out[0],
        "after": held_out[-1],
        "held_out": [{key: entry[key] for key in entry if key in HELD_OUT} for entry in found.evaluations],
        "curves": {key: [round(value, 4) for value in found.history(key) if value is not None] for key in CURVES},
    }


DRAW = random.Random(1)
NIM_PLAYERS: dict[str, Callable[[int], int]] = {
    "any legal move": lambda heap: DRAW.randint(1, min(3, heap)),
    "always 2": lambda heap: min(2, heap),
    "best": lambda heap: heap % 4 or 1,
}
"""How players without a model choose from a heap."""


def nim_success(move: Callable[[int], int], games: int = 60) -> float:
    """Share of the held-out games that a player wins."""

    async def sample(messages: list[dict[str, str]]) -> Any:
        heap = re.search(r"(\d+) coins? (?:is|are) left", messages[-1]["content"])
        assert heap is not None
        text = str(move(int(heap[1])))
        return SimpleNamespace(text=text, message={"role": "assistant", "content": text}, last=False)

    rows = load_task("nim").eval[:games]
    return round(sum(asyncio.run(nim.play(row, sample))["success"] for row in rows) / games, 3)


HELD_OUT = ("step", "eval/strict_accuracy", "eval/strict_accuracy/low", "eval/strict_accuracy/high")
CURVES = {"environment/success": "success", "reward": "reward"}


def panels(tasks: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """A panel for each task and curve, with a line for each seed."""
    found: dict[str, Any] = {}
    for task, runs in tasks.items():
        for key, title in CURVES.items():
            curves = {f"seed {one['seed']}": one["curves"][key] for one in runs}
            found[f"{task}: {title}"] = {name: (list(range(1, len(y) + 1)), y) for name, y in curves.items()}
    return found


if __name__ == "__main__":
    sys.exit(main())
