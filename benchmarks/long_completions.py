"""The peak of a GRPO step with long completions: eight of 20,480 tokens after one prompt of 256, Llama-3.1-8B's shape.

Random NF4 weights, LoRA of rank 32 on all seven projections, vLLM with a KV cache in which all eight are resident at
their full length, then one optimiser step on all of them, a micro-batch each. To save time all but the last `--decode`
tokens of every completion are made up and read in by vLLM as if they belonged to the prompt, in pieces of a whole
sequence: that takes more memory than decoding does.

Rows: the KV cache in bf16 or FP8, kept through training or released (`rollout.release_kv_cache`). The peak is torch's
`max_memory_allocated` of either phase; a released cache, which torch goes on counting, is taken off that of training.
Beside it: the most that the driver counted as the process's, sampled, with CUDA's own and torch's unused memory.

    python benchmarks/long_completions.py --out benchmarks/results/long_completions.json

Every row has a process of its own. Prints a table; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.processes import report, rows_of, write_result

ROWS = {"bf16": ("auto", False), "fp8": ("fp8", False), "bf16-released": ("auto", True), "fp8-released": ("fp8", True)}
"""Name -> (kv_cache_dtype, release_kv_cache)."""
BARS = {"auto": 32e9, "fp8": 22e9}
UNSLOTH = 54.3e9
"""Unsloth's published figure for this step. Not measured here."""
GENERATIONS = 8


