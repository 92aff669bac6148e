"""What it saves to compute once what the turns of episodes share: tokens, time and memory of a step, and the gradient.

A group of episodes of eight turns, as a template makes them that takes thoughts out of the history: each turn's prompt
is the conversation so far without them, so that no turn continues the tokens of the one before. Compared are packing
that shares whole prompts of neighbours, and the tree; both with the same budget of tokens for a micro-batch.

    python -m benchmarks.prefix_tree --shape 3b --out benchmarks/results/prefix_tree.json     # a GPU
    python -m benchmarks.prefix_tree --shape tiny --device cpu --scale 0.1                    # tries the script
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.processes import write_result
from benchmarks.common.random_model import RandomSource
from benchmarks.common.timing import milliseconds
from grpo.config.schema import Lora, Model
from grpo.model.base_weights import BaseWeights
from grpo.policy.packing import packed_row, tree_row
from grpo.policy.policy import Policy
from grpo.rollout.types import Segment
from grpo.training.batch import TrainingSequence, pack

PROMPT, THOUGHT, ANSWER, OBSERVED = 512, 160, 48, 64
"""Tokens of an episode's prompt, and of each turn: what is thought, what is said, and what the environment answers."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", default="3b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--episodes", type=int, default=8, help="of the group")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16384, help="of a micro-batch")
    parser.add_argument("--scale", type=float, default=1.0, help="of all lengths")
    parser.add_argument("--checkpointing", default="layer", help="what layers keep, as train.gradient_checkpointing")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    policy = load(options)
    sequences = group(options, policy.base.config.vocab_size)
    result: dict[str, Any] = {
        "benchmark": "prefix_tree",
        "settings": {key: value for key, value in vars(options).items() if key != "out"},
        "sampled_tokens": sum(sequence.trained for sequence in sequences),
    }
    gradients = []
    for name, tree in (("neighbours", False), ("tree", True)):
        batches = pack(sequences, options.tokens, tree=tree)
        result[name] = timed(options, policy, batches, tree=tree)
        gradients.append(torch.cat([p.grad.flatten().float() for p in policy.parameters() if p.grad is not None]))
        print(f"{name:>12} {json.dumps(result[name])}", flush=True)
    apart, shared = gradients
    result["gradient_difference"] = float((apart - shared).norm() / apart.norm())
    result["tokens_saved"] = round(1 - result["tree"]["tokens"] / result["neighbours"]["tokens"], 3)
    result["times_as_fast"] = round(result["neighbours"]["ms"] / result["tree"]["ms"], 2)
    write_result(options.out, result)
    print(json.dumps(result))
    return 0


def load(options: argparse.Namespace) -> Policy:
    """Random weights with an adapter that does something: NF4 in bfloat16 on a GPU, float32 on a CPU."""
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    model = Model(name=options.shape, load_in_4bit=on_gpu, dtype="bfloat16" if on_gpu else "float32")
    base = BaseWeights(RandomSource(options.shape, device), model, device=device, dtype=dtype)  # type: ignore[arg-type]
    policy = Policy(base, Lora(r=16, lora_alpha=32), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in policy.adapter_layers().values():
            weight = layer.lora_B["default"].weight
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02)
    policy.recompute_layers(options.checkpointing)
    policy.model.train()
    return policy


def group(options: argparse.Namespace, vocabulary: int) -> list[TrainingSequence]:
    """Episodes of one prompt, whose turns are each a segment after a history without thoughts."""
    draw = random.Random(0)

    def words(count: int) -> list[int]:
        return [draw.randrange(3, vocabulary) for _ in range(max(round(count * options.scale), 1))]

    prompt, found = words(PROMPT), []
    for _ in range(options.episodes):
        history, parts = list(prompt), []
        for _ in range(options.turns):
            thought, answer = words(THOUGHT), words(ANSWER)
            parts.append(Segment(list(history), thought + answer, [True] * len(thought + answer)))
            history += answer + words(OBSERVED)
        first, *others = parts
        trained = sum(len(part.token_ids) for part in parts)
        found.append(
            TrainingSequence(
                first.prompt_ids, first.token_ids, [-1.0] * trained, 1.0, False, sampled=first.sampled, rewritten=others
            )
        )
    return found


def timed(
    options: argparse.Namespace, policy: Policy, batches: list[list[TrainingSequence]], *, tree: bool
) -> dict[str, Any]:
    """Tokens, time and the allocator's peak of all micro-batches, forward and backward; gradients are left."""
    parts = [[part for sequence in batch for part in sequence.segments] for batch in batches]
    inputs = [([part.prompt_ids for part in batch], [part.token_ids for part in batch]) for batch in parts]

    lengths = [sum(sequence.trained for sequence in batch) for batch in batches]
    weights = torch.randn(sum(lengths), generator=torch.Generator().manual_seed(0)).to(policy.base.device)

    def step() -> None:
        for parameter in policy.parameters():
            parameter.grad = None
        for (prompts, completions), weight in zip(inputs, weights.split(lengths), strict=True):
            scored = policy.score(prompts, completions, temperature=1.0, tree=tree)
            ((scored.logprobs * weight).sum() / len(weights)).backward()

    on_gpu = torch.cuda.is_available()
    step()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    times = milliseconds(step, options.repeats, warmup=0)
    return {
        "tokens": sum(len((tree_row if tree else packed_row)(*each).tokens) for each in inputs),
        "micro_batches": len(batches),
        "ms": round(statistics.median(times), 1),
        "range_ms": [round(min(times), 1), round(max(times), 1)],
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else 0,
    }


if __name__ == "__main__":
    sys.exit(main())
