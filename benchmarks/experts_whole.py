"""A whole mixture of experts on one GPU, of Qwen3-30B-A3B's or gpt-oss-20b's shape: memory, decoding, router replay, a
GRPO step.

Random weights, made as they are read, in NF4, gpt-oss's experts in MXFP4; a LoRA adapter of rank 16 on attention. The
step is 16 prompts of 128 tokens with 8 completions of 512 each: sampled, then forward and backward with layers
recomputed and AdamW, the experts replayed that sampling chose. Rewards cost nothing and are left out. Peaks stand
beside what the memory plan makes of the same. What is measured is written as it comes.

    python -m benchmarks.experts_whole --out benchmarks/results/experts_whole.json
    python -m benchmarks.experts_whole --backend grpo-apart --parts decoding,kernels   # a decoding step by its kernels
    python -m benchmarks.experts_whole --parts modules   # what each kind of module differs by, experts replayed
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
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import rollout, rollout_profile
from benchmarks.common import module_differences
from benchmarks.common import shared_model as shared
from benchmarks.common import training_step as steps
from benchmarks.common.decoding import FewGraphs, choose
from benchmarks.common.processes import turn
from benchmarks.common.random_model import RandomSource
from benchmarks.common.timing import free_memory, tried
from grpo.config.schema import Lora, Model, Train
from grpo.memory import plan
from grpo.memory.activations import TrainingMemory
from grpo.model.base_weights import BaseWeights
from grpo.policy.packing import packed_row
from grpo.policy.policy import Policy
from grpo.rollout.types import Completion, EngineSettings, Request, SamplingSettings
from grpo.run.versions import hardware, versions
from grpo.training.optim import build_optimizer

PROMPTS, GENERATIONS, PROMPT, COMPLETION = 16, 8, 128, 512
CONTEXT, DECODED = 512, 128
MISMATCHED_GROUPS = 4
AT_ONCE = 2
"""Groups in a micro-batch."""
PARTS = ("decoding", "beside", "kernels", "step", "replay", "modules")
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


def judged(planned: int, measured: int) -> dict[str, float]:
    """A plan beside what was measured, in GB, and its relative error, above 0 where it asks for too much."""
    return {
        "planned_gb": round(planned / 1e9, 2), "measured_gb": round(measured / 1e9, 2),
        "error": round(planned / measured - 1, 4),
    }  # fmt: skip


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
        self.settings = EngineSettings(
            max_seq_length=max(options.context + options.decoded, options.prompt + options.completion),
            max_num_seqs=max(options.counts),
            attention_backend=choose(options.backend),
            enforce_eager="modules" in options.parts,
        )
        started = time.perf_counter()
        decoded = (*options.counts, PROMPTS * GENERATIONS)
        self.engine = FewGraphs(self.base, self.policy, self.settings, captured=decoded)
        self.load |= {"engine_seconds": round(time.perf_counter() - started, 1)}

    def memory(self) -> dict[str, Any]:
        """What is resident once both graphs are there."""
        if not self.on_gpu:
            return {}
        parts = {name: round(size / 1e9, 3) for name, size in shared.memory_parts(self.engine, self.policy).items()}
        resident = {"planned": self.planned_resident(), "measured": torch.cuda.memory_allocated()}
        return {
            "gb": parts, "resident_gb": round(parts["allocated"] - parts["kv_cache"], 2), "plan": judged(**resident),
        }  # fmt: skip

    def planned_resident(self) -> int:
        """Bytes that the plan has for the weights, the adapter's values and copies, the KV cache and vLLM."""
        buffers = sum(each.a.nbytes + each.b.nbytes for each in self.engine.adapter.buffers.values())
        values = 4 * sum(parameter.numel() for parameter in self.policy.parameters())
        return self.base.nbytes() + values + buffers + self.engine.kv_bytes() + plan.VLLM_KEEPS

    def planned_sampling(self) -> int:
        """The same while sampling."""
        settings, itemsize = self.settings, self.base.dtype.itemsize
        sampling = plan.sampling_bytes(self.base.config, itemsize, settings.max_seq_length, settings.max_num_seqs)
        return self.planned_resident() + sampling

    def planned_training(self, done: list[Completion]) -> int:
        """The same in the forward and backward of the step's micro-batches, with gradients and AdamW's moments."""
        count = AT_ONCE * GENERATIONS
        row = packed_row(self.prompts[:count], [each.token_ids for each in done[:count]])
        config = steps.step_config(
            rank=16, tokens=len(row.tokens), prompt=self.options.prompt, completion=self.options.completion,
            gradient_checkpointing="layer",
        )  # fmt: skip
        memory = TrainingMemory.of(
            config, self.base.config, self.base.dtype.itemsize, on_gpu=True, tokens=len(row.tokens)
        )
        memory = replace(memory, predicted=len(row.predicting), keys=sum(span.keys for span in row.spans))
        trained = sum(parameter.numel() for parameter in self.policy.parameters())
        return self.planned_resident() + trained * (4 + 8) + memory.peak("layer")

    def beside(self) -> dict[str, Any]:
        """What benchmarks/rollout.py measures of this shape as "ours", for its `--join`."""
        options = self.options
        protocol = argparse.Namespace(
            system="ours", counts=[count for count in options.counts if count > 1 and count <= 128], repeats=2,
            prompt_tokens=options.context, new_tokens=options.decoded, out=None,
        )  # fmt: skip
        sample = rollout.sampler_of(self.engine)
        found: dict[str, Any] = {"system": "ours", "rollouts": []}
        rollout.measure_counts(protocol, sample, self.base.config.vocab_size, found)
        return found

    def kernels(self) -> dict[str, Any]:
        """Of a decoding step of the most sequences: its time, and microseconds of every kernel."""
        options = argparse.Namespace(
            prompt_tokens=self.options.context, new_tokens=rollout_profile.STEPS.stop + 8, trace=None
        )
        count = max(self.options.counts)
        found: dict[str, Any] = {"sequences": count, **rollout_profile.step_milliseconds(self.engine, options, count)}
        return found | (rollout_profile.kernels(self.engine, options, count) if self.on_gpu else {})

    def modules(self) -> dict[str, Any]:
        """What the two graphs differ by, sampling's experts given to training."""
        drawn = shared.random_requests(self.base.config.vocab_size, 1, self.options.prompt, seed=3)
        new = min(64, self.options.completion)
        return module_differences.differences(self.engine, self.policy, drawn[0].prompt_ids, new)

    def decoding(self) -> list[dict[str, Any]]:
        """Tokens a second by number of sequences."""
        rows = []
        reset_peak(self.on_gpu)
        for count in self.options.counts:
            if time.monotonic() > self.options.ends:
                break
            rows.append(shared.throughput(self.engine, count, self.options.context, self.options.decoded, repeats=3))
            print(rows[-1], flush=True)
        if self.on_gpu:
            rows.append({"plan": judged(self.planned_sampling(), torch.cuda.max_memory_allocated())})
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

    def replay(self) -> dict[str, Any]:
        """`mismatch` without a step."""
        return self.mismatch(self.sample())

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
            for first in range(0, len(done), AT_ONCE * GENERATIONS):
                group = slice(first, first + AT_ONCE * GENERATIONS)
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
            if self.on_gpu:
                result["plan"] = judged(self.planned_training(done), torch.cuda.max_memory_allocated())
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
    parser.add_argument("--backend", default="auto", help="see benchmarks/common/decoding.py")
    parser.add_argument(
        "--turns", type=Path, metavar="FILE", help="measure while a lock on FILE is held, beside others on one GPU"
    )
    parser.add_argument("--parts", default="decoding,step", type=lambda text: text.split(","), help=", ".join(PARTS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    options.ends = time.monotonic() + options.budget - 20
    tiny = options.device == "cpu"
    options.counts, options.context, options.decoded = (
        ((1, 4), 32, 8) if tiny else (tuple(map(int, options.counts.split(","))), CONTEXT, DECODED)
    )
    options.prompts, options.prompt, options.completion = (2, 16, 16) if tiny else (PROMPTS, PROMPT, COMPLETION)
    result: dict[str, Any] = {"benchmark": "experts_whole", "shape": options.shape, "bars": BARS.get(options.shape)}
    result |= {"backend": options.backend, "versions": versions(), "hardware": hardware()}

    def note(name: str, call: Callable[[], Any]) -> None:
        result[name] = tried(call)
        print(name, result[name], flush=True)
        if options.out:
            options.out.write_text(json.dumps(result, indent=1) + "\n")

    whole = Whole(options)
    note("load", lambda: whole.load)
    note("memory", whole.memory)
    with turn(options.turns):
        for part in options.parts:
            if time.monotonic() < options.ends:
                note(part, getattr(whole, part))
    whole.engine.close()
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
