"""Where the time of a step goes at many ranks: a simulation fed with measured lengths and measured speeds.

A step is what grpo/training/trainer.py does: every rank samples its prompts' groups to the end, all wait for the
slowest, every rank trains on its own completions, all wait for the slowest, gradients are summed. Prompts are drawn
with replacement from those whose completions were measured; a decoding step takes what it was measured to take for so
many running sequences, training so long per token. Three ways to hand out prompts: `neighbours` (what the trainer
does), `longest first` (each group to the rank with least to do, as if lengths were known before they are sampled: no
rule that must guess does better), and `neighbours, training moved` (completions sent to where there is least to train).

    python -m benchmarks.scaling_simulation --lengths benchmarks/results/completion_lengths.json \
        --rollout benchmarks/results/rollout_3b.json --out benchmarks/results/scaling_simulation.json
    python -m benchmarks.scaling_simulation --run runs/gsm8k --write-lengths lengths.json

Prints a table; the last line is one JSON object. Nothing is measured here.
"""

from __future__ import annotations

import argparse
import bisect
import json
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from grpo.distributed.ranks import owners
from grpo.run.records import TRAINING, completions_files, read_entries

Groups = Sequence[Sequence[int]]
"""Tokens of each completion of each prompt."""


def lengths_of_run(run: Path) -> list[list[int]]:
    """The completions' tokens of every group that a run logged."""
    files = completions_files(run, TRAINING)
    entries = [entry for step in sorted(files) for entry in read_entries(files[step])]
    return [[sample["tokens"] for sample in entry["samples"]] for entry in entries]


def decoding_seconds(rollout: dict[str, Any]) -> Callable[[int], float]:
    """Seconds of one decoding step by running sequences, between what benchmarks/rollout.py measured for ours."""
    rates = {row["sequences"]: row["tokens_per_second"] for row in rollout["systems"]["ours"]["rollouts"]}
    counts = sorted(rates)
    seconds = [count / rates[count] for count in counts]

    def at(running: int) -> float:
        place = min(max(bisect.bisect_left(counts, running), 1), len(counts) - 1)
        (x0, x1), (y0, y1) = counts[place - 1 : place + 1], seconds[place - 1 : place + 1]
        return y0 + (y1 - y0) * (running - x0) / (x1 - x0)

    return at


def rollout_seconds(lengths: Sequence[int], step: Callable[[int], float]) -> float:
    """Until the last of completions that begin together ends."""
    ends = sorted(lengths)
    total, begun = 0.0, 0
    for number, end in enumerate(ends):
        total += (end - begun) * step(len(ends) - number) if end > begun else 0.0
        begun = end
    return total


def neighbours(groups: Groups, ranks: int) -> list[list[int]]:
    """Completions of every rank, as the trainer hands prompts out."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for group, rank in zip(groups, owners(len(groups), 1, ranks), strict=True):
        shares[rank] += group
    return shares


def longest_first(groups: Groups, ranks: int) -> list[list[int]]:
    """Groups in falling order of their tokens, each to the rank with fewest so far."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for group in sorted(groups, key=sum, reverse=True):
        min(shares, key=sum).extend(group)
    return shares


WAYS = {
    "neighbours": (neighbours, False),
    "neighbours, training moved": (neighbours, True),
    "longest first": (longest_first, False),
}


def simulate(groups: Groups, ranks: int, way: str, options: argparse.Namespace, step: Any) -> dict[str, float]:
    """Means over steps, in seconds, of what a rank does: its own work, and waiting for others."""
    draw = random.Random(0)
    hand_out, moved = WAYS[way]
    found: dict[str, list[float]] = {}
    for _ in range(options.steps):
        shares = hand_out(draw.choices(groups, k=options.prompts * ranks), ranks)
        sampling = [rollout_seconds(share, step) for share in shares]
        tokens = [sum(share) + options.prompt_tokens * options.prompts for share in shares]
        training = [count / options.train_tokens_per_second for count in tokens]
        if moved:
            training = [statistics.fmean(training)] * ranks
        link = options.link_gb_per_second if ranks <= options.ranks_per_node else options.network_gb_per_second
        parts = {
            "rollout": statistics.fmean(sampling),
            "waiting for rollouts": max(sampling) - statistics.fmean(sampling),
            "training": statistics.fmean(training),
            "waiting for training": max(training) - statistics.fmean(training),
            "summing": 2 * (ranks - 1) / ranks * options.gradient_mb / 1e3 / link,
            "other": options.other_seconds,
        }
        for name, value in parts.items():
            found.setdefault(name, []).append(value)
    return {name: statistics.fmean(values) for name, values in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--run", type=Path, help="take the completions that this run logged")
    parser.add_argument("--write-lengths", type=Path, help="with --run: keep their lengths there, and stop")
    parser.add_argument("--lengths", type=Path, help="a file of --write-lengths")
    parser.add_argument("--rollout", type=Path, help="a result of benchmarks/rollout.py")
    parser.add_argument("--ranks", default="1,2,8,64")
    parser.add_argument("--prompts", type=int, default=16, help="of each rank in a step")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--train-tokens-per-second", type=float, default=32000)
    parser.add_argument("--other-seconds", type=float, default=0.1, help="of a step, on every rank: sync, logging")
    parser.add_argument("--gradient-mb", type=float, default=97.3, help="float32, of LoRA r=16 on a 3B model")
    parser.add_argument("--ranks-per-node", type=int, default=8)
    parser.add_argument("--link-gb-per-second", type=float, default=200, help="within a node")
    parser.add_argument("--network-gb-per-second", type=float, default=10, help="between nodes")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.run:
        groups = lengths_of_run(options.run)
        if options.write_lengths:
            options.write_lengths.write_text(json.dumps({"groups": groups}) + "\n")
            return 0
    else:
        groups = json.loads(options.lengths.read_text())["groups"]
    step = decoding_seconds(json.loads(options.rollout.read_text()))
    rows = []
    for ranks in map(int, options.ranks.split(",")):
        for way in WAYS:
            parts = simulate(groups, ranks, way, options, step)
            own = parts["rollout"] + parts["training"] + parts["other"]
            rows.append({"ranks": ranks, "way": way, "efficiency": own / sum(parts.values()), "seconds": parts})
            shown = "  ".join(f"{name} {value:.2f}" for name, value in parts.items())
            print(f"{ranks:3} ranks  {way:28} {own / sum(parts.values()):6.1%}  {shown} s")
    flat = sorted(length for group in groups for length in group)
    result: dict[str, Any] = {"benchmark": "scaling_simulation", "rows": rows}
    result["lengths"] = {"completions": len(flat), "mean": statistics.fmean(flat), "median": flat[len(flat) // 2]}
    result["lengths"] |= {"p99": flat[int(0.99 * len(flat))], "longest": flat[-1]}
    result["settings"] = {name: value for name, value in vars(options).items() if not isinstance(value, Path)}
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
