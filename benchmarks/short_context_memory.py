"""The peak of a short optimiser step from 3B to 70B parameters, measured against Unsloth's table of requirements.

Random NF4 weights, LoRA of rank 16 on all seven projections, one prompt with `--generations` completions in one
micro-batch. The figure is torch's `max_memory_allocated` over the step, weights included and vLLM not started; what
the driver counts is beside it. Shapes whose output head is a matrix of its own are measured twice, the second time with
`model.offload_embedding`; `--offload-head yes` adds `model.offload_head` to every row.

    python -m benchmarks.short_context_memory --shapes 3b,8b,14b,32b,70b --out results.json
    python -m benchmarks.short_context_memory --shapes 70b --offload-embedding yes --offload-head yes

Prints a table; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
from benchmarks.common import rows
from benchmarks.common.rows import Row

UNSLOTH = {"3b": 3.5, "8b": 6.0, "14b": 8.5, "32b": 26.0, "70b": 41.0}
"""Unsloth's table of GB for QLoRA, by size; the bar of a row. Published, not measured here."""
OFFLOADED = {"offload_embedding": "embedding", "offload_head": "head"}
"""Key of a row and of `[model]` -> what is then in host memory."""


def variants(shapes: list[str], offload_embedding: str, offload_head: str) -> list[Row]:
    """What identifies a row, without what `offload_embedding` leaves out and what a tied head forbids.

    A tied table is embedding and head at once, and goes to the host as the head.
    """
    from benchmarks.common.random_model import SHAPES

    ways = [False, True] if offload_embedding == "both" else [offload_embedding == "yes"]
    head = {"offload_head": True} if offload_head == "yes" else {}
    return [
        {"shape": shape, "offload_embedding": way, **head}
        for shape in shapes
        for way in ways
        if not (way and SHAPES[shape]["tie_word_embeddings"])
    ]


def measurer(options: argparse.Namespace) -> Callable[[Row], Row]:
    """One step in this process."""
    import torch

    from benchmarks.common import training_step as steps

    def measure(row: Row) -> Row:
        started = time.perf_counter()
        prompt, completion = options.prompt_tokens, options.completion_tokens
        tokens = prompt + options.generations * (completion - 1)
        offloaded = {key: True for key in OFFLOADED if row.get(key)}
        config = steps.step_config(
            rank=options.rank, tokens=tokens, prompt=prompt, completion=completion, model=offloaded,
            optim=options.optim, gradient_checkpointing=options.form, logprob_chunk_tokens=options.chunk,
        )  # fmt: skip
        base = steps.load(row["shape"], torch.device(options.device), **offloaded)
        learner = steps.learner_of(base, config)
        loaded = {"tokens": tokens, "load_seconds": round(time.perf_counter() - started, 1)}
        steps.warm_up(learner)
        group = [steps.sequence_of(base, prompt, completion, seed) for seed in range(options.generations)]
        for sequence in group:
            sequence.prompt_ids = group[0].prompt_ids
        figures = steps.measured_step(learner, group)
        predicted = steps.predicted_peak(learner, group, options.form)
        sizes = {"weights": base.nbytes(), "on_host": base.host_nbytes()}
        return loaded | figures | {"predicted": predicted} | sizes | judged(row["shape"], figures)

    return measure


def judged(shape: str, figures: Row) -> Row:
    """The bar of the shape, if it has one, and whether it holds where that was measured."""
    row: Row = {"unsloth_gb": UNSLOTH.get(shape)}
    if row["unsloth_gb"] and not figures["fits"]:
        row["holds"] = False
    elif row["unsloth_gb"] and figures["max_allocated"]:
        row["holds"] = figures["max_allocated"] <= row["unsloth_gb"] * 1e9
    return row


def line(row: Row) -> str:
    on_host = " and ".join(what for key, what in OFFLOADED.items() if row.get(key))
    name = f"{row['shape']:5} {on_host and on_host + ' on the host':30}"
    if not row.get("max_allocated"):
        return f"{name} {row.get('reason') or 'memory not measured on a CPU'}"
    return (
        f"{name} {row['tokens']:6,} tokens: allocated {row['max_allocated'] / 1e9:6.2f} GB (weights "
        f"{row['weights'] / 1e9:6.2f}, planned {row['predicted'] / 1e9:6.2f}), device {row['device_used'] / 1e9:6.2f}; "
        f"Unsloth {row['unsloth_gb']:g}; {row['seconds']:.2f} s, loaded in {row['load_seconds']:.0f} s"
    )


def main() -> int:
    parser = rows.parser(__doc__, rank=16, chunk=128)
    rows.add_step(parser, form="layer")
    parser.add_argument("--shapes", default="3b,8b,14b,32b,70b", type=rows.words)
    parser.add_argument("--offload-embedding", default="both", choices=("no", "yes", "both"))
    parser.add_argument("--offload-head", default="no", choices=("no", "yes"))
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--completion-tokens", type=int, default=128)
    parser.add_argument("--generations", type=int, default=4)
    options = parser.parse_args()
    if options.tiny:
        options.shapes, options.device, options.rank = ["tiny", "tiny_untied"], "cpu", 4

    def conclude(_: list[Row]) -> dict[str, Any]:
        return {"benchmark": "short_context_memory", **rows.settings(options, "shapes")}

    jobs = [[row] for row in variants(options.shapes, options.offload_embedding, options.offload_head)]
    return rows.run(options, jobs, measurer, line, conclude)


if __name__ == "__main__":
    sys.exit(main())
