"""One whole GRPO step on a CPU: this project against TRL's GRPOTrainer with transformers generation.

SmolLM2-135M in bfloat16, 4 prompts x 8 completions of exactly 24 tokens, LoRA of rank 16 on all seven projections,
the same reward, no KL term, loss "dapo". TRL runs with its defaults but for gradient checkpointing, which is off (it
is faster so), and is timed with its default micro-batch of 8 and with all 32 sequences at once. Each system runs in a
process of its own, one after the other; the steps before the timed ones are warm-up. Seconds are of whole steps.

    python -m benchmarks.step_cpu                            # about three minutes
    python -m benchmarks.step_cpu --steps 1 --warmup 1
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

from benchmarks.common.cpu_workload import MODEL, Worker, chat_prompts, export_model, peak_rss_gib, serve

PROMPTS, GENERATIONS, TOKENS, RANK = 4, 8, 24, 16
SYSTEMS = {"grpo": "this project", "trl8": "TRL, micro-batches of 8", "trl32": "TRL, one batch of 32"}


def main() -> int:
    options = parse()
    if options.worker:
        run = run_grpo if options.worker == "grpo" else run_trl
        serve(lambda command: run(options, Path(command["folder"])))
        return 0
    from grpo.run.versions import hardware, versions

    started = time.monotonic()
    names = options.systems.split(",")
    with tempfile.TemporaryDirectory(prefix="step-cpu-") as folder:
        export_model(Path(folder))
        measured = {}
        for name in names:
            with Worker("benchmarks.step_cpu", name, "--steps", options.steps, "--warmup", options.warmup) as worker:
                measured[name] = worker.ask(folder=folder)
    settings = {"model": MODEL, "prompts": PROMPTS, "generations": GENERATIONS, "completion_tokens": TOKENS}
    result = {
        "benchmark": "step_cpu",
        "hardware": hardware(),
        "versions": versions(),
        "settings": {**settings, "lora_rank": RANK, "steps": options.steps, "warmup": options.warmup},
        "seconds_total": round(time.monotonic() - started, 1),
        "systems": {name: summary(entry) for name, entry in measured.items()},
    }
    show(result)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="comma-separated")
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--out", type=Path, help="write the result there too, as JSON")
    parser.add_argument("--worker", choices=list(SYSTEMS), help=argparse.SUPPRESS)
    return parser.parse_args()


def summary(entry: dict[str, Any]) -> dict[str, Any]:
    """Median and range of the timed steps, and what else the worker reported."""
    seconds = sorted(entry.pop("seconds"))
    median = round(statistics.median(seconds), 3)
    return {"seconds": median, "range": [round(seconds[0], 3), round(seconds[-1], 3)], **entry}


def show(result: dict[str, Any]) -> None:
    ours = result["systems"].get("grpo")
    print(f"{'s/step':>7}  {'range':>15}  {'ratio':>6}  {'peak GiB':>8}  system")
    for name, entry in result["systems"].items():
        ratio = entry["seconds"] / ours["seconds"] if ours else float("nan")
        low, high = entry["range"]
        label = SYSTEMS[name]
        print(f"{entry['seconds']:7.2f}  {low:7.2f}-{high:7.2f}  {ratio:6.2f}  {entry['peak_rss_gib']:8.2f}  {label}")


def reward(completions: list[Any], **kwargs: Any) -> list[float]:
    """A number from 0 to 1 made of the text: groups are never all alike, and nothing is learned."""
    return [zlib.crc32(completion[-1]["content"].encode()) / 2**32 for completion in completions]


def run_grpo(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """This project's steps, as `grpo.train` takes them, with completions that no token ends."""
    from grpo.config.schema import parse_config
    from grpo.data import load_data
    from grpo.monitor.run_log import RunLog
    from grpo.rewards.runtime.pool import RewardPool
    from grpo.run.library_logs import quiet_libraries
    from grpo.session import open_session
    from grpo.training.trainer import Parts, Trainer

    quiet_libraries(False)
    config = parse_config(
        {
            "model": {"name": MODEL, "load_in_4bit": False, "dtype": "bfloat16"},
            "task": {"name": "arithmetic"},
            "rewards": [{"function": f"{__file__}:reward"}],
            "lora": {"r": RANK},
            "rollout": {
                "prompts_per_step": PROMPTS,
                "num_generations": GENERATIONS,
                "max_prompt_length": 96,
                "max_completion_length": TOKENS,
            },
            "train": {"max_steps": options.warmup + options.steps},
            "checkpoint": {"output_dir": str(folder / "run")},
        }
    )
    (folder / "run").mkdir()
    log = RunLog(folder / "run", config, max_steps=0)
    with log, open_session(config) as session:
        session.stop_token_ids = ()
        data = load_data(config, session.tokenizer)
        with RewardPool(data.rewards) as pool:
            Trainer(Parts(folder / "run", log, session, data, pool), data.train).train()
    steps = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    timed = steps[options.warmup :]
    for step in timed:
        assert step["completion_length"] == TOKENS and step["frac_reward_zero_std"] == 0, step
    return {
        "seconds": [step["step_seconds"] for step in timed],
        "rollout_seconds": round(statistics.median(step["rollout_seconds"] for step in timed), 3),
        "train_seconds": round(statistics.median(step["train_seconds"] for step in timed), 3),
        "peak_rss_gib": round(peak_rss_gib(), 3),
    }


def run_trl(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """TRL's steps on the exported folder."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from grpo.config.schema import SEVEN_PROJECTIONS

    micro_batch = int(options.worker.removeprefix("trl"))
    steps = options.warmup + options.steps
    moments: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            moments.append(time.perf_counter())

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            moments.append(time.perf_counter())

    arguments = GRPOConfig(
        output_dir=str(folder / options.worker),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=PROMPTS * GENERATIONS // micro_batch,
        num_generations=GENERATIONS,
        max_completion_length=TOKENS,
        generation_kwargs={"min_new_tokens": TOKENS},
        temperature=1.0,
        beta=0.0,
        use_cpu=True,
        bf16=False,
        model_init_kwargs={"dtype": torch.bfloat16},
        gradient_checkpointing=False,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        max_steps=steps,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        str(folder),
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in chat_prompts(PROMPTS * steps)]),
        peft_config=LoraConfig(r=RANK, lora_alpha=32, target_modules=SEVEN_PROJECTIONS, task_type="CAUSAL_LM"),
        callbacks=[Clock()],
    )
    trainer.train()
    lengths = {entry["completions/mean_length"] for entry in trainer.state.log_history if "loss" in entry}
    assert lengths == {float(TOKENS)}, lengths
    seconds = [end - start for start, end in zip(moments, moments[1:], strict=False)]
    return {"seconds": seconds[options.warmup :], "peak_rss_gib": round(peak_rss_gib(), 3)}


if __name__ == "__main__":
    sys.exit(main())
