"""The peak of a short optimiser step from 3B to 70B parameters, measured against Unsloth's table of requirements.

Random NF4 weights, LoRA of rank 16 on all seven projections, one prompt with `--generations` completions in one
micro-batch. The figure is torch's `max_memory_allocated` over the step, weights included and vLLM not started; what
the driver counts is beside it. Shapes whose output head is a matrix of its own are measured twice, the second time with
`model.offload_embedding`. One after another, each in a process of its own.

    python benchmarks/short_context_memory.py --shapes 3b,8b,14b,32b,70b --out results.json
    python benchmarks/short_context_memory.py --shapes 70b --offload-embedding yes

Prints a table; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.processes import report, rows_of, write_result

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
    offloads = options.offload_embedding == "yes"
    learner = steps.learner_of(steps.load(shape, device, offload_embedding=offloads), config)
    loaded = time.perf_counter() - started
    steps.warm_up(learner)
    first = steps.sequence_of(learner.policy.base, prompt, completion, seed=1)
    group = [steps.sequence_of(learner.policy.base, prompt, completion, seed) for seed in range(options.generations)]
    for sequence in group:
        sequence.prompt_ids = first.prompt_ids
    row = {"shape": shape, "offload_embedding": offloads, "tokens": tokens, "load_seconds": round(loaded, 1)}
    row |= steps.measured_step(learner, group)
    row |= {"predicted": steps.predicted_peak(learner, group, options.form)}
    base = learner.policy.base
    return {**row, "weights": base.nbytes(), "on_host": base.host_nbytes(), "unsloth_gb": UNSLOTH.get(shape)}


def show(row: dict[str, Any]) -> None:
    name = f"{row['shape']:5} {'embedding on the host' if row['offload_embedding'] else '':21}"
    if not row.get("max_allocated"):
        print(f"{name} {row.get('error') or row.get('reason') or 'memory not measured on a CPU'}", flush=True)
        return
    print(
        f"{name} {row['tokens']:6,} tokens: allocated {row['max_allocated'] / 1e9:6.2f} GB (weights "
        f"{row['weights'] / 1e9:6.2f}, planned {row['predicted'] / 1e9:6.2f}), device {row['device_used'] / 1e9:6.2f}; "
        f"Unsloth {row['unsloth_gb']:g}; {row['seconds']:.2f} s, loaded in {row['load_seconds']:.0f} s",
        flush=True,
    )


def variants(shapes: list[str], offload_embedding: str) -> list[tuple[str, str]]:
    """(shape, "no" or "yes"), without what `offload_embedding` leaves out and what a tied head forbids."""
    from benchmarks.random_model import SHAPES

    wanted = ["no", "yes"] if offload_embedding == "both" else [offload_embedding]
    return [(s, way) for s in shapes for way in wanted if way == "no" or not SHAPES[s]["tie_word_embeddings"]]


def measure_in_process(shape: str, offload_embedding: str, left: float) -> dict[str, Any]:
    """What this script reports for one shape, or {"error": ...}."""
    # Of an option given twice the last counts.
    chosen = ["--one", shape, "--offload-embedding", offload_embedding]
    rows, failed = rows_of([sys.executable, __file__, *sys.argv[1:], *chosen], left)
    row = {"shape": shape, "offload_embedding": offload_embedding == "yes"}
    return {**row, "error": failed} if failed else rows[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shapes", default="3b,8b,14b,32b,70b", type=lambda text: text.split(","))
    parser.add_argument("--one", help="measure this shape here, and print its JSON")
    parser.add_argument("--offload-embedding", default="both", choices=("no", "yes", "both"))
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
        options.shapes, options.device, options.rank = ["tiny", "tiny_untied"], "cpu", 4
    if options.one:
        report(measure(options.one, options))
        return 0
    settings = {k: v for k, v in vars(options).items() if k not in ("shapes", "one", "out", "budget")}
    result: dict[str, Any] = {"benchmark": "short_context_memory", **settings, "rows": []}
    ends = time.monotonic() + options.budget
    for shape, offload_embedding in variants(options.shapes, options.offload_embedding):
        result["rows"].append(measure_in_process(shape, offload_embedding, ends - time.monotonic()))
        show(result["rows"][-1])
        write_result(options.out, result)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
