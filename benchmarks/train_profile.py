"""Where the time of one training micro-batch goes: kernels by total time, and the host's share.

Groups of 8 completions after a prompt that they share, random NF4 weights, LoRA of rank 16 on all linears: forward
and backward of a weighted sum of logprobs. For every form of recomputation: wall time of a micro-batch, time that the
GPU is busy in it, launches, and the kernels by name. No optimiser step.

    python -m benchmarks.train_profile --shape 3b --groups 7,1 --out /tmp/train_profile.json
    python -m benchmarks.train_profile --tiny
"""

from __future__ import annotations

import argparse
import cProfile
import io
import json
import pstats
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.common.processes import write_result
from benchmarks.common.random_model import SHAPES
from benchmarks.common.timing import free_memory, milliseconds, tried
from benchmarks.train_step import load_base, our_policy, random_tokens
from grpo.policy.policy import Policy

GROUP = 8


def micro_batch(policy: Policy, groups: int, options: argparse.Namespace) -> Any:
    """A function that runs forward and backward of one, and how many tokens go through the layers."""
    vocabulary = policy.base.config.vocab_size
    prompts = [prompt for prompt in random_tokens(vocabulary, groups, options.prompt, 1) for _ in range(GROUP)]
    completions = random_tokens(vocabulary, groups * GROUP, options.completion, 2)

    def step() -> None:
        scored = policy.score(prompts, completions, temperature=1.0, chunk_tokens=options.chunk)
        weights = torch.linspace(-1, 1, len(scored.logprobs), device=scored.logprobs.device)
        (scored.logprobs * weights).mean().backward()
        for parameter in policy.parameters():
            parameter.grad = None

    return step, groups * (options.prompt + GROUP * (options.completion - 1))


def kernel_table(step: Any, gpu: bool) -> dict[str, Any]:
    """GPU time by kernel, in milliseconds, of one call."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities) as profiler:
        step()
        if gpu:
            torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    launches = 0
    for event in profiler.events():
        if event.name in ("cudaLaunchKernel", "cuLaunchKernel", "cuLaunchKernelEx", "cudaLaunchKernelExC"):
            launches += 1
        on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
        if on_gpu == gpu and not getattr(event, "is_user_annotation", False):
            entry = found.setdefault(event.name, [0, 0.0])
            entry[0] += 1
            entry[1] += (event.device_time_total if gpu else event.cpu_time_total) / 1e3
    ordered = sorted(found.items(), key=lambda item: -item[1][1])
    return {
        "busy_ms": round(sum(value[1] for value in found.values()), 2),
        "launches": launches,
        "kernels": [[name[:160], count, round(ms, 3)] for name, (count, ms) in ordered[:60]],
    }


def measured(base: Any, form: str, groups: int, options: argparse.Namespace) -> dict[str, Any]:
    gpu = options.device == "cuda"
    policy = our_policy(base, f"triton/{form}", options.rank)
    step, tokens = micro_batch(policy, groups, options)
    step()
    if gpu:
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    times = milliseconds(step, options.repeats, warmup=1)
    found = {"tokens": tokens, "ms": round(statistics.median(times), 2), "range_ms": [min(times), max(times)]}
    if gpu:
        found["adds_gib"] = round((torch.cuda.max_memory_allocated() - held) / 2**30, 2)
    return found | kernel_table(step, gpu)


def host(base: Any, form: str, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a micro-batch so small that the GPU waits for launches, and where the host spends them."""
    few = argparse.Namespace(**{**vars(options), "prompt": 16, "completion": 9})
    step, tokens = micro_batch(our_policy(base, f"triton/{form}", options.rank), 1, few)
    step()
    median = statistics.median(milliseconds(step, options.repeats, warmup=1))
    profiler = cProfile.Profile()
    with torch.autograd.set_multithreading_enabled(False):  # a profiler sees its own thread alone
        profiler.runcall(step)
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(45)
    return {"tokens": tokens, "ms": round(median, 2), "host": text.getvalue().splitlines()}


def show(name: str, found: dict[str, Any]) -> None:
    if "error" in found:
        print(f"{name}: {found['error']}", flush=True)
        return
    print(
        f"{name}: {found['tokens']} tokens, {found['ms']:.1f} ms, busy {found['busy_ms']:.1f}, "
        f"{found['launches']} launches, adds {found.get('adds_gib')} GiB",
        flush=True,
    )
    for kernel, count, ms in found["kernels"][:25]:
        print(f"    {ms:9.2f} ms {count:6}  {kernel[:100]}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="3b")
    parser.add_argument("--forms", default="none,mlp", type=lambda text: text.split(","))
    parser.add_argument("--groups", default="7,1", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--completion", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--chunk", type=int, default=2048, help="train.logprob_chunk_tokens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a small model on a CPU: tries the script")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.device = "cuda"
    if options.tiny:
        options.shape, options.device, options.prompt, options.completion, options.groups = "tiny", "cpu", 16, 8, [1]
    base = load_base(options)
    result: dict[str, Any] = {"benchmark": "train_profile", "shape": options.shape, "forms": {}}
    found = tried(lambda: host(base, "none", options))
    result["host"] = found
    print("host", found.get("ms"), *found.get("host", [found.get("error")]), sep="\n", flush=True)
    for groups in options.groups:
        for form in options.forms:
            name = f"{form}, {groups} groups"
            found = tried(lambda form=form, groups=groups: measured(base, form, groups, options))
            result["forms"][name] = found
            show(name, found)
            write_result(options.out, result)
            free_memory()
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
