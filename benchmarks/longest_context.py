"""The longest sequence that one GPU trains on, measured: one whole forward, backward and optimiser step.

Random weights of Llama-3.1-8B's shape in NF4, LoRA of rank 32 on all seven projections, batch 1, every token in the
loss, layers recomputed with their inputs in host memory. Each cap is a limit on what torch may reserve
(`set_per_process_memory_fraction`), in GB of 10^9 bytes; `whole`, or 0, is the whole card. Under a cap the lengths
named with it are measured and then, with --search, the longest that the memory plan gives it, and halves of what is
left. A row's `fits` says whether the length was reached: true when the step ran to its end, false with a `reason` when
torch had no memory left under the cap. Where the process ended instead, out of host memory or time, there is no `fits`,
and `failed` says how.

    python -m benchmarks.longest_context --caps 8:4458,12:32772,16:61086,24:117713 --out results.json
    python -m benchmarks.longest_context --caps 24:117713,24:156950,34:191728+200000,whole:342733

Prints a table; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
from benchmarks.common import rows
from benchmarks.common.rows import Job, Row

if TYPE_CHECKING:
    import torch

    from grpo.training.learner import Learner

UNSLOTH = {8: 2_972, 12: 21_848, 16: 40_724, 24: 78_475, 40: 153_977, 48: 191_728, 80: 342_733}
"""Unsloth's published table for this model, rank and batch: GB -> tokens. Not measured here."""
PROMPT = 1
"""Tokens without a loss: the first has nothing to be predicted from."""
LONGEST = 1 << 21
"""No search goes beyond."""


def parse_caps(text: str) -> list[tuple[float, list[int]]]:
    """ "8:4458+5000,8:6000,whole:342733" -> [(8, [4458, 5000]), (8, [6000]), (0, [342733])]."""
    pairs = (part.partition(":") for part in rows.words(text))
    return [
        (0.0 if cap == "whole" else float(cap), [int(length) for length in lengths.split("+") if length])
        for cap, _, lengths in pairs
    ]


def job_of(options: argparse.Namespace) -> Job:
    """Every row, for one process: weights are loaded once. "search" numbers the rows whose length is not known yet."""
    job: Job = []
    for cap, lengths in options.caps:
        job += [{"cap_gb": cap, "tokens": length} for length in lengths]
    for cap in dict.fromkeys(cap for cap, _ in options.caps if cap and options.device != "cpu"):
        job += [{"cap_gb": cap, "search": number} for number in range(1, options.search + 1)]
    return job


def measurer(options: argparse.Namespace) -> Callable[[Row], Row]:
    import torch

    from benchmarks.common import training_step as steps

    started = time.perf_counter()
    longest = max([length for _, lengths in options.caps for length in lengths], default=LONGEST)
    config = steps.step_config(
        rank=options.rank, tokens=1024, prompt=PROMPT, completion=longest, optim=options.optim,
        gradient_checkpointing=options.form, logprob_chunk_tokens=options.chunk,
    )  # fmt: skip
    device = torch.device(options.device)
    base = steps.load(options.shape, device, offload_embedding=options.offload_embedding)
    learner = steps.learner_of(base, config)
    steps.warm_up(learner)
    print(f"loaded and warm after {time.perf_counter() - started:.0f} s", flush=True)
    searches: dict[float, Search] = {}

    def measure(row: Row) -> Row:
        cap = row["cap_gb"]
        limit(cap, device)
        if "tokens" in row:
            return step(learner, row["tokens"], options.form)
        search = searches.setdefault(cap, Search(planned_length(learner, cap, options.form)))
        figures = step(learner, search.length, options.form)
        search.note(figures["fits"])
        return figures

    return measure


def limit(cap: float, device: torch.device) -> None:
    """Let torch reserve no more than `cap` GB; 0 lifts the limit."""
    import torch

    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        share = min(1.0, cap * 1e9 / total) if cap else 1.0
        torch.cuda.set_per_process_memory_fraction(share, torch.cuda.current_device())


def step(learner: Learner, length: int, mode: str) -> Row:
    """One step on a sequence of `length` tokens, whether it has the memory or not."""
    from benchmarks.common import training_step as steps

    sequence = steps.sequence_of(learner.policy.base, PROMPT, length)
    planned = {"tokens": length, "predicted": steps.predicted_peak(learner, [sequence], mode)}
    rows.tell(planned)
    return planned | steps.measured_step(learner, [sequence])


def planned_length(learner: Learner, cap: float, mode: str) -> int:
    """The longest sequence whose predicted peak is within the cap, to 64 tokens."""
    from benchmarks.common import training_step as steps

    low, high = 0, LONGEST
    while high - low > 64:
        middle = (low + high) // 2
        fits = steps.predicted_bytes(learner, middle, middle, middle, mode) <= cap * 1e9
        low, high = (middle, high) if fits else (low, middle)
    return low


class Search:
    """`length` is the next to try: the planned one, then halves of the interval between what fits and what does not."""

    def __init__(self, length: int):
        self.length, self.fitting, self.failing = length, 0, 0

    def note(self, fits: bool) -> None:
        if fits:
            self.fitting = self.length
        else:
            self.failing = self.length
        if self.fitting and self.failing:
            self.length = (self.fitting + self.failing) // 2
        else:
            self.length = int(self.length * (1.04 if fits else 0.96))


def line(row: Row) -> str:
    cap = f"{row['cap_gb']:5g} GB" if row["cap_gb"] else f"{'whole':>8}"
    name = f"{cap} {row['tokens']:9,} tokens:"
    if not row["fits"]:
        return f"{name} planned {row['predicted'] / 1e9:6.2f} GB, does not fit: {row['reason'][:90]}"
    if row["max_allocated"] is None:
        return f"{name} {row['seconds']:7.1f} s, memory not measured"
    return (
        f"{name} {row['seconds']:7.1f} s, allocated {row['max_allocated'] / 1e9:6.2f}, reserved "
        f"{row['max_reserved'] / 1e9:6.2f}, device {row['device_used'] / 1e9:6.2f}, planned "
        f"{row['predicted'] / 1e9:6.2f} GB"
    )


def main() -> int:
    parser = rows.parser(__doc__, rank=32, chunk=256, budget=math.inf)
    rows.add_step(parser, form="offload")
    parser.add_argument("--caps", type=parse_caps, default=parse_caps("8:4458,12:32772,16:61086,24:117713"))
    parser.add_argument("--search", type=int, default=0, help="lengths to try at each cap beyond those named")
    parser.add_argument("--shape", default="8b")
    parser.add_argument("--offload-embedding", action="store_true", help="model.offload_embedding")
    options = parser.parse_args()
    if options.tiny:
        options.shape, options.device, options.rank = "tiny", "cpu", 4
        options.caps = [(1.0, [40, 80]), (0.0, [40])]
    started = time.perf_counter()

    def conclude(_: list[Row]) -> Row:
        return {
            "benchmark": "longest_context", "shape": options.shape, "rank": options.rank, "optim": options.optim,
            "gradient_checkpointing": options.form, "logprob_chunk_tokens": options.chunk,
            "offload_embedding": options.offload_embedding, "unsloth_published": UNSLOTH,
            "seconds": round(time.perf_counter() - started, 1),
        }  # fmt: skip

    return rows.run(options, [job_of(options)], measurer, line, conclude)


if __name__ == "__main__":
    sys.exit(main())
