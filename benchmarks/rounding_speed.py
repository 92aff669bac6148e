"""What one rounding costs in time: rollout and training of two checkouts of this project, in turns on one GPU.

The second checkout is one from before, or the same with `--two-roundings`, which adds adapters to rounded outputs
(two_roundings.py). Random weights of a 3B shape, an adapter of rank 16 on all linears, NF4 and 16 bit. A part is a
process of its own; the order of the two checkouts alternates from turn to turn.

    python -m benchmarks.rounding_speed --against /tmp/before --out benchmarks/results/rounding_speed.json
    python -m benchmarks.rounding_speed --parts rollout-nf4 --counts 1,32 --against /tmp/before
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PARTS = ("rollout-nf4", "rollout-16bit", "train-nf4", "train-16bit")
ROOT = Path(__file__).resolve().parent.parent


# The side of one checkout


def base_and_policy(options: argparse.Namespace, four_bit: bool) -> tuple[Any, Any]:
    import torch

    from benchmarks.common import shared_model
    from benchmarks.common.random_model import RandomSource
    from grpo.config.schema import Lora, Model
    from grpo.model.base_weights import BaseWeights
    from grpo.policy.policy import Policy

    device = torch.device(options.device)
    source = RandomSource(options.shape, device)
    dtype = torch.bfloat16
    base = BaseWeights(source, Model(name="random", load_in_4bit=four_bit), device=device, dtype=dtype)
    policy = Policy(base, Lora(r=16, lora_alpha=32), seed=0)
    shared_model.randomize_adapter(policy)
    return base, policy


def rollout(options: argparse.Namespace, four_bit: bool) -> dict[str, Any]:
    """Tokens a second by number of sequences: prompts of 128 tokens in groups of 8, `new_tokens` sampled."""
    from benchmarks.rollout import grouped_prompts
    from grpo.rollout.engine import Engine, EngineSettings, Request, SamplingSettings

    base, policy = base_and_policy(options, four_bit)
    new_tokens = options.new_tokens
    settings = EngineSettings(max_seq_length=128 + new_tokens, max_num_seqs=max(options.counts))
    engine = Engine(base, policy, settings)
    found: dict[str, Any] = {}
    for count in options.counts:
        rates = []
        for repeat in range(options.repeats + 1):
            prompts = grouped_prompts(base.config.vocab_size, count, 128, 10_000 * count + repeat)
            requests = [Request(number, prompt, 7) for number, prompt in enumerate(prompts)]
            started = time.perf_counter()
            tokens = sum(len(done.token_ids) for done in engine.generate(requests, SamplingSettings(1.0, new_tokens)))
            rates.append(tokens / (time.perf_counter() - started))
        found[str(count)] = round(statistics.median(rates[1:]), 1)
    return found


def train(options: argparse.Namespace, four_bit: bool) -> dict[str, Any]:
    """Tokens a second of forward, backward and AdamW by tokens of a micro-batch, gate and up computed again."""
    import torch

    from benchmarks.common.timing import milliseconds
    from benchmarks.train_step import our_policy, our_step

    base, _ = base_and_policy(options, four_bit)
    policy = our_policy(base, "triton/mlp", 16)
    found: dict[str, Any] = {}
    for tokens in options.tokens:
        length = min(2048, tokens)
        generator = torch.Generator().manual_seed(0)
        rows = torch.randint(10, base.config.vocab_size, (tokens // length, length), generator=generator).tolist()
        step = our_step(policy, [row[: length // 4] for row in rows], [row[length // 4 :] for row in rows], 2048)
        times = milliseconds(step, options.repeats + 2, warmup=2)
        found[str(tokens)] = round(1e3 * tokens / statistics.median(times), 1)
    return found


def measure(options: argparse.Namespace) -> dict[str, Any]:
    kind, form = options.part.split("-")
    return {"rollout": rollout, "train": train}[kind](options, form == "nf4")


# The comparison


def run(options: argparse.Namespace, part: str, tree: Path, *extra: str) -> dict[str, Any]:
    """What `part` gives in a process that imports the checkout `tree`."""
    words = [sys.executable, "-m", "benchmarks.rounding_speed", "--part", part, *extra]
    for name in ("shape", "new_tokens", "repeats", "device"):
        words += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    for name in ("counts", "tokens"):
        words += [f"--{name}", ",".join(map(str, getattr(options, name)))]
    done = subprocess.run(words, capture_output=True, text=True, timeout=options.budget, cwd=tree)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"error": done.stderr[-600:]}
    return json.loads(lines[-1])


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Every part in `turns` turns of a process for each side, whose order alternates: the first one of a machine is
    slower than the same a second time, by up to a third where the host limits it."""
    sides = {
        "now": (ROOT, ()),
        "before": (options.against or ROOT, () if options.against else ("--two-roundings",)),
    }
    found: dict[str, Any] = {}
    for part in options.parts:
        turns: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for turn in range(options.turns):
            for side in list(sides)[:: 1 if turn % 2 else -1]:
                turns[side].append(run(options, part, sides[side][0], *sides[side][1]))
        found[part] = turns | {"now_over_before": ratios(turns["now"], turns["before"])}
        print(part, json.dumps(found[part]), flush=True)
        if options.out:
            options.out.write_text(json.dumps(found, indent=1) + "\n")
    return found


def ratios(now: list[dict[str, Any]], before: list[dict[str, Any]]) -> dict[str, float]:
    """By number of sequences or tokens: the ratio of the medians over turns, where every turn has a figure."""
    keys = set.intersection(*(set(turn) for turn in now + before)) - {"error"}
    return {
        key: round(statistics.median(turn[key] for turn in now) / statistics.median(turn[key] for turn in before), 3)
        for key in sorted(keys, key=int)
    }


def main() -> int:
    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", type=Path, help="the other checkout; without it this one with two roundings")
    parser.add_argument("--parts", default=",".join(PARTS), type=lambda text: text.split(","))
    parser.add_argument("--shape", default="3b")
    parser.add_argument("--counts", default="1,32,128,256", type=numbers, help="sequences")
    parser.add_argument("--tokens", default="2048,16384", type=numbers, help="of a micro-batch")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--turns", type=int, default=2, help="processes of each side and part")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--budget", type=float, default=240, help="seconds for a part of one checkout")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--part", choices=PARTS, help="measure this one, in this process")
    parser.add_argument("--two-roundings", action="store_true")
    options = parser.parse_args()
    if not options.part:
        print(json.dumps(compare(options)))
        return 0
    if options.two_roundings:
        from benchmarks.two_roundings import two_roundings

        two_roundings()
    print(json.dumps(measure(options)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