class DeviceWatch(threading.Thread):
    """The most memory that the driver counts as this process's, looked at every 20 ms."""

    def __init__(self, device: Any):
        super().__init__(daemon=True)
        self.device, self.peak = device, 0
        if device.type == "cuda":
            self.start()

    def run(self) -> None:
        from benchmarks.training_step import device_used

        while True:
            self.peak = max(self.peak, device_used(self.device))
            time.sleep(0.02)

    def taken(self) -> int:
        """The peak since the last call."""
        peak, self.peak = self.peak, 0
        return peak


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One row, in this process."""
    import torch

    from benchmarks import training_step as steps
    from grpo.engine import Engine, EngineSettings
    from grpo.policy import Policy

    kv_cache_dtype, released = ROWS[options.one]
    device = torch.device(options.device)
    length = options.prompt + options.completion
    config = steps.step_config(
        rank=options.rank, tokens=length, prompt=options.prompt, completion=options.completion, optim=options.optim,
        gradient_checkpointing=options.form, logprob_chunk_tokens=options.chunk,
    )  # fmt: skip
    started = time.perf_counter()
    base = steps.load(options.shape, device, positions=length, offload_embedding=options.offload_embedding)
    policy = Policy(base, config.lora, seed=0)
    settings = EngineSettings(
        max_seq_length=length, max_num_seqs=GENERATIONS, kv_cache_dtype=kv_cache_dtype, release_kv_cache=released
    )
    engine = Engine(base, policy, settings)
    learner = steps.learner_of(base, config, policy)
    engine.release_kv_cache()
    steps.warm_up(learner)
    engine.sync_adapter()
    rollout(engine, base, options, 64 if options.completion > 256 else 8)
    row = {"row": options.one, "kv_cache": engine.kv_bytes(), "weights": base.nbytes()}
    row |= {"ready_seconds": round(time.perf_counter() - started, 1)}
    report(row)

    watch = DeviceWatch(device)
    reset(device)
    begun = time.perf_counter()
    sequences = rollout(engine, base, options, options.completion)
    steps.synchronize(device)
    row["rollout"] = {"seconds": round(time.perf_counter() - begun, 2), **memory(steps, device, watch)}
    report(row)
    reset(device)
    begun = time.perf_counter()
    engine.release_kv_cache()
    seconds = steps.step(learner, sequences)
    row["training"] = {"seconds": round(seconds, 2), **memory(steps, device, watch)}
    row["training"]["with_release_seconds"] = round(time.perf_counter() - begun, 2)
    row["sync_seconds"] = round(engine.sync_adapter(), 4)
    if device.type == "cuda":
        training = row["training"]["max_allocated"] - (row["kv_cache"] if released else 0)
        peak = max(row["rollout"]["max_allocated"], training)
        row |= {"peak": peak, "bar": BARS[kv_cache_dtype], "holds": peak <= BARS[kv_cache_dtype]}
        row["device_peak"] = max(row[phase]["device_peak"] for phase in ("rollout", "training"))
    report(row)
    begun = time.perf_counter()
    rollout(engine, base, options, 8)
    row["rollout_after_seconds"] = round(time.perf_counter() - begun, 2)
    engine.close()
    return row


def rollout(engine: Any, base: Any, options: argparse.Namespace, completion: int) -> list[Any]:
    """Completions of `completion` tokens, of which the last are sampled; as sequences to train on."""
    import torch

    from grpo.batch import TrainingSequence
    from grpo.generation import Request, SamplingSettings

    generator = torch.Generator().manual_seed(completion)

    def tokens(count: int) -> list[int]:
        return torch.randint(10, base.config.vocab_size, (count,), generator=generator).tolist()

    decoded = min(options.decode, completion - 1)
    prompt, given = tokens(options.prompt), [tokens(completion - decoded) for _ in range(GENERATIONS)]
    requests = [Request(number, prompt + made_up, number) for number, made_up in enumerate(given)]
    done = {one.request_id: one for one in engine.generate(requests, SamplingSettings(1.0, decoded))}
    return [
        TrainingSequence(
            prompt,
            made_up + list(done[number].token_ids),
            [-8.0] * len(made_up) + list(done[number].logprobs),
            1.0 if number % 2 else -1.0,
            True,
        )
        for number, made_up in enumerate(given)
    ]


def reset(device: Any) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)


def memory(steps: Any, device: Any, watch: DeviceWatch) -> dict[str, Any]:
    return {**steps.memory_now(device), "device_peak": watch.taken() or None}


def measure_in_process(name: str, options: argparse.Namespace, left: float) -> dict[str, Any]:
    """The row as far as it came, with "failed" where that is not the whole."""
    rows, failed = rows_of([sys.executable, __file__, *sys.argv[1:], "--one", name], left)
    row = rows[-1] if rows else {"row": name}
    return row | {"failed": failed} if failed else row


def show(row: dict[str, Any]) -> None:
    if "failed" in row:
        print(f"{row['row']:14} {row['failed'][-500:]}", flush=True)
    if "peak" in row:
        print(
            f"{row['row']:14} peak {row['peak'] / 1e9:6.2f} GB (bar {row['bar'] / 1e9:g}), device "
            f"{row['device_peak'] / 1e9:6.2f}; rollout {row['rollout']['max_allocated'] / 1e9:6.2f}, training "
            f"{row['training']['max_allocated'] / 1e9:6.2f} in {row['training']['seconds']} s, KV cache "
            f"{row['kv_cache'] / 1e9:.2f}",
            flush=True,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", default=",".join(ROWS), type=lambda text: text.split(","))
    parser.add_argument("--one", choices=ROWS, help="measure this row in this process")
    parser.add_argument("--shape", default="8b")
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--completion", type=int, default=20480, help="tokens")
    parser.add_argument("--decode", type=int, default=128, help="tokens of each completion that are sampled")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--optim", default="adamw_8bit")
    parser.add_argument("--form", default="offload", choices=("none", "mlp", "layer", "offload"))
    parser.add_argument("--chunk", type=int, default=512, help="tokens whose logits exist at once")
    parser.add_argument("--offload-embedding", action="store_true", help="model.offload_embedding")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--budget", type=float, default=560, help="seconds for everything")
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU: tries the script")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.tiny:
        options.shape, options.device, options.form, options.rank = "tiny", "cpu", "layer", 4
        options.prompt, options.completion, options.decode, options.rows = 16, 48, 8, ["bf16", "bf16-released"]
    if options.one:
        measure(options)
        return 0
    ends = time.monotonic() + options.budget
    settings = {k: v for k, v in vars(options).items() if k not in ("rows", "one", "out", "budget")}
    result: dict[str, Any] = {"benchmark": "long_completions", **settings, "unsloth_published": UNSLOTH, "rows": []}
    for name in options.rows:
        result["rows"].append(measure_in_process(name, options, ends - time.monotonic()))
        show(result["rows"][-1])
        write_result(options.out, result)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
