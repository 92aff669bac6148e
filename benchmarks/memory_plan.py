"""The memory plan against what is measured: peaks of training steps and of rollouts over a grid of settings.

Random NF4 weights; every model has a process to itself. Training: each form of gradient checkpointing with each number
of tokens in a micro-batch, sequences of `--length` tokens of which half are completions. Rollout: vLLM with a KV cache
for every sequence at its full length, all of them decoded at once. Compared is torch's `max_memory_allocated`; what
the driver counts beyond torch (CUDA context, libraries, cuBLAS kernels, graphs) is reported apart, as `outside`.

    python -m benchmarks.memory_plan --shapes 3b,8b --tokens 4096,16384 --rollouts 128x1024,8x8192 --out results.json

Prints predicted and measured; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from benchmarks.common import rows
from benchmarks.common.rows import Job, Row

if TYPE_CHECKING:
    from grpo.model.base_weights import BaseWeights

BAR = 0.05
"""Relative error that the plan may have."""


def jobs_of(options: argparse.Namespace) -> list[Job]:
    """The training rows of a shape share its weights; a rollout has a process to itself."""
    jobs: list[Job] = []
    for shape in options.shapes:
        of_training = itertools.product(options.kernels, options.forms, options.tokens)
        jobs.append(
            [
                {"part": "training", "shape": shape, "form": form, "kernels": kernels, "tokens": tokens}
                for kernels, form, tokens in of_training
            ]
        )
        for rollout in options.rollouts:
            sequences, length = map(int, rollout.split("x"))
            jobs.append([{"part": "rollout", "shape": shape, "sequences": sequences, "length": length}])
    return jobs


def measurer(options: argparse.Namespace) -> Callable[[Row], Row]:
    import torch

    from benchmarks.common import training_step as steps

    load = functools.cache(steps.load)
    device = torch.device(options.device)

    def measure(row: Row) -> Row:
        base = load(row["shape"], device)
        return judged((training if row["part"] == "training" else rollout)(row, base, options))

    return measure


def training(row: Row, base: BaseWeights, options: argparse.Namespace) -> Row:
    """The peak of a training step."""
    from benchmarks.common import training_step as steps

    half, form = options.length // 2, row["form"]
    config = steps.step_config(
        rank=options.rank, tokens=row["tokens"], prompt=half, completion=half, gradient_checkpointing=form,
        kernels=row["kernels"], logprob_chunk_tokens=options.chunk,
    )  # fmt: skip
    learner = steps.learner_of(base, config)
    steps.warm_up(learner)
    batch = [steps.sequence_of(base, half, half, seed) for seed in range(row["tokens"] // (2 * half - 1))]
    planned = {"tokens": sum(map(len, batch)), "predicted": steps.predicted_peak(learner, batch, form)}
    return planned | steps.measured_step(learner, batch)


def rollout(row: Row, base: BaseWeights, options: argparse.Namespace) -> Row:
    """The peak of one rollout: vLLM's start first, then sampling to the full length."""
    import torch

    from benchmarks.common import shared_model
    from benchmarks.common import training_step as steps
    from grpo.memory import plan
    from grpo.policy.policy import Policy
    from grpo.rollout.engine import Engine, EngineSettings

    sequences, length, device = row["sequences"], row["length"], base.device
    config = steps.step_config(rank=options.rank, tokens=1024, prompt=length // 2, completion=length - length // 2)
    policy = Policy(base, config.lora, seed=0)
    settings = EngineSettings(
        max_seq_length=length, max_num_seqs=sequences, kv_cache_dtype=options.kv_cache_dtype,
        enforce_eager=options.tiny,
    )  # fmt: skip
    steps.reset_peak(device)
    engine = Engine(base, policy, settings)
    started = steps.memory_now(device)
    resident = torch.cuda.memory_allocated(device) if device.type == "cuda" else None
    steps.reset_peak(device)
    new = min(options.new_tokens, length // 2)
    seconds, _ = shared_model.rollout_seconds(engine, sequences, length // 2, new, seed=1)
    itemsize = base.dtype.itemsize
    block = plan.GPU_BLOCK if device.type == "cuda" else plan.CPU_BLOCK
    kv = plan.kv_cache_bytes(base.config, itemsize, options.kv_cache_dtype, length, sequences, block)
    values = 4 * sum(parameter.numel() for parameter in policy.parameters())
    buffers = sum(b.a.nbytes + b.b.nbytes for b in engine.adapter.buffers.values())
    sampling = plan.sampling_bytes(base.config, itemsize, length, sequences)
    always = base.nbytes() + values + buffers + kv + plan.VLLM_KEEPS
    figures = {
        "kv_cache": kv, "predicted": always + sampling, "predicted_resident": always, "resident": resident,
        "start_peak": started["max_allocated"], "seconds": round(seconds, 2), "fits": True,
        **steps.memory_now(device),
    }  # fmt: skip
    if figures["max_allocated"] is not None:
        figures["rollout_peak"] = figures["max_allocated"]
        figures["max_allocated"] = max(figures["max_allocated"], figures["start_peak"])
    rows.tell(judged(figures))
    engine.close()
    return figures


def judged(figures: Row) -> Row:
    """With the plan's relative error, positive where it asks for too much, and the bytes outside of torch."""
    if not figures.get("max_allocated"):
        return figures
    error = round(figures["predicted"] / figures["max_allocated"] - 1, 4)
    return figures | {"error": error, "outside": figures["device_used"] - figures["max_reserved"]}


def line(row: Row) -> str:
    what = (
        f"{row['shape']:5} {row['form']:8} {row['kernels']:6} {row['tokens']:7,} tokens"
        if row["part"] == "training"
        else f"{row['shape']:5} rollout of {row['sequences']} x {row['length']:,}"
    )
    planned = f"{what:40} planned {row['predicted'] / 1e9:7.2f} GB"
    if not row["fits"]:
        return f"{planned}: does not fit"
    if row["max_allocated"] is None:
        return f"{planned}, not measured on a CPU"
    return (
        f"{planned}, measured {row['max_allocated'] / 1e9:7.2f} ({100 * row['error']:+.1f} %), reserved "
        f"{row['max_reserved'] / 1e9:7.2f}, outside {row['outside'] / 1e9:5.2f}"
    )


def conclude(measured: list[Row]) -> Row:
    return {"benchmark": "memory_plan", **rows.against_plan(measured, BAR)}


def main() -> int:
    parser = rows.parser(__doc__, rank=16, chunk=1024)
    parser.add_argument("--shapes", default="3b,8b", type=rows.words)
    parser.add_argument("--tokens", default="4096,16384", type=lambda text: [int(n) for n in rows.words(text)])
    parser.add_argument("--forms", default="none,mlp,layer,offload", type=rows.words)
    parser.add_argument("--kernels", default="auto", type=rows.words, help="train.kernels: auto, torch")
    parser.add_argument("--rollouts", default="128x1024,8x8192", type=rows.words, help="sequences x length")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a training sequence")
    parser.add_argument("--new-tokens", type=int, default=64, help="sampled a sequence")
    parser.add_argument("--kv-cache-dtype", default="auto")
    options = parser.parse_args()
    if options.tiny:
        options.shapes, options.device, options.tokens, options.length = ["tiny"], "cpu", [64], 32
        options.rollouts = options.rollouts and ["2x64"]
        options.forms = [form for form in options.forms if form != "mlp"]  # needs a GPU
    return rows.run(options, jobs_of(options), measurer, line, conclude)


if __name__ == "__main__":
    sys.exit(main())
