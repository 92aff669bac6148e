"""The peak of a GRPO step with long completions: eight of 20,480 tokens after one prompt of 256, Llama-3.1-8B's shape.

Random NF4 weights, LoRA of rank 32 on all seven projections, vLLM with a KV cache in which all eight are resident at
their full length, then one optimiser step on all of them, a micro-batch each. To save time all but the last `--decode`
tokens of every completion are made up and read in by vLLM as if they belonged to the prompt, in pieces of a whole
sequence: that takes more memory than decoding does.

Rows: the KV cache in bf16 or FP8, kept through training or released (`rollout.release_kv_cache`). The peak is torch's
`max_memory_allocated` of either phase; a released cache, which torch goes on counting, is taken off that of training.
Beside it: the most that the driver counted as the process's, sampled, with CUDA's own and torch's unused memory.

    python -m benchmarks.long_completions --out benchmarks/results/long_completions.json

Every row has a process of its own. Prints a table; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from benchmarks.common import rows
from benchmarks.common.rows import Row

if TYPE_CHECKING:
    import torch

    from grpo.model.base_weights import BaseWeights
    from grpo.rollout.engine import Engine
    from grpo.training.batch import TrainingSequence
    from grpo.training.learner import Learner

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
        from benchmarks.common.training_step import device_used

        while True:
            self.peak = max(self.peak, device_used(self.device))
            time.sleep(0.02)

    def taken(self) -> int:
        """The peak since the last call."""
        peak, self.peak = self.peak, 0
        return peak


def measurer(options: argparse.Namespace) -> Callable[[Row], Row]:
    import torch

    from benchmarks.common import training_step as steps

    started, device = time.perf_counter(), torch.device(options.device)
    length = options.prompt + options.completion
    base = steps.load(options.shape, device, positions=length, offload_embedding=options.offload_embedding)
    return lambda row: measure(*ROWS[row["row"]], base, options, started)


def measure(kv_cache_dtype: str, released: bool, base: BaseWeights, options: argparse.Namespace, started: float) -> Row:
    """A rollout, a training step on it and the beginning of another rollout; reported as far as they have come."""
    from benchmarks.common import training_step as steps

    device = base.device
    engine, learner = engine_and_learner(base, options, kv_cache_dtype, released)
    row: Row = {"kv_cache": engine.kv_bytes(), "weights": base.nbytes()}
    row |= {"ready_seconds": round(time.perf_counter() - started, 1)}
    rows.tell(row)

    watch = DeviceWatch(device)
    steps.reset_peak(device)
    begun = time.perf_counter()
    sequences = rollout(engine, base, options, options.completion)
    steps.synchronize(device)
    row["rollout"] = {"seconds": round(time.perf_counter() - begun, 2), **memory(device, watch)}
    rows.tell(row)
    steps.reset_peak(device)
    begun = time.perf_counter()
    engine.release_kv_cache()
    seconds = steps.step(learner, sequences)
    row["training"] = {"seconds": round(seconds, 2), **memory(device, watch)}
    row["training"]["with_release_seconds"] = round(time.perf_counter() - begun, 2)
    row["sync_seconds"] = round(engine.sync_adapter(), 4)
    if device.type == "cuda":
        training = row["training"]["max_allocated"] - (row["kv_cache"] if released else 0)
        peak = max(row["rollout"]["max_allocated"], training)
        row |= {"peak": peak, "bar": BARS[kv_cache_dtype], "holds": peak <= BARS[kv_cache_dtype]}
        row["device_peak"] = max(row[phase]["device_peak"] for phase in ("rollout", "training"))
    rows.tell(row)
    begun = time.perf_counter()
    rollout(engine, base, options, 8)
    row["rollout_after_seconds"] = round(time.perf_counter() - begun, 2)
    rows.tell(row)
    engine.close()
    return row


def engine_and_learner(
    base: BaseWeights, options: argparse.Namespace, kv_cache_dtype: str, released: bool
) -> tuple[Engine, Learner]:
    """Both over `base`, and each has run once."""
    from benchmarks.common import training_step as steps
    from grpo.policy.policy import Policy
    from grpo.rollout.engine import Engine, EngineSettings

    length = options.prompt + options.completion
    config = steps.step_config(
        rank=options.rank, tokens=length, prompt=options.prompt, completion=options.completion, optim=options.optim,
        gradient_checkpointing=options.form, logprob_chunk_tokens=options.chunk,
    )  # fmt: skip
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
    return engine, learner


def rollout(engine: Engine, base: BaseWeights, options: argparse.Namespace, completion: int) -> list[TrainingSequence]:
    """Completions of `completion` tokens, of which the last are sampled; as sequences to train on."""
    import torch

    from grpo.rollout.types import Request, SamplingSettings
    from grpo.training.batch import TrainingSequence

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


def memory(device: torch.device, watch: DeviceWatch) -> Row:
    from benchmarks.common import training_step as steps

    return {**steps.memory_now(device), "device_peak": watch.taken() or None}


def line(row: Row) -> str:
    if "peak" not in row:
        return f"{row['row']:14} rollout {row['rollout']['seconds']} s, training {row['training']['seconds']} s"
    return (
        f"{row['row']:14} peak {row['peak'] / 1e9:6.2f} GB (bar {row['bar'] / 1e9:g}), device "
        f"{row['device_peak'] / 1e9:6.2f}; rollout {row['rollout']['max_allocated'] / 1e9:6.2f}, training "
        f"{row['training']['max_allocated'] / 1e9:6.2f} in {row['training']['seconds']} s, KV cache "
        f"{row['kv_cache'] / 1e9:.2f}"
    )


def main() -> int:
    parser = rows.parser(__doc__, rank=32, chunk=512)
    rows.add_step(parser, form="offload")
    parser.add_argument("--rows", default=list(ROWS), type=rows.words)
    parser.add_argument("--shape", default="8b")
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--completion", type=int, default=20480, help="tokens")
    parser.add_argument("--decode", type=int, default=128, help="tokens of each completion that are sampled")
    parser.add_argument("--offload-embedding", action="store_true", help="model.offload_embedding")
    options = parser.parse_args()
    if options.tiny:
        options.shape, options.device, options.form, options.rank = "tiny", "cpu", "layer", 4
        options.prompt, options.completion, options.decode, options.rows = 16, 48, 8, ["bf16", "bf16-released"]

    def conclude(_: list[Row]) -> Row:
        return {"benchmark": "long_completions", **rows.settings(options, "rows"), "unsloth_published": UNSLOTH}

    return rows.run(options, [[{"row": name}] for name in options.rows], measurer, line, conclude)


if __name__ == "__main__":
    sys.exit(main())
