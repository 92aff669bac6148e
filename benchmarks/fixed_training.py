"""The training half of a GRPO step on fixed work: 16 prompts of 128 tokens x 8 completions of 512, by micro-batch.

The learner's own update, from made-up groups to the optimiser's step: random NF4 weights of a shape, LoRA of rank 16 on
all seven linears, correction of the mismatch as by default. For each budget of a micro-batch and form of recomputation
("mlp+9": nine layers keep gate and up): seconds, and the peak of torch's allocator, weights included. No vLLM, so no KV
cache.

    python -m benchmarks.fixed_training --shape 3b --cases 32768/none,8448/mlp+8 --out /tmp/fixed.json
    python -m benchmarks.fixed_training --tiny
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.processes import write_result
from benchmarks.common.random_model import SHAPES
from benchmarks.common.timing import free_memory, tried
from benchmarks.train_step import load_base, our_policy
from grpo.config.schema import Config, parse_config
from grpo.data import Prompt
from grpo.rollout.sampler import Group, Sample
from grpo.training.advantages import Advantages, compute_advantages
from grpo.training.learner import Learner


def config_of(options: argparse.Namespace, tokens: int, form: str) -> Config:
    kernels = form if options.device == "cuda" else "auto"
    return parse_config(
        {
            "model": {"name": options.shape, "load_in_4bit": True, "dtype": "bfloat16"},
            "task": {"name": "arithmetic"},
            "lora": {"r": options.rank, "lora_alpha": 2 * options.rank},
            "rollout": {
                "num_generations": options.generations, "prompts_per_step": options.prompts,
                "max_prompt_length": options.prompt, "max_completion_length": options.completion,
            },
            "train": {
                "max_steps": 1, "max_mismatch_kl": "none", "tokens_per_micro_batch": tokens, "learning_rate": 1e-6,
                "gradient_checkpointing": kernels,
            } | ({"logprob_chunk_tokens": options.chunk} if options.chunk else {}),
        }
    )  # fmt: skip


def made_up(options: argparse.Namespace, vocabulary: int) -> list[Group]:
    """Groups of completions at full length, with logprobs about those of a uniform distribution."""
    draw = random.Random(0)
    groups = []
    for index in range(options.prompts):
        prompt = Prompt(index, "t", "p", {}, [draw.randrange(10, vocabulary) for _ in range(options.prompt)])
        samples = []
        for _ in range(options.generations):
            ids = [draw.randrange(10, vocabulary) for _ in range(options.completion)]
            samples.append(Sample(ids, [-11.0 - draw.random() for _ in ids], True, "text"))
        groups.append(Group(prompt, samples))
    return groups


def advantages(options: argparse.Namespace, config: Config) -> Advantages:
    rewards = torch.linspace(0, 1, options.generations, dtype=torch.float64).repeat(options.prompts, 1)
    return compute_advantages(rewards[..., None], torch.ones(1, dtype=torch.float64), config.loss)


def measured(base: Any, groups: list[Group], case: str, options: argparse.Namespace) -> dict[str, Any]:
    tokens, form = case.split("/")
    form, _, kept_mlps = form.partition("+")
    config = config_of(options, int(tokens), form)
    learner = Learner(our_policy(base, f"triton/{form}", options.rank), config, max_steps=100, notice=print)
    if kept_mlps:
        learner.budget.set_checkpointing(form, int(kept_mlps))
    weighed, gpu, seconds = advantages(options, config), options.device == "cuda", []
    for number in range(1 + options.repeats):
        if number == 1 and gpu:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        learner.update(groups, weighed, number + 1)
        if gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    found = {"seconds": round(statistics.median(seconds[1:]), 4), "all_seconds": [round(one, 4) for one in seconds]}
    peak = torch.cuda.max_memory_allocated() if gpu else 0
    return found | {
        "peak_gib": round(peak / 2**30, 2),
        "mode": learner.budget.mode,
        "kept_mlps": learner.budget.kept_mlps,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="3b")
    parser.add_argument("--cases", default="32768/none,8448/mlp,4224/none", type=lambda text: text.split(","))
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--completion", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--chunk", type=int, help="train.logprob_chunk_tokens; by default the configuration's")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a small model on a CPU: tries the script")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.device = "cuda"
    if options.tiny:
        options.shape, options.device, options.cases = "tiny", "cpu", ["200/none", "100/layer"]
        options.prompts, options.prompt, options.completion, options.repeats = 2, 16, 8, 1
    base = load_base(options)
    groups = made_up(options, base.config.vocab_size)
    result: dict[str, Any] = {"benchmark": "fixed_training", "shape": options.shape, "cases": {}}
    for case in options.cases:
        found = tried(partial(measured, base, groups, case, options))
        result["cases"][case] = found
        print(f"{case:16} {found}", flush=True)
        write_result(options.out, result)
        free_memory()
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
