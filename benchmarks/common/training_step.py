"""Optimiser steps on random weights, measured: what benchmarks of training memory have in common.

A model of one of `random_model.SHAPES` in NF4, an adapter, a learner, and steps over sequences of given lengths. vLLM
is not started. On a CPU everything runs, and memory is not measured.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.common.processes import nvml_handles
from benchmarks.common.random_model import RandomSource
from grpo.config.schema import Config, Model, parse_config
from grpo.memory.activations import TrainingMemory, moment_bytes
from grpo.model.base_weights import BaseWeights
from grpo.policy.packing import packed_row
from grpo.policy.policy import Policy
from grpo.training.batch import TrainingSequence
from grpo.training.learner import Learner
from grpo.training.loss import BatchTotals, batch_totals
from grpo.training.micro_batch import free_cached

WARM_UP = 512
"""Tokens of a step that compiles kernels and allocates the optimiser's moments."""


def step_config(
    *, rank: int, tokens: int, prompt: int, completion: int, model: dict[str, Any] | None = None, **train: Any
) -> Config:
    """A configuration for `learner_of`: micro-batches of `tokens`, all seven projections adapted; `model` and `train`
    are further keys of these sections."""
    return parse_config(
        {
            "model": {"name": "random", **(model or {})},
            "task": {"name": "arithmetic"},
            "lora": {"r": rank, "lora_alpha": 2 * rank},
            "rollout": {"max_prompt_length": prompt, "max_completion_length": completion},
            "train": {"max_steps": 10, "tokens_per_micro_batch": tokens, **train},
        }
    )


def load(shape: str, device: torch.device, positions: int | None = None, **model_keys: Any) -> BaseWeights:
    """Random weights of `shape`, as NF4 in bfloat16. `positions`: how long sequences may be, where vLLM asks;
    `model_keys`: further keys of `[model]`."""
    model, source = Model(name="random", load_in_4bit=True, **model_keys), RandomSource(shape, device)
    if positions is not None:
        source.config.max_position_embeddings = positions
    base = BaseWeights(source, model, device=device, dtype=torch.bfloat16)
    free_cached(device)
    return base


def learner_of(base: BaseWeights, config: Config, policy: Policy | None = None) -> Learner:
    policy = policy or Policy(base, config.lora, seed=0, kernels=config.train.kernels)
    return Learner(policy, config, max_steps=10, notice=print)


def sequence_of(base: BaseWeights, prompt: int, completion: int, seed: int = 0) -> TrainingSequence:
    """Random tokens; every one of the completion has a gradient."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, base.config.vocab_size, (prompt + completion,), generator=generator).tolist()
    return TrainingSequence(ids[:prompt], ids[prompt:], [-8.0] * completion, 1.0 if seed % 2 else -1.0, False)


def step(learner: Learner, sequences: Sequence[TrainingSequence]) -> float:
    """One forward, backward and optimiser step; seconds. Lets torch.OutOfMemoryError through, with nothing held."""
    synchronize(learner.policy.base.device)
    started = time.perf_counter()
    learner.policy.model.train()
    try:
        learner.backpropagate(list(sequences), totals(learner.config, sequences))
        learner.clip_gradients()
        learner.apply_gradients()
    finally:
        learner.policy.model.eval()
        learner.clear_gradients()
    synchronize(learner.policy.base.device)
    return time.perf_counter() - started


def totals(config: Config, sequences: Sequence[TrainingSequence]) -> BatchTotals:
    """What normalises the loss of a step on `sequences`."""
    lengths = [len(sequence.completion_ids) for sequence in sequences]
    return batch_totals(
        lengths, config.loss, config.rollout.max_completion_length,
        truncated=[sequence.truncated for sequence in sequences], entropy=None,
    )  # fmt: skip


def warm_up(learner: Learner) -> None:
    half = min(WARM_UP, learner.config.train.tokens_per_micro_batch) // 2
    step(learner, [sequence_of(learner.policy.base, half, half)])


def measured_step(learner: Learner, sequences: Sequence[TrainingSequence]) -> dict[str, Any]:
    """Seconds and peaks of a step, or `fits` False."""
    device = learner.policy.base.device
    free_cached(device)
    reset_peak(device)
    try:
        seconds = step(learner, sequences)
    except torch.OutOfMemoryError as error:
        result: dict[str, Any] = {"fits": False, "reason": ". ".join(str(error).split(". ")[:2])}
    else:
        result = {"fits": True, "seconds": round(seconds, 3), **memory_now(device)}
    free_cached(device)
    return result


def reset_peak(device: torch.device) -> None:
    """Let the peaks of `memory_now` begin here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def memory_now(device: torch.device) -> dict[str, int | None]:
    """Bytes: most allocated and most reserved by torch since the last reset, and what the driver counts as used.

    torch keeps what it reserved, so the driver's figure, read after a step, is that of the step's peak. What it has
    beyond the reserved bytes is the CUDA context, libraries and other processes.
    """
    if device.type != "cuda":
        return {"max_allocated": None, "max_reserved": None, "device_used": None}
    return {
        "max_allocated": torch.cuda.max_memory_allocated(device),
        "max_reserved": torch.cuda.max_memory_reserved(device),
        "device_used": device_used(device),
    }


def device_used(device: torch.device) -> int:
    """What this process takes of the GPU by NVML, where that tells processes apart; else what all of them take."""
    handles = nvml_handles()
    if not handles:
        free, total = torch.cuda.mem_get_info(device)
        return total - free
    import pynvml

    handle = handles[device.index or 0]
    processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    own = [process.usedGpuMemory for process in processes if process.pid == os.getpid() and process.usedGpuMemory]
    return int(own[0] if own else pynvml.nvmlDeviceGetMemoryInfo(handle).used)


def resident_bytes(learner: Learner) -> int:
    """What stays through all steps, by arithmetic: weights, adapter and moments. Gradients are a step's."""
    base, trained = learner.policy.base, sum(p.numel() for p in learner.parameters)
    optim = learner.config.train.optim
    return base.nbytes() + trained * (4 + moment_bytes(optim, on_gpu=base.device.type == "cuda"))


def predicted_peak(learner: Learner, batch: Sequence[TrainingSequence], mode: str) -> int:
    """The plan's peak of a step on `batch`, one micro-batch: weights, adapter, step."""
    row = packed_row([sequence.prompt_ids for sequence in batch], [sequence.completion_ids for sequence in batch])
    keys = sum(span.keys for span in row.spans)
    return predicted_bytes(learner, len(row.tokens), len(row.predicting), keys, mode)


def predicted_bytes(learner: Learner, tokens: int, predicted: int, keys: int, mode: str) -> int:
    """The same for so many tokens, of which `predicted` are completions."""
    base, config = learner.policy.base, learner.config
    memory = TrainingMemory.of(config, base.config, base.dtype.itemsize, on_gpu=True, tokens=tokens)
    gradients = 4 * sum(parameter.numel() for parameter in learner.parameters)
    return resident_bytes(learner) + gradients + replace(memory, predicted=predicted, keys=keys).peak(mode)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
