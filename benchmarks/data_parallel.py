"""Whole GRPO steps on one GPU and on several of one host: tokens per second, what is sent, and who waits for whom.

Runs `torchrun --nproc-per-node N -m grpo.train` on a checkpoint of Llama-3.2-3B's shape with random weights (NF4, LoRA
r=16 on all seven projections, prompts of 128 tokens, 8 completions of 512 each, a reward that costs nothing), once for
every case RANKSxPROMPTS. A case's first step warms up; of the others medians are kept. The ratio of two cases is that
of their sampled tokens per second of whole steps.

    python -m benchmarks.data_parallel --cases 1x32,2x64,2x32 --out benchmarks/results/data_parallel.json
    python -m benchmarks.data_parallel --tiny

Prints a table; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.common.processes import wait_or_end, write_result
from benchmarks.whole_step import GENERATIONS, RANK, make_work
from grpo.config.toml import write_toml
from grpo.run.records import read_entries

ROOT = Path(__file__).resolve().parent.parent

FIGURES = (
    "tokens", "step_seconds", "rollout_seconds", "idle_seconds", "reward_seconds", "train_seconds", "sync_seconds",
    "sent_bytes", "peak_memory_gib",
)  # fmt: skip
BARS = {"2x64 over 1x32": 1.85, "2x32 over 1x32": 1.6}


def config_file(options: argparse.Namespace, folder: Path, prompts: int) -> Path:
    """The configuration of a run with so many prompts a step."""
    tables: dict[str, Any] = {
        "model": {"name": str(folder)},
        "lora": {"r": RANK, "lora_alpha": 2 * RANK},
        "task": {
            "name": "table",
            "options": {"path": str(folder / "prompts.jsonl"), "chat": False, "eval_split": ""},
        },
        "rewards": [{"function": f"{ROOT}/benchmarks/common/grpo_peers.py:spread"}],
        "rollout": {
            "prompts_per_step": prompts,
            "num_generations": GENERATIONS,
            "max_prompt_length": options.prompt,
            "max_completion_length": options.completion,
        },
        "train": {
            "learning_rate": 1e-5,
            "max_steps": options.steps,
            "tokens_per_micro_batch": options.tokens,
        },
        "log": {"samples_every": 1000, "report": False},
        "checkpoint": {"save_steps": 1000},
    }
    file = options.scratch / f"data-parallel-{prompts}.toml"
    file.write_text(write_toml(tables))
    return file


def run_case(options: argparse.Namespace, folder: Path, ranks: int, prompts: int, seconds: float) -> dict[str, Any]:
    """One run; its medians, and what went wrong if it did."""
    run = options.scratch / f"data-parallel-{ranks}x{prompts}"
    shutil.rmtree(run, ignore_errors=True)
    # A name of this host may lead nowhere on a machine without a network.
    place = ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), *place]
    command += ["-m", "grpo.train", str(config_file(options, folder, prompts)), "--output", str(run)]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "4")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    log = run.with_suffix(".log")
    begun = time.monotonic()
    with log.open("w") as file:
        said = wait_or_end(
            subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment), seconds
        )
    metrics = run / "metrics.jsonl"
    steps = list(read_entries(metrics)) if metrics.exists() else []
    found: dict[str, Any] = {"ranks": ranks, "prompts": prompts, "wall_seconds": round(time.monotonic() - begun, 1)}
    found["steps"] = [{name: step.get(name) for name in FIGURES} for step in steps]
    if said:
        found |= {"failed": said, "log": log.read_text(errors="replace")[-2500:]}
    counted = found["steps"][1:]
    if counted:
        known = [name for name in FIGURES if all(step[name] is not None for step in counted)]
        found["median"] = {name: statistics.median(step[name] for step in counted) for name in known}
        found["tokens_per_second"] = statistics.median(step["tokens"] / step["step_seconds"] for step in counted)
    return found


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def ratios(cases: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Tokens per second of every case over those of the first."""
    (first, base), *others = cases.items()
    if "tokens_per_second" not in base:
        return {}
    return {
        f"{name} over {first}": round(case["tokens_per_second"] / base["tokens_per_second"], 3)
        for name, case in others
        if "tokens_per_second" in case
    }


def show(name: str, case: dict[str, Any]) -> None:
    if "failed" in case:
        print(f"{name}: {case['failed']}\n{case['log']}", flush=True)
    if "median" not in case:
        return
    parts = [
        f"{key.removesuffix('_seconds')} {case['median'][key]:.2f}" for key in FIGURES[1:7] if key in case["median"]
    ]
    sent = case["median"].get("sent_bytes", 0) / 1e6
    print(f"{name:8} {case['tokens_per_second']:9,.0f} tokens/s  {'  '.join(parts)} s  sent {sent:.1f} MB", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", default="1x32,2x64,2x32", help="RANKSxPROMPTS, the first is what others are held to")
    parser.add_argument("--shape", default="3b")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--completion", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=32768, help="train.tokens_per_micro_batch")
    parser.add_argument("--budget", type=float, default=400, help="seconds for everything")
    parser.add_argument("--scratch", type=Path, default=Path("/tmp"))
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU: tries the script")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.tiny:
        options.shape, options.prompt, options.completion, options.steps = "tiny", 16, 8, 3
        options.cases = "1x2,2x4,2x2"
    ends = time.monotonic() + options.budget
    folder = make_work(options)
    result: dict[str, Any] = {"benchmark": "data_parallel", "bars": BARS, "cases": {}}
    result |= {key: getattr(options, key) for key in ("shape", "steps", "prompt", "completion", "tokens")}
    for name in options.cases.split(","):
        ranks, prompts = map(int, name.split("x"))
        case = run_case(options, folder, ranks, prompts, ends - time.monotonic())
        result["cases"][name] = case
        result["ratios"] = ratios(result["cases"])
        show(name, case)
        write_result(options.out, result)
    print(json.dumps({"ratios": result["ratios"], **result}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
