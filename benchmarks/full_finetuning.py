"""The memory plan of training all weights against what is measured, for models on the cards that they should fit.

Random weights in bfloat16. For each shape and card the form of the weights' update and the gradient checkpointing are
those that the plan chooses on a card of that size, beside a KV cache as it plans it; the GPU that measures may be
larger.
Two micro-batches of the largest size, so that gradients of the first lie there while the second is computed, then
clipping and a step of the optimiser. Compared is torch's `max_memory_allocated` with the plan's weights, optimiser,
gradients and activations; vLLM is not started, and what the plan gives it is added for the total.

    python -m benchmarks.full_finetuning --rows 0.5b:8,1.5b:24,3b:48,8b:80 --out benchmarks/results/full_finetuning.json

Prints a line a row; the last line is one JSON object. Whole steps with vLLM beside TRL's: whole_step.py
--full-finetuning.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.common import rows
from benchmarks.common.rows import Job, Row

BAR = 0.05
"""Relative error that the plan may have."""


def jobs_of(options: argparse.Namespace) -> list[Job]:
    """A process for every row."""
    pairs = (text.split(":") for text in options.rows)
    return [[{"shape": shape, "card_gb": float(card), "optim": options.optim}] for shape, card in pairs]


def config_of(row: Row, options: argparse.Namespace) -> Any:
    """A run of all weights with micro-batches of `options.tokens`."""
    from grpo.config.schema import parse_config

    half = options.length // 2
    return parse_config(
        {
            "model": {"name": "random", "full_finetuning": True, "dtype": "bfloat16"},
            "task": {"name": "arithmetic"},
            "rollout": {"max_prompt_length": half, "max_completion_length": half, "release_kv_cache": True},
            "train": {
                "max_steps": 10, "tokens_per_micro_batch": options.tokens, "optim": row["optim"],
                "logprob_chunk_tokens": options.chunk, "max_mismatch_kl": "none",
            },
        }
    )  # fmt: skip


def measurer(options: argparse.Namespace) -> Callable[[Row], Row]:
    import torch

    from benchmarks.common import training_step as steps
    from benchmarks.common.random_model import RandomSource
    from grpo.memory.fit import CONTEXT, best_fit, usable_bytes, with_weight_update
    from grpo.memory.plan import plan_memory
    from grpo.model.base_weights import BaseWeights
    from grpo.policy.full_policy import FullPolicy

    device = torch.device(options.device)

    def measure(row: Row) -> Row:
        source, card = RandomSource(row["shape"], device), int(row["card_gb"] * 1e9)
        steps.free_cached(device)
        config = with_weight_update(config_of(row, options), source.config, 2, (card - CONTEXT, card))
        plan = plan_memory(config, source.config, 2, on_gpu=True)
        fit = best_fit(config, source.config, 2, plan, usable_bytes(card - CONTEXT, card), None)
        mode = fit.mode if fit else plan.mode
        training = {"gradient_checkpointing": mode if device.type == "cuda" else "layer"}
        config = config.model_copy(update={"train": config.train.model_copy(update=training)})
        predicted = plan.weights + plan.adapter + plan.peaks[mode]
        figures: Row = {
            "weight_update": config.train.weight_update, "mode": mode, "fits_card": fit is not None,
            "planned_total": plan.peak(fit.kv_cache, mode) if fit else None, "weights": plan.weights,
            "update": plan.adapter, "training": plan.peaks[mode], "predicted": predicted,
        }  # fmt: skip
        base = BaseWeights(source, config.model, device=device, dtype=torch.bfloat16)
        learner = steps.learner_of(base, config, FullPolicy(base, kernels=config.train.kernels))
        half = options.length // 2
        one = [steps.sequence_of(base, half, half, seed) for seed in range(options.tokens // (2 * half - 1))]
        steps.step(learner, one[:1])
        measured = steps.measured_step(learner, [*one, *one])
        return judged(figures | measured | optimizer_seconds(learner))

    return measure


def optimizer_seconds(learner: Any) -> Row:
    """Of a step of the optimiser by itself, the fastest of three, once more with gradients of zero."""
    import time

    import torch

    from benchmarks.common.training_step import synchronize

    device, seconds = learner.policy.base.device, []
    for parameter in learner.parameters:
        parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
    for _ in range(3):
        synchronize(device)
        begun = time.perf_counter()
        learner.optimizer.step()
        synchronize(device)
        seconds.append(time.perf_counter() - begun)
    learner.clear_gradients()
    return {"optimizer_seconds": round(min(seconds), 3)}


def judged(figures: Row) -> Row:
    """With the plan's relative error, positive where it asks for too much."""
    if not figures.get("max_allocated"):
        return figures
    return figures | {"error": round(figures["predicted"] / figures["max_allocated"] - 1, 4)}


def line(row: Row) -> str:
    total = "does not fit" if row["planned_total"] is None else f"{row['planned_total'] / 1e9:.1f} GB with vLLM"
    what = f"{row['shape']:5} on {row['card_gb']:g} GB, {row['optim']}, {row['weight_update']}, {row['mode']}: {total}"
    if not row["fits"] or row["max_allocated"] is None:
        return f"{what}; training planned {row['predicted'] / 1e9:.2f} GB, {row.get('reason', 'not measured on a CPU')}"
    return (
        f"{what}; training planned {row['predicted'] / 1e9:.2f} GB, measured {row['max_allocated'] / 1e9:.2f} "
        f"({100 * row['error']:+.1f} %), {row['seconds']:.2f} s, of which the optimiser {row['optimizer_seconds']:.2f}"
    )


def conclude(measured: list[Row]) -> Row:
    return {"benchmark": "full_finetuning", **rows.against_plan(measured, BAR)}


def main() -> int:
    parser = rows.parser(__doc__, rank=0, chunk=1024)
    parser.add_argument("--rows", default="0.5b:8,1.5b:24,3b:48,8b:80", type=rows.words, help="shape:GB of the card")
    parser.add_argument("--tokens", type=int, default=8192, help="train.tokens_per_micro_batch")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence, half of them a completion")
    parser.add_argument("--optim", default="paged_adamw_8bit")
    options = parser.parse_args()
    if options.tiny:
        options.rows, options.device, options.tokens, options.length = ["tiny:8"], "cpu", 64, 32
    return rows.run(options, jobs_of(options), measurer, line, conclude)


if __name__ == "__main__":
    sys.exit(main())
