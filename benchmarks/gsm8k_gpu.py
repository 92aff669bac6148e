"""A real run on a GPU: SmolLM2-135M on GSM8K with the five rewards, in several processes that are stopped and resumed.

Starts `python -m grpo.train` on configs/gsm8k-smollm2.toml, stops it at the given steps (as Ctrl-C does, or with
--kill as a power cut does), continues with --resume, and notes in RUN/processes.jsonl what each process did. Call it
again to go on after the time budget ended; `plot_run.py` draws the result.

    python -m benchmarks.gsm8k_gpu --data GSM8K_FOLDER --model MODEL.gguf --run /tmp/gsm8k --stop-at 40,80 --budget 560
    python -m benchmarks.plot_run /tmp/gsm8k --out benchmarks/results/gsm8k_smollm2
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SHUTDOWN = 20.0
"""Seconds that a stopped process may take to end."""


def steps_done(run: Path) -> list[int]:
    """Steps in metrics.jsonl; a last line that is being written does not count."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("\n")]


def checkpoints(run: Path) -> list[int]:
    return sorted(int(folder.name.removeprefix("step-")) for folder in (run / "checkpoints").glob("step-*"))


def overrides(options: argparse.Namespace) -> list[str]:
    """The `--set` options: where model and data are, and whatever else was asked for."""
    pairs = [f'task.options.path="{options.data.resolve()}"', *options.set]
    if options.model:
        pairs.append(f'model.name="{options.model}"')
    return [word for pair in pairs for word in ("--set", pair)]


def one_process(options: argparse.Namespace, stop: int | None, ends: float) -> dict:
    """Train until a checkpoint of step `stop`, the end of the run, or of the time; returns what happened."""
    run = options.run
    saved = checkpoints(run)
    command = [sys.executable, "-m", "grpo.train", str(options.config), "--output", str(run), *overrides(options)]
    if steps_done(run):
        command = [*command[:4], "--resume", str(run), *overrides(options)]
    first = (saved[-1] if saved else 0) + 1
    started = time.time()
    with open(run.with_suffix(".log"), "a") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    first_step_s: float | None = None
    reason = "finished"
    try:
        while process.poll() is None:
            time.sleep(0.2)
            done = steps_done(run)
            if first_step_s is None and done and done[-1] >= first and time.time() - started > 5:
                first_step_s = round(time.time() - started, 1)
            if stop is not None and stop in checkpoints(run):
                reason = end(process, options.kill)
            elif time.monotonic() > ends:
                reason = "out of time, " + end(process, False)
    finally:
        if process.poll() is None:
            process.kill()
    if process.returncode not in (0, 130, -signal.SIGKILL):
        reason = f"exit code {process.returncode}; see {run.with_suffix('.log')}"
    return {
        "first_step": first,
        "last_step": max(steps_done(run), default=0),
        "seconds": round(time.time() - started, 1),
        "seconds_to_first_step": first_step_s,
        "ended": reason,
    }


def end(process: subprocess.Popen, kill: bool) -> str:
    """Stop `process`; returns how."""
    if not kill:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(SHUTDOWN)
            return "interrupted"
        except subprocess.TimeoutExpired:
            pass
    process.kill()
    process.wait()
    return "killed"


def last_step(run: Path) -> int | None:
    """The last step of a finished run."""
    summary = run / "summary.json"
    return json.loads(summary.read_text())["steps"] if summary.exists() else None


def train(options: argparse.Namespace) -> list[dict]:
    """Every process that the budget has room for."""
    ends = time.monotonic() + options.budget
    stops: Sequence[int | None] = [stop for stop in options.stop_at if stop > max(checkpoints(options.run), default=0)]
    records = []
    for stop in (*stops, None):
        if last_step(options.run) is not None or ends - time.monotonic() < 45:
            break
        record = one_process(options, stop, ends - SHUTDOWN)
        print(record, flush=True)
        records.append(record)
        if options.run.exists():
            with open(options.run / "processes.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")
        if record["ended"].startswith("exit code"):
            break
    return records


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "gsm8k-smollm2.toml")
    parser.add_argument("--data", type=Path, required=True, help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--model", help="instead of the configuration's")
    parser.add_argument("--run", type=Path, required=True, help="the run folder; RUN.log beside it has the output")
    parser.add_argument(
        "--stop-at", default="40,80", type=lambda text: [int(step) for step in text.split(",") if step],
        help="steps, each with a checkpoint, at which a process is ended and another resumes",
    )  # fmt: skip
    parser.add_argument("--kill", action="store_true", help="end processes without warning")
    parser.add_argument("--budget", type=float, default=560, help="seconds")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="passed to grpo.train")
    options = parser.parse_args()
    options.run.parent.mkdir(parents=True, exist_ok=True)
    records = train(options)
    log = options.run.with_suffix(".log")
    if log.exists():
        print("\n".join(log.read_text().splitlines()[-4:]))
    done = max(steps_done(options.run), default=0)
    print(json.dumps({"benchmark": "gsm8k_gpu", "run": str(options.run), "steps": done, "processes": records}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
