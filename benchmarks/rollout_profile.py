"""Where a decoding step of the rollout spends its time: GPU kernels by name, and what the host does meanwhile.

Random weights of a Llama shape, NF4, the adapter on. Three rollouts: one plainly timed, one under torch.profiler
(kernel times, CUDA graphs included), one under cProfile (host functions, inflated by the profiling itself).

    python -m benchmarks.rollout_profile --shape 3b --sequences 128,32 --out profile.json
    python -m benchmarks.rollout_profile --sixteen-bit   # without quantisation and adapter
    python -m benchmarks.rollout_profile --variants '[{}, {"block_size": 64}]'   # vLLM's arguments, one engine each
    python -m benchmarks.rollout_profile --backends grpo,grpo-apart,flash_attn   # one engine each
    python -m benchmarks.rollout_profile --own-scheduler   # also by vLLM's own scheduler, in the same engine
"""

from __future__ import annotations

import argparse
import cProfile
import gzip
import json
import pstats
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import shared_model as shared
from benchmarks.common.decoding import choose
from benchmarks.common.processes import write_result
from benchmarks.common.random_model import RandomSource
from grpo.config.schema import Lora, Model
from grpo.model.base_weights import BaseWeights
from grpo.policy.policy import Policy
from grpo.rollout.engine import Engine, EngineSettings, Request, SamplingSettings

STEPS = slice(40, 72)
"""Decoding steps that are profiled: the prompts are through, no sequence has finished."""
FIRST_STEPS = 6
GROUP = 8
"""Completions that share a prompt."""


class VariedEngine(Engine):
    """An engine with some of vLLM's arguments replaced, which can do without our scheduler."""

    def __init__(self, *arguments: Any, replaced: dict[str, Any]):
        self.replaced = replaced
        super().__init__(*arguments)

    def _arguments(self) -> dict[str, Any]:
        return super()._arguments() | self.replaced

    def _params(self, *arguments: Any) -> Any:
        params = super()._params(*arguments)
        params.flat_logprobs = True  # the cheaper of vLLM's own two forms
        return params

    @contextmanager
    def by_vllms_scheduler(self) -> Iterator[None]:
        """Schedule and collect as vLLM does, logprobs in lists of its own."""
        scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler
        ours, manager = type(scheduler), scheduler.kv_cache_manager
        scheduler.__class__, scheduler.kv_cache_manager = ours.__mro__[1], manager._manager
        self._completion = lambda output: output  # type: ignore[method-assign]
        try:
            yield
        finally:
            scheduler.__class__, scheduler.kv_cache_manager = ours, manager
            del self._completion


def load_model(options: argparse.Namespace) -> tuple[BaseWeights, Policy | None]:
    device, dtype = torch.device(options.device), torch.bfloat16
    model = Model(name="random", load_in_4bit=not options.sixteen_bit)
    base = BaseWeights(RandomSource(options.shape, device), model, device=device, dtype=dtype)
    if options.sixteen_bit:
        return base, None
    policy = Policy(base, Lora(r=16, lora_alpha=32), seed=0)
    shared.randomize_adapter(policy)
    return base, policy


def start_engine(
    base: BaseWeights, policy: Policy | None, options: argparse.Namespace, replaced: dict[str, Any]
) -> VariedEngine:
    length = options.prompt_tokens + options.new_tokens
    backend = choose(replaced.get("backend", "auto"))
    replaced = {name: value for name, value in replaced.items() if name != "backend"}
    settings = EngineSettings(max_seq_length=length, max_num_seqs=max(options.sequences), attention_backend=backend)
    if options.graphs and base.device.type == "cuda":
        graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": sorted(options.sequences)}
        replaced = {"compilation_config": graphs, **replaced}
    return VariedEngine(base, policy, settings, replaced=replaced)


def rollout(engine: Engine, options: argparse.Namespace, count: int, at_step: Callable[[int], None], seed: int) -> None:
    """One rollout; `at_step` is called with the number of each engine step before it runs."""
    core, steps = engine.llm.llm_engine, 0
    original = core.step

    def counted() -> Any:
        nonlocal steps
        at_step(steps)
        steps += 1
        return original()

    core.step = counted
    try:
        requests = grouped_requests(engine.base.config.vocab_size, count, options.prompt_tokens, seed)
        for _ in engine.generate(requests, SamplingSettings(1.0, options.new_tokens)):
            pass
    finally:
        core.step = original


