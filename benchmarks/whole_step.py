"""Whole GRPO steps by phase, ours against TRL's, on one fixed work: 16 prompts x 8 completions of 512 tokens.

A checkpoint of Llama-3.2-3B's shape with random weights and a vocabulary of made-up words; prompts of 128 tokens, LoRA
of rank 16 on all seven projections, temperature 1, no reference policy, a reward that costs nothing. Ours is the run
of a configuration, the checkpoint in NF4. TRL's is GRPOTrainer with colocated vLLM, unquantised (it cannot serve
a 4-bit base without losing adapters to rounding), completions made to go on past the end token; the first half of its
steps with its correction of the mismatch, which is its default and costs a forward pass, the second half without. Ours
corrects by its default, from the training pass itself.

    python -m benchmarks.whole_step --out benchmarks/results/whole_step.json
    python -m benchmarks.whole_step --systems trl --trl-micro-batches 8,32
    python -m benchmarks.whole_step --full-finetuning --shape 3b
    python -m benchmarks.whole_step --full-finetuning --systems ours --set train.optim=paged_adamw_8bit

A system has a process of its own, one after another on the same GPU; its first step compiles and does not count. What
is measured is written step by step. Prints a table; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.grpo_peers import PHASES, spread, step_clock
from benchmarks.common.processes import wait_or_end, write_result

ROOT = Path(__file__).resolve().parent.parent
PROMPTS, GENERATIONS, PROMPT, COMPLETION = 16, 8, 128, 512
RANK = 16
BARS = {"step_seconds": 6.0, "train_seconds": 2.5, "rollout_seconds": 3.5}
MEASURED = {"trl bf16": 11.2, "unsloth nf4": 12.1}
"""Seconds of a whole step that other runs of this work took on an H100. Not measured here."""


# The work


def make_work(options: argparse.Namespace) -> Path:
    """The checkpoint with its tokenizer, and prompts.jsonl in it."""

    from benchmarks.common.random_model import checkpoint_folder, shape_config

    folder = checkpoint_folder(options.shape, options.scratch)
    size = shape_config(options.shape).vocab_size
    write_tokenizer(folder, size)
    draw = random.Random(0)
    words = [[f"w{draw.randrange(10, size - 100)}" for _ in range(options.prompt)] for _ in range(128)]
    lines = [json.dumps({"question": " ".join(line), "answer": "0"}) for line in words]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def write_tokenizer(folder: Path, size: int) -> None:
    """A word for every id of the model: "w0", "w1", ..., split at spaces; the end token is the model's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, PreTrainedTokenizerFast

    end = AutoConfig.from_pretrained(folder).eos_token_id
    words = {f"w{number}": number for number in range(size) if number != end} | {"</s>": end}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>", unk_token="w0")
    fast.save_pretrained(folder)


# Ours


def ours_command(options: argparse.Namespace, folder: Path, run: Path) -> list[str]:
    values: dict[str, Any] = {
        "model.name": str(folder), **trained_by_ours(options),
        "task.name": "table", "task.options": {"path": str(folder / "prompts.jsonl"), "chat": False, "eval_split": ""},
        "rewards": [{"function": f"{ROOT}/benchmarks/common/grpo_peers.py:spread"}],
        "rollout.prompts_per_step": PROMPTS, "rollout.num_generations": GENERATIONS,
        "rollout.max_prompt_length": options.prompt, "rollout.max_completion_length": options.completion,
        "train.learning_rate": 1e-5, "train.max_steps": options.steps,
        "train.tokens_per_micro_batch": options.tokens, "log.samples_every": 1000, "checkpoint.save_steps": 1000,
    }  # fmt: skip
    sections: dict[str, dict[str, Any]] = {}
    for name, value in {**values, **dict(options.set)}.items():
        section, _, key = name.rpartition(".")
        sections.setdefault(section, {})[key] = value
    config = options.scratch / "whole_step.json"
    config.write_text(json.dumps(sections))
    return [sys.executable, "-m", "benchmarks.whole_step", "--train", str(config), "--run", str(run)]


