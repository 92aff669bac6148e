"""The longest sequence that one GPU trains on, measured: one whole forward, backward and optimiser step.

Random weights of Llama-3.1-8B's shape in NF4, LoRA of rank 32 on all seven projections, batch 1, every token in the
loss, layers recomputed with their inputs in host memory. Each cap is a limit on what torch may reserve
(`set_per_process_memory_fraction`), in GB of 10^9 bytes; 0 is the whole card. A cap's lengths are the ones named with
it, then, with --search, the longest that the memory plan gives it, and halves of what is left.

    python benchmarks/longest_context.py --caps 8:4458,12:32772,16:61086,24:117713 --out results.json
    python benchmarks/longest_context.py --caps 28:153977,34:191728,55:342733

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

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import training_step as steps
from benchmarks.processes import write_result
from grpo.learner import Learner

UNSLOTH = {8: 2_972, 12: 21_848, 16: 40_724, 24: 78_475, 40: 153_977, 48: 191_728, 80: 342_733}
"""Unsloth's published table for this model, rank and batch: GB -> tokens. Not measured here."""
PROMPT = 1
"""Tokens without a loss: the first has nothing to be predicted from."""


def parse_caps(text: str) -> dict[float, list[int]]:
    """ "8:4458+5000,0:342733" -> {8: [4458, 5000], 0: [342733]}."""
    pairs = (part.partition(":") for part in text.split(","))
    return {float(cap): [int(length) for length in lengths.split("+") if length] for cap, _, lengths in pairs}


def limit(cap: float, device: torch.device) -> None:
    """Let torch reserve no more than `cap` GB; 0 lifts the limit."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        share = min(1.0, cap * 1e9 / total) if cap else 1.0
        torch.cuda.set_per_process_memory_fraction(share, torch.cuda.current_device())


def measure(learner: Learner, cap: float, length: int, form: str) -> dict[str, Any]:
    """One step on a sequence of `length` tokens under the cap."""
    sequence = steps.sequence_of(learner.policy.base, PROMPT, length)
    row: dict[str, Any] = {"cap_gb": cap, "tokens": length}
    try:
        row |= steps.measured_step(learner, [sequence])
    except Exception as error:  # pinned host memory, above all: it costs this row, not the next
        row |= {"fits": False, "reason": f"{type(error).__name__}: {error}"[:300]}
    return {**row, "predicted": steps.predicted_peak(learner, [sequence], form)}


def planned_length(learner: Learner, cap: float, form: str) -> int:
    """The longest sequence whose predicted peak is within the cap, to 64 tokens."""
    low, high = 0, 1 << 21
    while high - low > 64:
        middle = (low + high) // 2
        fits = steps.predicted_bytes(learner, middle, middle, middle, form) <= cap * 1e9
        low, high = (middle, high) if fits else (low, middle)
    return low


def search(learner: Learner, cap: float, form: str, tries: int, rows: list[dict[str, Any]]) -> None:
    """Start at the planned length, then halve the interval between what fits and what does not."""
    bounds = [0, 0]
    length = planned_length(learner, cap, form)
    for _ in range(tries):
        rows.append(show(measure(learner, cap, length, form)))
        bounds[0 if rows[-1]["fits"] else 1] = length
        fitting, failing = bounds
        length = (fitting + failing) // 2 if failing else int(fitting * 1.04)
        length = length if fitting else int(failing * 0.96)


def show(row: dict[str, Any]) -> dict[str, Any]:
    if not row["fits"]:
        print(
            f"{row['cap_gb']:5g} GB {row['tokens']:9,} tokens: planned {row['predicted'] / 1e9:6.2f} GB, "
            f"does not fit: {row['reason'][:90]}"
        )
    elif row["max_allocated"] is None:
        print(f"{row['cap_gb']:5g} GB {row['tokens']:9,} tokens: {row['seconds']:7.1f} s, memory not measured")
    else:
        print(
            f"{row['cap_gb']:5g} GB {row['tokens']:9,} tokens: {row['seconds']:7.1f} s, allocated "
            f"{row['max_allocated'] / 1e9:6.2f}, reserved {row['max_reserved'] / 1e9:6.2f}, device "
            f"{row['device_used'] / 1e9:6.2f}, planned {row['predicted'] / 1e9:6.2f} GB"
        )
    sys.stdout.flush()
    return row


def run(options: argparse.Namespace) -> dict[str, Any]:
    started = time.perf_counter()
    device = torch.device(options.device)
    longest = max([length for lengths in options.caps.values() for length in lengths], default=1 << 21)
    config = steps.step_config(
        rank=options.rank, tokens=1024, prompt=PROMPT, completion=longest, optim=options.optim,
        gradient_checkpointing=options.form, logprob_chunk_tokens=options.chunk,
    )  # fmt: skip
    base = steps.load(options.shape, device, offload_embedding=options.offload_embedding)
    learner = steps.learner_of(base, config)
    steps.warm_up(learner)
    rows: list[dict[str, Any]] = []
    result = {
        "benchmark": "longest_context", "shape": options.shape, "rank": options.rank, "optim": options.optim,
        "gradient_checkpointing": options.form, "logprob_chunk_tokens": options.chunk, "rows": rows,
        "offload_embedding": options.offload_embedding,
        "unsloth_published": UNSLOTH,
    }  # fmt: skip
    print(f"loaded and warm after {time.perf_counter() - started:.0f} s", flush=True)
    for cap, lengths in options.caps.items():
        limit(cap, device)
        for length in lengths:
            rows.append(show(measure(learner, cap, length, options.form)))
            write_result(options.out, result)
        if options.search and cap and device.type == "cuda":
            search(learner, cap, options.form, options.search, rows)
            write_result(options.out, result)
    result["seconds"] = round(time.perf_counter() - started, 1)
    write_result(options.out, result)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--caps", type=parse_caps, default=parse_caps("8:4458,12:32772,16:61086,24:117713"))
    parser.add_argument("--search", type=int, default=0, help="lengths to try at each cap beyond those named")
    parser.add_argument("--shape", default="8b")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--optim", default="adamw_8bit")
    parser.add_argument("--form", default="offload", choices=("none", "mlp", "layer", "offload"))
    parser.add_argument("--chunk", type=int, default=256, help="tokens whose logits exist at once")
    parser.add_argument("--offload-embedding", action="store_true", help="model.offload_embedding")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU: tries the script")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.tiny:
        options.shape, options.device, options.rank = "tiny", "cpu", 4
        options.caps = {1.0: [40, 80]}
    print(json.dumps(run(options)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
