"""The memory plan against what is measured: peaks of training steps and of rollouts over a grid of settings.

Random NF4 weights; every model has a process to itself. Training: each form of gradient checkpointing with each number
of tokens in a micro-batch, sequences of `--length` tokens of which half are completions. Rollout: vLLM with a KV cache
for every sequence at its full length, all of them decoded at once. Compared is torch's `max_memory_allocated`; what
the driver counts beyond torch (CUDA context, libraries, cuBLAS kernels, graphs) is reported apart, as `outside`.

    python benchmarks/memory_plan.py --shapes 3b,8b --tokens 4096,16384 --rollouts 128x1024,8x8192 --out results.json

Prints predicted and measured; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.processes import report, rows_of, write_result

BAR = 0.05
"""Relative error that the plan may have."""


def training_rows(shape: str, options: argparse.Namespace) -> None:
    """Peaks of training steps on one model, in this process."""
    import torch

    from benchmarks import training_step as steps

    device = torch.device(options.device)
    base = steps.load(shape, device)
    half = options.length // 2
    for kernels in options.kernels:
        for form in options.forms:
            for tokens in options.tokens:
                config = steps.step_config(
                    rank=options.rank, tokens=tokens, prompt=half, completion=half, gradient_checkpointing=form,
                    kernels=kernels, logprob_chunk_tokens=options.chunk,
                )  # fmt: skip
                learner = steps.learner_of(base, config)
                steps.warm_up(learner)
                batch = [steps.sequence_of(base, half, half, seed) for seed in range(tokens // (2 * half - 1))]
                row = {"part": "training", "shape": shape, "form": form, "kernels": kernels}
                row |= {"tokens": sum(map(len, batch)), "predicted": steps.predicted_peak(learner, batch, form)}
                report(judged({**row, **steps.measured_step(learner, batch)}))
                del learner


def rollout_row(shape: str, options: argparse.Namespace) -> None:
    """The peak of one rollout, in this process: vLLM's start first, then sampling to the full length."""
    import torch

    from benchmarks import shared_model
    from benchmarks import training_step as steps
    from grpo import plan
    from grpo.engine import Engine, EngineSettings
    from grpo.policy import Policy

    sequences, length = (int(number) for number in options.rollout.split("x"))
    device = torch.device(options.device)
    config = steps.step_config(rank=options.rank, tokens=1024, prompt=length // 2, completion=length - length // 2)
    base = steps.load(shape, device)
    policy = Policy(base, config.lora, seed=0)
    settings = EngineSettings(
        max_seq_length=length, max_num_seqs=sequences, kv_cache_dtype=options.kv_cache_dtype,
        enforce_eager=options.tiny,
    )  # fmt: skip
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    engine = Engine(base, policy, settings)
    started = steps.memory_now(device)
    resident = torch.cuda.memory_allocated(device) if device.type == "cuda" else None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    new = min(options.new_tokens, length // 2)
    seconds, _ = shared_model.rollout_seconds(engine, sequences, length // 2, new, seed=1)
    itemsize = base.dtype.itemsize
    block = plan.GPU_BLOCK if device.type == "cuda" else plan.CPU_BLOCK
    kv = plan.kv_cache_bytes(base.config, itemsize, options.kv_cache_dtype, length, sequences, block)
    values = 4 * sum(parameter.numel() for parameter in policy.parameters())
    buffers = sum(b.a.nbytes + b.b.nbytes for b in engine.adapter.buffers.values())
    sampling = plan.sampling_bytes(base.config, itemsize, length, sequences)
    always = base.nbytes() + values + buffers + kv + plan.VLLM_KEEPS
    row = {
        "part": "rollout", "shape": shape, "sequences": sequences, "length": length, "kv_cache": kv,
        "predicted": always + sampling, "predicted_resident": always, "resident": resident,
        "start_peak": started["max_allocated"], "seconds": round(seconds, 2), "fits": True,
        **steps.memory_now(device),
    }  # fmt: skip
    if row["max_allocated"] is not None:
        row["rollout_peak"] = row["max_allocated"]
        row["max_allocated"] = max(row["max_allocated"], row["start_peak"])
    report(judged(row))
    engine.close()


def judged(row: dict[str, Any]) -> dict[str, Any]:
    """`row` with the plan's relative error, positive where it asks for too much, and the bytes outside of torch."""
    if row.get("max_allocated"):
        row["error"] = round(row["predicted"] / row["max_allocated"] - 1, 4)
        row["outside"] = row["device_used"] - row["max_reserved"]
    return row


def show(row: dict[str, Any]) -> None:
    what = (
        f"{row['shape']:5} {row['form']:8} {row['kernels']:6} {row['tokens']:7,} tokens"
        if row["part"] == "training"
        else f"{row['shape']:5} rollout of {row['sequences']} x {row['length']:,}"
    )
    if not row["fits"]:
        print(f"{what:40} planned {row['predicted'] / 1e9:7.2f} GB: does not fit", flush=True)
    elif row["max_allocated"] is None:
        print(f"{what:40} planned {row['predicted'] / 1e9:7.2f} GB, not measured on a CPU", flush=True)
    else:
        print(
            f"{what:40} planned {row['predicted'] / 1e9:7.2f} GB, measured {row['max_allocated'] / 1e9:7.2f} "
            f"({100 * row['error']:+.1f} %), reserved {row['max_reserved'] / 1e9:7.2f}, outside "
            f"{row['outside'] / 1e9:5.2f}",
            flush=True,
        )


def in_process(part: str, shape: str, options: argparse.Namespace, left: float) -> list[dict[str, Any]]:
    """The rows of one part, measured in a process of its own; the last may say what `failed`."""
    given = {
        "--forms": ",".join(options.forms), "--kernels": ",".join(options.kernels), "--device": options.device,
        "--tokens": ",".join(map(str, options.tokens)), "--length": options.length, "--rank": options.rank,
        "--chunk": options.chunk, "--new-tokens": options.new_tokens, "--kv-cache-dtype": options.kv_cache_dtype,
    }  # fmt: skip
    command = [sys.executable, __file__, "--one", shape, *(str(a) for pair in given.items() for a in pair)]
    command += ["--rollout", part] if part != "training" else []
    command += ["--tiny"] if options.tiny else []
    rows, failed = rows_of(command, left)
    return [*rows, {"part": part, "shape": shape, "failed": failed}] if failed else rows


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])

    def words(text: str) -> list[str]:
        return text.split(",") if text else []

    made.add_argument("--shapes", default="3b,8b", type=words)
    made.add_argument("--tokens", default="4096,16384", type=lambda text: [int(n) for n in text.split(",")])
    made.add_argument("--forms", default="none,mlp,layer,offload", type=words)
    made.add_argument("--kernels", default="auto", type=words, help="train.kernels: auto, torch")
    made.add_argument("--rollouts", default="128x1024,8x8192", type=words, help="sequences x length; empty for none")
    made.add_argument("--length", type=int, default=2048, help="tokens of a training sequence")
    made.add_argument("--new-tokens", type=int, default=64, help="sampled a sequence")
    made.add_argument("--rank", type=int, default=16)
    made.add_argument("--chunk", type=int, default=1024)
    made.add_argument("--kv-cache-dtype", default="auto")
    made.add_argument("--device", default="cuda")
    made.add_argument("--budget", type=float, default=560, help="seconds for everything")
    made.add_argument("--tiny", action="store_true", help="a tiny model on the CPU: tries the script")
    made.add_argument("--one", help="measure this shape in this process, and print its rows")
    made.add_argument("--rollout", help="with --one: this rollout instead of training")
    made.add_argument("--out", type=Path)
    return made


def main() -> int:
    options = parser().parse_args()
    if options.tiny:
        options.shapes, options.device, options.tokens, options.length = ["tiny"], "cpu", [64], 32
        options.rollouts = options.rollouts and ["2x64"]
    if options.one:
        (rollout_row if options.rollout else training_rows)(options.one, options)
        return 0
    ends, result = time.monotonic() + options.budget, summed_up([])
    for shape in options.shapes:
        for part in (["training"] if options.tokens else []) + options.rollouts:
            for row in in_process(part, shape, options, ends - time.monotonic()):
                result = summed_up([*result["rows"], row])
                print(f"{shape} {part}: {row['failed'][-500:]}") if "failed" in row else show(row)
            write_result(options.out, result)
    print(json.dumps(result))
    return 0


def summed_up(rows: list[dict[str, Any]]) -> dict[str, Any]:
    errors = [abs(row["error"]) for row in rows if "error" in row]
    return {
        "benchmark": "memory_plan", "bar": BAR, "worst_error": max(errors, default=None),
        "within_bar": sum(error <= BAR for error in errors), "measured": len(errors), "rows": rows,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