def trained_by_ours(options: argparse.Namespace) -> dict[str, Any]:
    """An adapter over NF4, or all weights with float32 values, which is what TRL's default dtype keeps."""
    if not options.full_finetuning:
        return {"model.load_in_4bit": True, "lora.r": RANK, "lora.lora_alpha": 2 * RANK}
    return {"model.full_finetuning": True, "train.weight_update": "float32", "rollout.release_kv_cache": True}


def train_ours(config: Path, run: Path) -> None:
    """What `python -m grpo.train` does, from a configuration as JSON."""
    from grpo.config.schema import parse_config
    from grpo.training.run import launch

    sections = json.loads(config.read_text())
    values = sections.pop("") | sections
    values["checkpoint"]["output_dir"] = str(run)
    launch(parse_config(values))


def ours_steps(run: Path) -> list[dict[str, Any]]:
    from grpo.run.records import read_entries

    names = (*PHASES[:-1], "reward_seconds", "tokens", "peak_memory_gib", "mismatch_kl")
    return [{name: entry.get(name) for name in names} for entry in read_entries(run / "metrics.jsonl")]


# TRL


def train_trl(options: argparse.Namespace) -> None:
    """Steps with TRL in this process; one line of JSON a step."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    from grpo.config.schema import SEVEN_PROJECTIONS

    gpu, folder = torch.cuda.is_available(), options.train_trl
    rows = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    micro_batch = options.trl_micro_batches[0]
    vllm = {
        "use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": 2 * (options.prompt + options.completion),
        "generation_kwargs": {"ignore_eos": True},
    }  # fmt: skip
    trainer = GRPOTrainer(
        str(folder),
        reward_funcs=spread,
        args=GRPOConfig(
            output_dir=str(options.scratch / "whole-step-trl"), per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=PROMPTS * GENERATIONS // micro_batch,
            num_generations=GENERATIONS, max_completion_length=options.completion, temperature=1.0, beta=0.0,
            model_init_kwargs={"dtype": "float32" if options.full_finetuning else "bfloat16"}, bf16=gpu,
            use_cpu=not gpu, learning_rate=1e-5,
            lr_scheduler_type="constant", max_steps=options.steps, logging_steps=1, disable_tqdm=True,
            save_strategy="no", report_to="none", seed=0, **(vllm if gpu else {}),
        ),  # fmt: skip
        train_dataset=Dataset.from_list([{"prompt": row["question"]} for row in rows]),
        peft_config=None if options.full_finetuning else LoraConfig(
            r=RANK, lora_alpha=2 * RANK, target_modules=SEVEN_PROJECTIONS, task_type="CAUSAL_LM"
        ),
    )  # fmt: skip
    trainer.add_callback(step_clock(trainer, lambda step: step <= options.steps // 2 + 1))
    trainer.train()


# Both


def run_ours(options: argparse.Namespace, folder: Path, left: float) -> dict[str, Any]:
    run = options.scratch / "whole-step-run"
    shutil.rmtree(run, ignore_errors=True)
    found = run_logged(ours_command(options, folder, run), options, "ours", left)
    return {**found, **medians(ours_steps(run))}


def run_trl(options: argparse.Namespace, folder: Path, micro_batch: int, left: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.whole_step", *sys.argv[1:], "--train-trl", str(folder)]
    command += ["--trl-micro-batches", str(micro_batch)]
    found = run_logged(command, options, f"trl-{micro_batch}", left)
    lines = log_file(options, f"trl-{micro_batch}").read_text(errors="replace").splitlines()
    steps = [json.loads(line.removeprefix("STEP ")) for line in lines if line.startswith("STEP ")]
    plain = medians([step for step in steps if not step["corrected"]], skip=0 if len(steps) > 1 else 1)
    # The step at which the correction went off may warm up nothing, but the first of all did.
    return {
        **found, "micro_batch": micro_batch, "steps": steps,
        "corrected": medians([step for step in steps if step["corrected"]])["median"], "median": plain["median"],
    }  # fmt: skip


def run_logged(command: list[str], options: argparse.Namespace, name: str, left: float) -> dict[str, Any]:
    begun = time.monotonic()
    with open(log_file(options, name), "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
    said = wait_or_end(process, left)
    found: dict[str, Any] = {"wall_seconds": round(time.monotonic() - begun, 1)}
    if said:
        found |= {"failed": said, "log": log_file(options, name).read_text(errors="replace")[-1500:]}
    return found


def log_file(options: argparse.Namespace, name: str) -> Path:
    return options.scratch / f"whole-step-{name}.log"


def medians(steps: Sequence[dict[str, Any]], skip: int = 1) -> dict[str, Any]:
    """The steps, and each figure's median over those after `skip`; without any, no median."""
    counted = steps[skip:]
    names = [name for name in PHASES if counted and all(step.get(name) is not None for step in counted)]
    median = {name: round(statistics.median(step[name] for step in counted), 3) for name in names}
    return {"steps": list(steps), "counted": len(counted), "median": median}