def grouped_requests(vocabulary: int, count: int, tokens: int, seed: int) -> list[Request]:
    """`count` requests of which GROUP neighbours share a random prompt."""
    prompts = shared.random_requests(vocabulary, -(-count // GROUP), tokens, seed)
    return [Request(number, prompts[number // GROUP].prompt_ids, seed * 10_000 + number) for number in range(count)]


def rollout_seconds(engine: Engine, options: argparse.Namespace, count: int) -> float:
    started = time.perf_counter()
    rollout(engine, options, count, lambda step: None, seed=14)
    shared.synchronize()
    return time.perf_counter() - started


def step_milliseconds(engine: Engine, options: argparse.Namespace, count: int) -> dict[str, Any]:
    """Wall time of one decoding step, and of the first ones, in which prompts are read."""
    marks: dict[int, float] = {}
    rollout(engine, options, count, lambda step: marks.update({step: time.perf_counter()}), seed=11)
    first = [round((marks[step + 1] - marks[step]) * 1e3, 2) for step in range(FIRST_STEPS)]
    one = (marks[STEPS.stop] - marks[STEPS.start]) * 1e3 / (STEPS.stop - STEPS.start)
    return {"step_ms": round(one, 3), "first_steps_ms": first}


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
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(f"{options.trace or Path(folder) / 'trace'}-{count}.json.gz")
        profiler.export_chrome_trace(str(trace))
        with gzip.open(trace, "rt") as file:
            events = json.load(file)["traceEvents"]
    return by_kernel(events, STEPS.stop - STEPS.start)


def by_kernel(events: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """Of a Chrome trace of `steps` steps: how long the GPU was busy in one, and with which kernels and grids."""
    microseconds: Counter[tuple[str, str]] = Counter()
    calls: Counter[tuple[str, str]] = Counter()
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            kernel = event["name"][:160], "x".join(map(str, event["args"].get("grid", ())))
            microseconds[kernel] += event["dur"] / steps
            calls[kernel] += 1
    table = [
        {"kernel": name, "grid": grid, "us": round(us, 1), "calls": round(calls[name, grid] / steps, 2)}
        for (name, grid), us in microseconds.most_common(60)
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


def examine(engine: VariedEngine, options: argparse.Namespace, count: int) -> dict[str, Any]:
    rollout(engine, options, count, lambda step: None, seed=10)
    entry = timed(engine, options, count)
    if options.own_scheduler:
        with engine.by_vllms_scheduler():
            entry["vllms_scheduler"] = timed(engine, options, count)
    if "kernels" in options.measure and torch.cuda.is_available():
        entry |= kernels(engine, options, count)
    if "host" in options.measure:
        entry["host"] = host(engine, options, count)
    return entry


def timed(engine: Engine, options: argparse.Namespace, count: int) -> dict[str, Any]:
    seconds = rollout_seconds(engine, options, count)
    return {
        "rollout_s": round(seconds, 3),
        "tokens_per_second": round(count * options.new_tokens / seconds),
        **step_milliseconds(engine, options, count),
    }


def print_entry(replaced: dict[str, Any], count: int, entry: dict[str, Any]) -> None:
    print(f"{json.dumps(replaced)} {count} sequences: rollout {entry['rollout_s']} s, "
          f"{entry['tokens_per_second']} tokens/s, {entry['step_ms']} ms a step at the start "
          f"(the first: {entry['first_steps_ms']}), "
          f"GPU busy {entry.get('busy_us', 0) / 1e3:.2f} ms")  # fmt: skip
    if own := entry.get("vllms_scheduler"):
        print(f"  by vLLM's own scheduler: rollout {own['rollout_s']} s, {own['step_ms']} ms a step")
    for row in entry.get("kernels", [])[:30]:
        print(f"  {row['us']:8.1f} us {row['calls']:7.2f}x  {row['grid']:12} {row['kernel'][:80]}")
    for row in entry.get("host", [])[:16]:
        print(f"  host {row['own_ms']:7.3f} ms own {row['all_ms']:8.3f} all {row['calls']:7.1f}x  {row['function']}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", default="3b")
    parser.add_argument("--sequences", default="128,32", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--sixteen-bit", action="store_true", help="the base as it is, without an adapter")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--variants", type=json.loads, default=[{}], help="JSON list of vLLM arguments to replace")
    parser.add_argument("--backends", type=lambda text: text.split(","), help="see benchmarks/common/decoding.py")
    parser.add_argument("--own-scheduler", action="store_true", help="compare with vLLM's own scheduler")
    parser.add_argument("--measure", default="kernels,host", type=lambda text: text.split(","))
    parser.add_argument("--graphs", action="store_true", help="capture only the sizes of --sequences: starts sooner")
    parser.add_argument("--trace", type=Path, help="also write Chrome traces, PATH-<sequences>.json.gz")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.backends:
        options.variants = [{**each, "backend": backend} for backend in options.backends for each in options.variants]
    base, policy = load_model(options)
    found: dict[str, Any] = {"benchmark": "rollout_profile", "shape": options.shape, "variants": []}
    for replaced in options.variants:
        engine = start_engine(base, policy, options, replaced)
        entries = {count: examine(engine, options, count) for count in options.sequences}
        found["variants"].append({"replaced": replaced, "sequences": entries})
        write_result(options.out, found)
        for count, entry in entries.items():
            print_entry(replaced, count, entry)
        engine.close()
        del engine
    short = [[v["replaced"], {n: e["rollout_s"] for n, e in v["sequences"].items()}] for v in found["variants"]]
    print(json.dumps({"benchmark": "rollout_profile", "shape": options.shape, "rollout_s": short}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
