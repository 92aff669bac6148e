"""Runs killed with SIGKILL at moments drawn at random, and resumed: is each the run that nothing happened to?

A run of eight steps, with a checkpoint after every third and evaluations in between, is made once undisturbed. Then,
over and over, it is started, killed and resumed, a third of them killed a second time while they resume. The moments
are drawn evenly within a phase (every step of vLLM in a rollout, every gradient of a backward pass, every file
operation while a checkpoint, samples, an evaluation, the report or the final adapter is written), or evenly in time.
What must be the same bit for bit: adapter, best adapter, optimiser state, metrics, held-out figures, completions.

    python -m benchmarks.kill_resume --kills 50 --out benchmarks/results/kill_resume.json

The model is tiny and random and the processes are forked from one in which vLLM has started
(tests/helpers/forked_runs.py), so that a kill takes seconds. Exit code 1 if any run is not the same, or lost more than
the steps since its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from grpo.run.checkpoint import latest
from grpo.run.records import METRICS, read_entries
from grpo.run.versions import hardware, versions
from tests.helpers.forked_runs import PHASES, ForkedRuns
from tests.helpers.same_run import differences
from tests.helpers.small_chat import save_small_chat_model
from tests.helpers.tiny_run import run_tables, save_rewards, write_config

STEPS, SAVE_STEPS = 8, 3
AGAIN = 1 / 3
"""Share of the resumed runs that are killed as well."""
ANY_TIME = "any time"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="runs to kill at least once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the result there as JSON")
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="grpo-kills-") as folder:
        result = measure(Path(folder), parsed.kills, random.Random(parsed.seed))
    result |= {"seed": parsed.seed, "versions": versions(), "hardware": hardware()}
    if parsed.out is not None:
        parsed.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return int(bool(result["failures"]))


def measure(home: Path, kills: int, draw: random.Random) -> dict[str, Any]:
    """Kill and resume `kills` runs in `home`; the figures for the result."""
    config = prepare(home)
    with ForkedRuns(config, home, HF_HUB_OFFLINE="1") as runs:
        started = time.monotonic()
        done = runs.run(config, "--output", home / "straight", fault=("count", home / "moments.json"))
        seconds = time.monotonic() - started
        assert done.code == 0, done.err
        moments: dict[str, int] = json.loads((home / "moments.json").read_text())
        killed: Counter[str] = Counter()
        lost: list[int] = []
        failures: list[str] = []
        for number in range(kills):
            phase = [ANY_TIME, *PHASES][number % (len(PHASES) + 1)]
            run = home / f"run-{number}"
            one = Victim(runs, config, run, draw, moments, seconds)
            failures += [f"run {number}: {problem}" for problem in one.live(phase, home / "straight")]
            killed.update(one.killed)
            lost += one.lost
            print(
                f"{number + 1}/{kills}  {', '.join(one.killed) or 'ended before it was hit'}  {failures[-1:]}",
                flush=True,
            )
            shutil.rmtree(run)
    return {
        "runs": kills,
        "kills": sum(killed.values()),
        "kills_by_phase": dict(killed),
        "same_bits": kills - len({failure.split(":")[0] for failure in failures}),
        "steps_per_run": STEPS,
        "save_steps": SAVE_STEPS,
        "steps_lost_most": max(lost, default=0),
        "steps_lost_mean": round(sum(lost) / max(len(lost), 1), 2),
        "failures": failures,
    }


def prepare(home: Path) -> Path:
    """A tiny model, rewards and the configuration, in `home`."""
    save_small_chat_model(home / "model")
    save_rewards(home)
    tables = run_tables(
        home,
        lora={"lora_dropout": 0.1},
        rollout={"max_prompt_length": 400},
        train={"max_steps": STEPS},
        checkpoint={"save_steps": SAVE_STEPS},
        eval={"every": 2, "limit": 3, "max_completion_length": 8},
        log={"samples_every": 2},
    )
    return write_config(home / "config.toml", tables)


class Victim:
    """One run that is killed, perhaps twice, and resumed. `killed`: in which phases; `lost`: steps, each time."""

    def __init__(
        self, runs: ForkedRuns, config: Path, run: Path, draw: random.Random, moments: dict[str, int], seconds: float
    ):
        self.runs, self.config, self.run, self.draw = runs, config, run, draw
        self.moments, self.seconds = moments, seconds
        self.killed: list[str] = []
        self.lost: list[int] = []

    def live(self, phase: str, straight: Path) -> list[str]:
        """Start, kill, resume, compare; returns what went wrong."""
        code = self.hit(phase, self.config, "--output", self.run)
        if code == -signal.SIGKILL and self.draw.random() < AGAIN and (self.run / "config.toml").exists():
            code = self.hit(self.draw.choice([ANY_TIME, *PHASES]), "--resume", self.run)
        if code not in (0, -signal.SIGKILL):
            return [f"ended with code {code}"]
        arguments = (
            ("--resume", self.run) if (self.run / "config.toml").exists() else (self.config, "--output", self.run)
        )
        done = self.runs.run(*arguments)
        if done.code != 0:
            return [f"resumed, it ended with code {done.code}: {done.err[-500:]}"]
        problems = differences(straight, self.run)
        if max(self.lost, default=0) > SAVE_STEPS:
            problems.append(f"{max(self.lost)} steps lost, with a checkpoint after every {SAVE_STEPS}")
        return problems

    def hit(self, phase: str, *arguments: str | Path) -> int:
        """Run with `arguments` and kill it in `phase`; returns how it ended."""
        if phase == ANY_TIME:
            started = self.runs.start(*arguments)
            timer = threading.Timer(self.draw.uniform(0, self.seconds), kill, [started.pid])
            timer.start()
            code = started.wait().code
            timer.cancel()
        else:
            moment = self.draw.randint(1, self.moments[phase])
            code = self.runs.run(*arguments, fault=("kill", phase, moment)).code
        if code == -signal.SIGKILL:
            self.killed.append(phase)
            steps = [entry["step"] for entry in read_entries(self.run / METRICS)]
            saved = latest(self.run, lambda notice: self.lost.append(STEPS)) if self.run.exists() else None
            self.lost.append(max(steps, default=0) - (int(saved.name.removeprefix("step-")) if saved else 0))
        return code


def kill(pid: int) -> None:
    """SIGKILL, unless it has ended: its parent has not waited for it, so the number is still its own."""
    os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
