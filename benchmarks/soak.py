"""A long run watched from outside: do memory, open files and the time of a step stay flat?

Starts `python -m grpo.train` on a configuration in a process of its own and reads, once a second, what the system says
of it and of the processes that it started: resident memory, open files, threads, children. From metrics.jsonl come the
seconds of each step and, on a GPU, the peak of its memory. Over the steps after the warm-up a line is fitted to each
by least squares; reported are its slope per hundred steps and how much that is of the mean. Completions grow or shrink
as a model learns, so step time is fitted per sampled token as well.

    python -m benchmarks.soak --steps 500 --out benchmarks/results/soak_cpu.json
    python -m benchmarks.soak --steps 20 --warmup 5           # minutes
    python -m benchmarks.soak --config configs/gsm8k-smollm2.toml --minutes 10 --steps 100000

Exit code 1 if memory or open files grew by more than the limits in `LIMITS`.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common.processes import write_result
from grpo.run.records import METRICS, read_entries

ROOT = Path(__file__).resolve().parent.parent

LIMITS = {"resident_mib": 20.0, "open_files": 1.0, "threads": 1.0, "children": 0.5}
"""How much each may grow in a hundred steps before the soak has failed. A peak, as of a GPU's memory, only ever grows,
and does so with the longest completion: it is reported alone."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "quickstart.toml")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--minutes", type=float, help="end the run by SIGTERM after so long")
    parser.add_argument("--warmup", type=int, default=20, help="steps that are not fitted")
    parser.add_argument("--out", type=Path, help="write the result there as JSON")
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="grpo-soak-") as folder:
        run = Path(folder) / "run"
        overrides = [f"train.max_steps={parsed.steps}", *parsed.set]
        code, seen = watch(parsed.config, overrides, run, parsed.minutes)
        steps = list(read_entries(run / METRICS))
    result = summary(seen, steps, parsed.warmup)
    result |= {"config": parsed.config.name, "set": overrides, "exit_code": code}
    show(result)
    write_result(parsed.out, result)
    print(json.dumps(result))
    return int(bool(result["grew"]) or code not in (0, 128 + signal.SIGTERM))


def watch(
    config: Path, overrides: Sequence[str], run: Path, minutes: float | None
) -> tuple[int, list[dict[str, float]]]:
    """Train; returns the exit code and what was seen of the process, with the last step by then."""
    sets = [argument for override in overrides for argument in ("--set", override)]
    command = [sys.executable, "-m", "grpo.train", str(config), *sets, "--output", str(run)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    seen: list[dict[str, float]] = []
    ends = time.monotonic() + minutes * 60 if minutes else float("inf")
    while process.poll() is None:
        if time.monotonic() >= ends:
            process.terminate()
            ends = float("inf")
        if (entry := observed(process.pid, run)) is not None:
            seen.append(entry)
        time.sleep(1)
    return process.returncode, seen


def observed(pid: int, run: Path) -> dict[str, float] | None:
    """What the system says of the process `pid`; None before its first step and once it is gone."""
    step = last_step(run / METRICS)
    if step is None:
        return None
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            own = {"open_files": float(process.num_fds()), "threads": float(process.num_threads())}
            children = process.children(recursive=True)
            resident = process.memory_info().rss + sum(child.memory_info().rss for child in children)
    except psutil.Error:
        return None
    return {"step": float(step), "resident_mib": resident / 2**20, "children": float(len(children)), **own}


def last_step(file: Path) -> int | None:
    """The step of the last whole line of metrics."""
    if not file.exists():
        return None
    with file.open("rb") as lines:
        lines.seek(max(file.stat().st_size - 65536, 0))
        for line in reversed(lines.read().splitlines()):
            try:
                return int(json.loads(line)["step"])
            except (ValueError, LookupError, TypeError):
                continue
    return None


def summary(seen: Sequence[dict[str, float]], steps: Sequence[dict[str, Any]], warmup: int) -> dict[str, Any]:
    """Mean and slope of everything that was watched, over the steps after `warmup`."""
    end = max((int(entry["step"]) for entry in steps), default=0)
    seen = [entry for entry in seen if warmup < entry["step"] < end]  # after the last step everything is let go
    steps = [entry for entry in steps if entry["step"] > warmup]
    watched = {
        name: line([(entry["step"], entry[name]) for entry in seen])
        for name in ("resident_mib", "open_files", "threads", "children")
    }
    for name in ("step_seconds", "train_seconds", "peak_memory_gib"):
        watched[name] = line([(entry["step"], entry[name]) for entry in steps if entry.get(name) is not None])
    watched["seconds_per_token"] = line([(entry["step"], entry["step_seconds"] / entry["tokens"]) for entry in steps])
    found = {name: values for name, values in watched.items() if values is not None}
    grew = [name for name, limit in LIMITS.items() if name in found and found[name]["slope_per_100_steps"] > limit]
    return {"steps": end, "warmup": warmup, "observations": len(seen), "watched": found, "grew": grew}


def line(points: Sequence[tuple[float, float]]) -> dict[str, float] | None:
    """A least-squares line through (step, value); None through fewer than three points or a single step."""
    if len({x for x, _ in points}) < 3:
        return None
    fit = statistics.linear_regression([x for x, _ in points], [y for _, y in points])
    mean = statistics.fmean(y for _, y in points)
    slope = fit.slope * 100
    return {
        "mean": mean,
        "slope_per_100_steps": slope,
        "share_per_100_steps": slope / mean if mean else 0.0,
        "first": points[0][1],
        "last": points[-1][1],
    }


def show(result: dict[str, Any]) -> None:
    print(f"{'':22}{'mean':>12}{'per 100 steps':>16}{'of the mean':>14}")
    for name, values in result["watched"].items():
        share = f"{values['share_per_100_steps']:+.2%}"
        print(f"{name:22}{values['mean']:>12.4g}{values['slope_per_100_steps']:>+16.4g}{share:>14}")


if __name__ == "__main__":
    sys.exit(main())
