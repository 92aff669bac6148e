"""A whole mixture of experts on one GPU, of Qwen3-30B-A3B's or gpt-oss-20b's shape: memory, decoding, router replay, a
GRPO step.

Random weights, made as they are read, in NF4, gpt-oss's experts in MXFP4; a LoRA adapter of rank 16 on attention. The
step is 16 prompts of 128 tokens with 8 completions of 512 each: sampled, then forward and backward with layers
recomputed and AdamW, the experts replayed that sampling chose. Rewards cost nothing and are left out. What is measured
is written as it comes.

    python -m benchmarks.experts_whole --out benchmarks/results/experts_whole.json
    python -m benchmarks.experts_whole --shape gpt_oss_20b --out benchmarks/results/gpt_oss_whole.json
    python -m benchmarks.experts_whole --shape tiny_gpt_oss --device cpu

Prints a line a part; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import shared_model as shared
from benchmarks.common.random_model import RandomSource
from benchmarks.common.timing import free_memory, tried
from grpo.config.schema import Lora, Model, Train
from grpo.model.base_weights import BaseWeights
from grpo.policy.policy import Policy
from grpo.rollout.engine import Engine
from grpo.rollout.types import Completion, EngineSettings, Request, SamplingSettings
from grpo.run.versions import hardware, versions
from grpo.training.optim import build_optimizer

PROMPTS, GENERATIONS, PROMPT, COMPLETION = 16, 8, 128, 512
CONTEXT, DECODED = 512, 128
MISMATCHED_GROUPS = 4
BARS = {
    "30b_a3b": {
        "resident_gb": 18.0, "load_peak_gb": 20.0, "step_seconds": 20.0, "train_peak_gb": 40.0, "mismatch_kl": 0.002,
        "decode": {"32": 2500, "128": 8000, "256": 13000},
    },
    "gpt_oss_20b": {"resident_gb": 14.0, "mismatch_kl": 0.002, "decode": {"32": 3000, "128": 10000}},
}  # fmt: skip


def peak_gb(on_gpu: bool) -> float:
    return round(torch.cuda.max_memory_allocated() / 1e9, 2) if on_gpu else 0.0


def k3(gap: torch.Tensor) -> float:
    """Of the trainer's logprobs less the sampler's (Schulman's estimate of KL)."""
    return float((gap.exp() - 1 - gap).mean())


def reset_peak(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


class Whole:
    """The model, and what is measured of it."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.device = options, torch.device(options.device)
        self.on_gpu = self.device.type == "cuda"
        reset_peak(self.on_gpu)
        started = time.perf_counter()
        model = Model(name="random", load_in_4bit=True)
        self.base = BaseWeights(
            RandomSource(options.shape, self.device), model, device=self.device, dtype=torch.bfloat16
        )
        free_memory()
        self.load = {"seconds": round(time.perf_counter() - started, 1), "peak_gb": peak_gb(self.on_gpu)}
        self.load |= {"weights_gb": round(self.base.nbytes() / 1e9, 2)}
        self.policy = Policy(self.base, Lora(r=16, lora_alpha=32), seed=0)
        shared.randomize_adapter(self.policy)
        settings = EngineSettings(
            max_seq_length=max(CONTEXT + DECODED, options.prompt + options.completion),
            max_num_seqs=max(options.counts),
        )
        self.engine = Engine(self.base, self.policy, settings)

    def memory(self) -> dict[str, Any]:
        """What is resident once both graphs are there."""
        if not self.on_gpu:
            return {}
        parts = {name: round(size / 1e9, 3) for name, size in shared.memory_parts(self.engine, self.policy).items()}
        return {"gb": parts, "resident_gb": round(parts["allocated"] - parts["kv_cache"], 2)}

    def decoding(self) -> list[dict[str, Any]]:
        """Tokens a second by number of sequences."""
        rows = []
        for count in self.options.counts:
            if time.monotonic() > self.options.ends:
                break
            rows.append(shared.throughput(self.engine, count, self.options.context, self.options.decoded, repeats=3))
            print(rows[-1], flush=True)
        return rows

    def sample(self) -> list[Completion]:
        """The completions of a step, neighbours sharing a prompt."""
        drawn = shared.random_requests(self.base.config.vocab_size, self.options.prompts, self.options.prompt, seed=7)
        self.prompts = [request.prompt_ids for request in drawn for _ in range(GENERATIONS)]
        requests = [Request(number, prompt, seed=number) for number, prompt in enumerate(self.prompts)]
        done = self.engine.generate(requests, SamplingSettings(1.0, self.options.completion))
        return sorted(done, key=lambda completion: completion.request_id)

    @torch.no_grad()
    def mismatch(self, done: list[Completion]) -> dict[str, Any]:
        """k3 of several groups' logprobs with replay and without, over all tokens and over the first of each."""
        gaps: dict[str, list[torch.Tensor]] = {"replayed": [], "free": []}
        for first in range(0, min(len(done), MISMATCHED_GROUPS * GENERATIONS), GENERATIONS):
            group = done[first : first + GENERATIONS]
            sampled = torch.tensor([each.logprobs for each in group])
            for name, routes in (("replayed", [each.routes for each in group]), ("free", None)):
                scored = self.policy.score(
                    self.prompts[first : first + GENERATIONS], [each.token_ids for each in group], temperature=1.0,
                    routes=routes,
                )  # fmt: skip
                gaps[name].append(scored.logprobs.float().cpu().view(sampled.shape) - sampled)

        def of(first: int) -> dict[str, Any]:
            every = {name: [k3(gap[:, :first]) for gap in each] for name, each in gaps.items()}
            found: dict[str, Any] = {name: sum(each) / len(each) for name, each in every.items()}
            shares = [one / two for one, two in zip(every["replayed"], every["free"], strict=True) if two]
            return found | {"share": found["replayed"] / (found["free"] or 1), "shares_of_groups": shares}

        lengths = (64, 256, self.options.completion)
        return of(self.options.completion) | {"of_first_tokens": {str(length): of(length) for length in lengths}}

    def step(self) -> dict[str, Any]:
        """A GRPO step, and what sampling and training disagree by."""
        optimizer = build_optimizer(self.policy.parameters(), Train(), self.device, print)
        self.policy.recompute_layers("layer")
        result: dict[str, Any] = {}
        for attempt in ("warm-up", "measured"):
            shared.synchronize()
            started = time.perf_counter()
            done = self.sample()
            shared.synchronize()
            sampled = time.perf_counter()
            reset_peak(self.on_gpu)
            self.policy.model.train()
            for first in range(0, len(done), 2 * GENERATIONS):
                group = slice(first, first + 2 * GENERATIONS)
                scored = self.policy.score(
                    self.prompts[group], [each.token_ids for each in done[group]], temperature=1.0,
                    routes=[each.routes for each in done[group]],
                )  # fmt: skip
                (scored.logprobs.mean() / len(done)).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            self.policy.model.eval()
            self.engine.sync_adapter()
            shared.synchronize()
            ended = time.perf_counter()
            result = {
                "rollout_seconds": round(sampled - started, 2),
                "train_seconds": round(ended - sampled, 2),
                "step_seconds": round(ended - started, 2),
                "tokens": sum(len(each.token_ids) for each in done),
                "peak_gb_with_kv": peak_gb(self.on_gpu),
                "attempt": attempt,
            }
            print(result, flush=True)
            if time.monotonic() > self.options.ends:
                break
        return result | {"mismatch_kl": self.mismatch(done)}


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", default="30b_a3b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--budget", type=float, default=270, help="seconds for everything")
    parser.add_argument("--counts", default="1,32,128,256", help="sequences that decode together")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    options.ends = time.monotonic() + options.budget - 20
    tiny = options.device == "cpu"
    options.counts, options.context, options.decoded = (
        ((1, 4), 32, 8) if tiny else (tuple(map(int, options.counts.split(","))), CONTEXT, DECODED)
    )
    options.prompts, options.prompt, options.completion = (2, 16, 16) if tiny else (PROMPTS, PROMPT, COMPLETION)
    result: dict[str, Any] = {"benchmark": "experts_whole", "shape": options.shape, "bars": BARS.get(options.shape)}
    result |= {"versions": versions(), "hardware": hardware()}

    def note(name: str, call: Callable[[], Any]) -> None:
        result[name] = tried(call)
        print(name, result[name], flush=True)
        if options.out:
            options.out.write_text(json.dumps(result, indent=1) + "\n")

    whole = Whole(options)
    note("load", lambda: whole.load)
    note("memory", whole.memory)
    note("decoding", whole.decoding)
    if time.monotonic() < options.ends:
        note("step", whole.step)
    whole.engine.close()
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
