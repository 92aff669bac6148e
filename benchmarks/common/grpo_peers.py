"""Steps of other GRPO trainers on a given work, in a process of their own; a line of JSON a step. For benchmarks only.

    python -m benchmarks.common.grpo_peers trl WORK.json          # TRL's GRPOTrainer, colocated vLLM, a 16-bit base
    python -m benchmarks.common.grpo_peers unsloth WORK.json      # Unsloth's, its vLLM on the same 4-bit weights

WORK.json is written by head_to_head.py. Each trainer has its defaults, but for what the work fixes and what its own
documentation says for such a work: the sequences that vLLM takes at once are those of a step, so that none waits. Steps
may be of several lengths, one after another, so that a start is paid for once.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PHASES = ("step_seconds", "rollout_seconds", "train_seconds", "sync_seconds", "old_logprob_seconds")
ROOM = 64
"""Tokens of vLLM's longest sequence beyond the work's."""
PATIENCE = 540.0
"""Seconds that a trainer waits, after its first step, to be told to go on."""


class Step(NamedTuple):
    """One of a work's."""

    completion: int
    """Tokens of each completion."""
    corrected: bool
    """Whether it has the trainer's own correction of the mismatch, with the forward pass that needs."""


def spread(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward with variance that costs nothing."""
    return [sum(ids) % 1000 / 1000 for ids in completion_ids]


def grpo_config(work: dict[str, Any], **more: Any) -> Any:
    """TRL's configuration of `work`, which Unsloth takes too."""
    import torch
    from trl import GRPOConfig

    gpu, completions = torch.cuda.is_available(), work["prompts"] * work["generations"]
    if gpu:
        more |= {"use_vllm": True}
        more.setdefault("generation_kwargs", {"ignore_eos": True})
    return GRPOConfig(
        output_dir=str(Path(work["scratch"]) / "head-to-head-peer"),
        per_device_train_batch_size=work["micro_batch"],
        gradient_accumulation_steps=completions // work["micro_batch"], num_generations=work["generations"],
        max_completion_length=longest(work), temperature=1.0, beta=0.0, learning_rate=1e-5,
        lr_scheduler_type="constant", max_steps=len(work["steps"]), logging_steps=1, disable_tqdm=True,
        save_strategy="no", report_to="none", seed=0, **more,
    )  # fmt: skip


def steps_of(work: dict[str, Any]) -> list[Step]:
    return [Step(*step) for step in work["steps"]]


def longest(work: dict[str, Any]) -> int:
    """Tokens of the longest completion."""
    return max(step.completion for step in steps_of(work))


def rows(work: dict[str, Any]) -> Any:
    from datasets import Dataset

    lines = (Path(work["folder"]) / "prompts.jsonl").read_text().splitlines()
    return Dataset.from_list([{"prompt": json.loads(line)["question"]} for line in lines])


def trl_trainer(work: dict[str, Any]) -> Any:
    import torch
    from peft import LoraConfig
    from trl import GRPOTrainer

    gpu = torch.cuda.is_available()
    vllm = {"vllm_mode": "colocate", "vllm_max_model_length": work["prompt"] + longest(work) + ROOM}
    if work["memory_share"]:
        vllm |= {"vllm_gpu_memory_utilization": work["memory_share"]}
    return GRPOTrainer(
        work["folder"],
        reward_funcs=spread,
        args=grpo_config(
            work, model_init_kwargs={"dtype": "bfloat16"}, bf16=gpu, use_cpu=not gpu, **(vllm if gpu else {})
        ),
        train_dataset=rows(work),
        peft_config=LoraConfig(
            r=work["rank"], lora_alpha=2 * work["rank"], target_modules=PROJECTIONS, task_type="CAUSAL_LM"
        ),
    )  # fmt: skip


def unsloth_trainer(work: dict[str, Any]) -> Any:
    """Its packed route finds padding by token id, so that token is kept out of completions."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
    os.environ.setdefault("UNSLOTH_VLLM_NO_FLASHINFER", "1")
    from unsloth import FastLanguageModel  # before trl, transformers and peft

    share = {"gpu_memory_utilization": work["memory_share"]} if work["memory_share"] else {}
    model, tokenizer = FastLanguageModel.from_pretrained(
        work["folder"], max_seq_length=work["prompt"] + longest(work) + ROOM, load_in_4bit=True,
        fast_inference=True, max_lora_rank=work["rank"], max_num_seqs=work["prompts"] * work["generations"],
        local_files_only=True, use_exact_model_name=True, **share,
    )  # fmt: skip
    model = FastLanguageModel.get_peft_model(
        model, r=work["rank"], lora_alpha=2 * work["rank"], target_modules=PROJECTIONS,
        use_gradient_checkpointing="unsloth",
    )  # fmt: skip
    from trl import GRPOTrainer

    kept_out = {"ignore_eos": True, "logit_bias": {tokenizer.pad_token_id: -100.0}}
    return GRPOTrainer(
        model=model, processing_class=tokenizer, reward_funcs=[spread],
        args=grpo_config(work, generation_kwargs=kept_out), train_dataset=rows(work),
    )  # fmt: skip


TRAINERS = {"trl": trl_trainer, "unsloth": unsloth_trainer}


def step_clock(trainer: Any, corrected: Callable[[int], bool], after: Callable[[int], None] = lambda step: None) -> Any:
    """A callback that times every step's phases and prints them. `corrected` says of a step, counted from 1, whether it
    has the trainer's own correction of the mismatch; `after` is called when one has ended, and is not timed."""
    import torch
    from transformers import TrainerCallback

    parts: dict[str, float] = {}
    inside: list[str] = []

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(owner: Any, name: str, part: str, within: str | None = None) -> None:
        original = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            if within is not None and within not in inside:
                return original(*arguments, **options)
            inside.append(part)
            begun = now()
            try:
                return original(*arguments, **options)
            finally:
                parts[part] = parts.get(part, 0.0) + now() - begun
                inside.remove(part)

        setattr(owner, name, call)

    timed(trainer, "_generate_and_score_completions", "prepare")
    timed(trainer, "_get_per_token_logps_and_entropies", "old_logprob_seconds", within="prepare")
    if trainer.use_vllm:
        timed(trainer.vllm_generation, "generate", "rollout_seconds")
        timed(trainer.vllm_generation, "sync_weights", "sync_seconds")
        trainer.vllm_importance_sampling_correction = corrected(1)
    else:
        timed(trainer, "_generate", "rollout_seconds")

    class Clock(TrainerCallback):
        def on_step_begin(self, *arguments: Any, **options: Any) -> None:
            parts.clear()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            self.begun = now()

        def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
            whole, step = now() - self.begun, state.global_step
            found = {name: parts.get(name, 0.0) for name in PHASES} | {"step_seconds": whole, "ended": time.time()}
            found["train_seconds"] = whole - found["rollout_seconds"] - found["sync_seconds"]
            peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
            about = {"step": step, "corrected": trainer.use_vllm and corrected(step), "peak_memory_gib": peak}
            print("STEP " + json.dumps({**found, **about, "kv_cache_gib": kv_cache_gib(trainer)}), flush=True)
            if trainer.use_vllm:
                trainer.vllm_importance_sampling_correction = corrected(step + 1)
            after(step)

    return Clock()


def set_completion_length(trainer: Any, tokens: int) -> None:
    """Of the steps to come."""
    owners = [trainer, trainer.args, *([trainer.vllm_generation] if trainer.use_vllm else [])]
    for owner in owners:
        assert owner.max_completion_length > 0, owner  # another attribute of this name would do nothing
        owner.max_completion_length = tokens


def wait_for(file: Path) -> None:
    """Until it exists, PATIENCE at most."""
    ends = time.monotonic() + PATIENCE
    while not file.exists() and time.monotonic() < ends:
        time.sleep(0.05)


def kv_cache_gib(trainer: Any) -> float | None:
    """Memory of vLLM's KV cache; None where it cannot be found."""
    try:
        runner = trainer.vllm_generation.llm.llm_engine.model_executor.driver_worker.model_runner
        caches = [one for each in runner.kv_caches for one in (each if isinstance(each, (list, tuple)) else [each])]
    except AttributeError:
        return None
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in caches}
    return sum(storages.values()) / 2**30


def main() -> int:
    name, file = sys.argv[1:3]
    work = json.loads(Path(file).read_text())
    steps, trainer = steps_of(work), TRAINERS[name](work)

    def after(ended: int) -> None:
        if ended == 1 and work["go_on"]:
            wait_for(Path(work["go_on"]))
        if ended < len(steps):
            set_completion_length(trainer, steps[ended].completion)

    set_completion_length(trainer, steps[0].completion)
    last = len(steps)
    trainer.add_callback(step_clock(trainer, lambda step: steps[min(step, last) - 1].corrected, after))
    trainer.train()
    return 0


if __name__ == "__main__":
    sys.exit(main())