def show(name: str, found: dict[str, Any]) -> None:
    for label in ("median", "corrected"):
        if found.get(label):
            text = "  ".join(f"{phase.removesuffix('_seconds')} {value:.2f}" for phase, value in found[label].items())
            print(f"{name:14} {'' if label == 'median' else '(with its correction) '}{text} s", flush=True)
    if "failed" in found:
        print(f"{name:14} {found['failed']}: {found['log'][-500:]}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--systems", default="ours,trl", type=lambda text: text.split(","))
    parser.add_argument("--shape", default="3b")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--prompt", type=int, default=PROMPT)
    parser.add_argument("--completion", type=int, default=COMPLETION)
    parser.add_argument("--tokens", type=int, default=32768, help="ours: train.tokens_per_micro_batch")
    parser.add_argument(
        "--trl-micro-batches", default="8", type=lambda text: [int(n) for n in text.split(",")],
        help="per_device_train_batch_size, one run each; 8 is TRL's default",
    )  # fmt: skip
    parser.add_argument("--full-finetuning", action="store_true", help="all weights with float32 values, no adapter")
    parser.add_argument(
        "--set", action="append", default=[], type=lambda text: tuple(text.split("=", 1)), metavar="KEY=VALUE",
        help="ours: a text of the configuration, such as train.gradient_checkpointing=layer",
    )  # fmt: skip
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scratch", type=Path, default=Path("/tmp"))
    parser.add_argument("--budget", type=float, default=560, help="seconds for everything")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU: tries the script")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--train", type=Path, help="train ours in this process")
    parser.add_argument("--run", type=Path, help="with --train: the run folder")
    parser.add_argument("--train-trl", type=Path, help="train TRL's in this process")
    options = parser.parse_args()
    if options.tiny:
        options.shape, options.device, options.prompt, options.completion, options.steps = "tiny", "cpu", 16, 8, 2
    if options.train:
        train_ours(options.train, options.run)
        return 0
    if options.train_trl:
        train_trl(options)
        return 0
    ends = time.monotonic() + options.budget
    folder = make_work(options)
    keys = ("shape", "steps", "prompt", "completion", "tokens", "full_finetuning", "set")
    result: dict[str, Any] = {"benchmark": "whole_step", **{key: getattr(options, key) for key in keys}}
    result |= {"bars": BARS, "measured_elsewhere": MEASURED, "systems": {}}
    for system in options.systems:
        for micro_batch in options.trl_micro_batches if system == "trl" else [0]:
            kind = "all weights" if options.full_finetuning else "bf16" if micro_batch else "nf4"
            name = f"trl {kind}, {micro_batch}" if micro_batch else f"ours {kind}"
            left = ends - time.monotonic()
            found = run_trl(options, folder, micro_batch, left) if micro_batch else run_ours(options, folder, left)
            result["systems"][name] = found
            show(name, found)
            write_result(options.out, result)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
