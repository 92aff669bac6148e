"""Where a decoding step of the rollout spends its time: GPU kernels by name, and what the host does meanwhile.

Random weights of a Llama shape, NF4, the adapter on. Three rollouts: one plainly timed, one under torch.profiler
(kernel times, CUDA graphs included), one under cProfile (host functions, inflated by the profiling itself).

    python benchmarks/rollout_profile.py --shape 3b --sequences 128,32 --out profile.json
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import shared_model as shared
from benchmarks.random_model import RandomSource
from grpo.base import BaseWeights
from grpo.config import Lora, Model
from grpo.engine import Engine, EngineSettings, SamplingSettings
from grpo.policy import Policy

STEPS = slice(40, 72)
"""Decoding steps that are profiled: the prompts are through, no sequence has finished."""


def start_engine(options: argparse.Namespace) -> Engine:
    device = torch.device(options.device)
    dtype = torch.bfloat16
    base = BaseWeights(
        RandomSource(options.shape, device), Model(name="random", load_in_4bit=True), device=device, dtype=dtype
    )
    policy = Policy(base, Lora(r=16, lora_alpha=32), seed=0)
    shared.randomize_adapter(policy)
    length = options.prompt_tokens + options.new_tokens
    return Engine(base, policy, EngineSettings(max_seq_length=length, max_num_seqs=max(options.sequences)))


def rollout(engine: Engine, options: argparse.Namespace, count: int, at_step: Callable[[int], None], seed: int) -> None:
    """One rollout; `at_step` is told the number of each engine step before it runs."""
    core, steps = engine.llm.llm_engine, 0
    original = core.step

    def counted() -> Any:
        nonlocal steps
        at_step(steps)
        steps += 1
        return original()

    core.step = counted
    try:
        requests = shared.random_requests(engine.base.config.vocab_size, count, options.prompt_tokens, seed)
        for _ in engine.generate(requests, SamplingSettings(1.0, options.new_tokens)):
            pass
    finally:
        core.step = original


def step_milliseconds(engine: Engine, options: argparse.Namespace, count: int) -> float:
    """Wall time of one decoding step."""
    marks: dict[int, float] = {}
    rollout(engine, options, count, lambda step: marks.update({step: time.perf_counter()}), seed=11)
    return (marks[STEPS.stop] - marks[STEPS.start]) * 1e3 / (STEPS.stop - STEPS.start)


def kernels(engine: Engine, options: argparse.Namespace, count: int) -> dict[str, Any]:
    """Microseconds a step of every GPU kernel, and how long the GPU was busy."""
    activity = torch.profiler.ProfilerActivity
    profiler = torch.profiler.profile(activities=[activity.CUDA, activity.CPU] if options.trace else [activity.CUDA])

    def at_step(step: int) -> None:
        if step == STEPS.start:
            torch.cuda.synchronize()
            profiler.start()
        if step == STEPS.stop:
            torch.cuda.synchronize()
            profiler.stop()

    rollout(engine, options, count, at_step, seed=12)
    if options.trace:
        profiler.export_chrome_trace(str(options.trace) + f"-{count}.json.gz")
    steps = STEPS.stop - STEPS.start
    microseconds: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            microseconds[event.name] += event.time_range.elapsed_us() / steps
            calls[event.name] += 1
    table = [
        {"kernel": name[:160], "us": round(us, 1), "calls": round(calls[name] / steps, 2)}
        for name, us in microseconds.most_common(45)
    ]
    return {"busy_us": round(sum(microseconds.values()), 1), "kernels": table}


def host(engine: Engine, options: argparse.Namespace, count: int) -> list[dict[str, Any]]:
    """Host functions by own time, milliseconds a step."""
    profile = cProfile.Profile()

    def at_step(step: int) -> None:
        if step == STEPS.start:
            profile.enable()
        if step == STEPS.stop:
            profile.disable()

    rollout(engine, options, count, at_step, seed=13)
    steps = STEPS.stop - STEPS.start
    rows = [
        {
            "function": f"{Path(file).name}:{line}:{name}",
            "own_ms": round(own * 1e3 / steps, 3),
            "all_ms": round(total * 1e3 / steps, 3),
            "calls": round(count / steps, 1),
        }
        for (file, line, name), (_, count, own, total, _) in pstats.Stats(profile).stats.items()  # type: ignore[attr-defined]
    ]
    return sorted(rows, key=lambda row: -row["own_ms"])[:40]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", default="3b")
    parser.add_argument("--sequences", default="128,32", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--trace", type=Path, help="also write Chrome traces, PATH-<sequences>.json.gz")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    engine = start_engine(options)
    found: dict[str, Any] = {"benchmark": "rollout_profile", "shape": options.shape, "sequences": {}}
    for count in options.sequences:
        rollout(engine, options, count, lambda step: None, seed=10)
        entry: dict[str, Any] = {"step_ms": round(step_milliseconds(engine, options, count), 3)}
        if torch.cuda.is_available():
            entry |= kernels(engine, options, count)
        entry["host"] = host(engine, options, count)
        found["sequences"][count] = entry
        print(f"{count} sequences: {entry['step_ms']} ms a step, GPU busy {entry.get('busy_us', 0) / 1e3:.2f} ms")
        for row in entry.get("kernels", [])[:30]:
            print(f"  {row['us']:8.1f} us {row['calls']:7.2f}x  {row['kernel'][:110]}")
        for row in entry["host"][:16]:
            print(f"  host {row['own_ms']:7.3f} ms own {row['all_ms']:8.3f} all {row['calls']:7.1f}x  {row['function']}")
    engine.close()
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps({key: value for key, value in found.items() if key != "sequences"}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
