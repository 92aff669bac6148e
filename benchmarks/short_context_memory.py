"""The peak of a short optimiser step from 3B to 70B parameters, measured against Unsloth's table of requirements.

Random NF4 weights, LoRA of rank 16 on all seven projections, one prompt with `--generations` completions in one
micro-batch. The figure is torch's `max_memory_allocated` over the step, weights included and vLLM not started; what
the driver counts is beside it. Shapes run one after another, each in a process of its own.

    python benchmarks/short_context_memory.py --shapes 3b,8b,14b,32b,70b --out results.json

Prints a table; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

UNSLOTH = {"3b": 3.5, "8b": 6.0, "14b": 8.5, "32b": 26.0, "70b": 41.0}
"""Unsloth's table of GB for QLoRA, by size. Published, not measured here."""


def measure(shape: str, options: argparse.Namespace) -> dict[str, Any]:
    """One step in this process."""
    import torch

    from benchmarks import training_step as steps

    started = time.perf_counter()
    device = torch.device(options.device)
    prompt, completion = options.prompt_tokens, options.completion_tokens
    tokens = prompt + options.generations * (completion - 1)
    config = steps.step_config(
        rank=options.rank, tokens=tokens, prompt=prompt, completion=completion, optim=options.optim,
        gradient_checkpointing=options.form, logprob_chunk_tokens=options.chunk,
    )  # fmt: skip
    learner = steps.learner_of(steps.load(shape, device), config)
    loaded = time.perf_counter() - started
    steps.warm_up(learner)
    first = steps.sequence_of(learner.policy.base, prompt, completion, seed=1)
    group = [steps.sequence_of(learner.policy.base, prompt, completion, seed) for seed in range(options.generations)]
    for sequence in group:
        sequence.prompt_ids = first.prompt_ids
    row = {"shape": shape, "tokens": tokens, "load_seconds": round(loaded, 1), **steps.measured_step(learner, group)}
    row |= {"predicted": steps.predicted_peak(learner, group, options.form)}
    return {**row, "weights": learner.policy.base.nbytes(), "unsloth_gb": UNSLOTH.get(shape)}


def show(row: dict[str, Any]) -> None:
    if not row.get("max_allocated"):
        print(f"{row['shape']:5} {row.get('error') or row.get('reason') or 'memory not measured on a CPU'}", flush=True)
        return
    print(
        f"{row['shape']:5} {row['tokens']:6,} tokens: allocated {row['max_allocated'] / 1e9:6.2f} GB (weights "
        f"{row['weights'] / 1e9:6.2f}, planned {row['predicted'] / 1e9:6.2f}), device {row['device_used'] / 1e9:6.2f}; "
        f"Unsloth {row['unsloth_gb']:g}; {row['seconds']:.2f} s, loaded in {row['load_seconds']:.0f} s",
        flush=True,
    )


def measure_in_process(shape: str, options: argparse.Namespace, left: float) -> dict[str, Any]:
    """The JSON that this script prints for one shape, or {"error": ...}."""
    passed = [a for a in sys.argv[1:] if not a.startswith(("--shapes", "--out", "--budget"))]
    for name in ("--shapes", "--out", "--budget"):
        if name in sys.argv[1:]:
            passed.remove(sys.argv[sys.argv.index(name) + 1])
    command = [sys.executable, __file__, *passed, "--one", shape]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(left, 1))
    except subprocess.TimeoutExpired:
        return {"shape": shape, "error": "no time left"}
    if done.returncode:
        return {"shape": shape, "error": done.stderr.strip()[-400:]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shapes", default="3b,8b,14b,32b,70b", type=lambda text: text.split(","))
    parser.add_argument("--one", help="measure this shape here, and print its JSON")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--optim", default="adamw_8bit")
    parser.add_argument("--form", default="layer", choices=("none", "mlp", "layer", "offload"))
    parser.add_argument("--chunk", type=int, default=128, help="tokens whose logits exist at once")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--completion-tokens", type=int, default=128)
    parser.add_argument("--generations", type=int, default=4)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--budget", type=float, default=560, help="seconds for everything")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU: tries the script")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.tiny:
        options.shapes, options.device, options.rank = ["tiny"], "cpu", 4
    if options.one:
        print(json.dumps(measure(options.one, options)))
        return 0
    from grpo.environment import hardware, versions

    ends = time.monotonic() + options.budget
    rows = []
    for shape in options.shapes:
        rows.append(measure_in_process(shape, options, ends - time.monotonic()))
        show(rows[-1])
    settings = {k: v for k, v in vars(options).items() if k not in ("shapes", "one", "out", "budget")}
    result = {"benchmark": "short_context_memory", **settings, "rows": rows}
    result |= {"hardware": hardware(), "versions": versions()}
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
