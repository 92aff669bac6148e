"""What a micro-batch may take of the device: its tokens, what layers keep, and what happens when memory runs out.

The memory plan chooses before anything runs; here the choice meets the device. The largest micro-batch that the
configuration allows is tried before the first step, and a run that still runs out of memory goes on, once, with
micro-batches of half the tokens, repeating the optimiser step from its beginning.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, TypeVar

import psutil  # type: ignore[import-untyped]
import torch

from grpo.config.schema import Config
from grpo.errors import UserError
from grpo.kernels.attention import FLASH_CAPABILITY
from grpo.memory.activations import TrainingMemory, moment_bytes
from grpo.memory.full_finetuning import chosen_form, gradient_bytes, state_bytes
from grpo.policy.policy import Policy
from grpo.policy.rng import RandomState
from grpo.training.batch import TrainingSequence, filled

T = TypeVar("T")


class MicroBatchBudget:
    """The budget of a micro-batch of `policy`, and the one time that it may shrink."""

    def __init__(self, policy: Policy, config: Config, notice: Callable[[str], None]):
        self.policy, self.config, self.notice = policy, config, notice
        self.tokens = config.train.tokens_per_micro_batch
        base = policy.base
        on_gpu = base.device.type == "cuda"
        flash = not on_gpu or torch.cuda.get_device_capability(base.device) >= FLASH_CAPABILITY
        training = TrainingMemory.of(config, base.config, base.dtype.itemsize, on_gpu=on_gpu, flash=flash)
        self.modes = training.modes
        self.set_checkpointing(*checkpointing_mode(training, policy, config))

    def set_checkpointing(self, mode: str, kept_mlps: int = 0) -> None:
        """Let layers keep what `mode` of activations.CHECKPOINTING_MODES says; `kept_mlps` of them more under "mlp"."""
        self.mode, self.kept_mlps = mode, kept_mlps
        self.policy.recompute_layers(mode, kept_mlps)

    def retry_on_oom(self, work: Callable[[], T], discard: Callable[[], None]) -> T:
        """`work()`; where memory runs out for the first time, `discard()` and `work()` with half the tokens.

        The generators are as they were, so that the second attempt is what it would have been with that budget from
        the start. Raises UserError where memory runs out again.
        """
        random = RandomState(self.policy.base.device)
        try:
            return work()
        except torch.OutOfMemoryError:
            if self.halved:
                raise UserError(self.out_of_memory()) from None
        # Not in the handler: the exception holds the frames, and they the tensors, of the attempt.
        discard()
        self.tokens = max(1, self.tokens // 2)
        self.notice(f"out of memory; tried again with micro-batches of {self.tokens:,} tokens, which stay so")
        free_cached(self.policy.base.device)
        random.restore()
        try:
            return work()
        except torch.OutOfMemoryError:
            raise UserError(self.out_of_memory()) from None

    @property
    def halved(self) -> bool:
        return self.tokens < self.config.train.tokens_per_micro_batch

    def out_of_memory(self) -> str:
        """What to change, in a sentence."""
        longest = self.config.max_seq_length
        smaller = "rollout.max_completion_length" if longest > self.tokens else "train.tokens_per_micro_batch"
        offload = "" if self.mode == "offload" else ', or set train.gradient_checkpointing = "offload"'
        return (
            f"memory ran out again with micro-batches of {self.tokens:,} tokens, half of train.tokens_per_micro_batch "
            f"(the longest sequence has {longest:,}); lower {smaller} or the memory of the KV cache "
            f"(rollout.kv_cache_memory_bytes){offload}"
        )

    def fit_checkpointing(self, work: Callable[[], object], discard: Callable[[], None]) -> None:
        """Find what `work` fits into: of the modes, where the configuration leaves them open, the first that does."""
        while self.config.train.gradient_checkpointing == "auto" and (self.mode != self.modes[-1] or self.kept_mlps):
            try:
                work()
                return
            except torch.OutOfMemoryError:
                pass
            discard()
            free_cached(self.policy.base.device)
            if self.kept_mlps:
                self.set_checkpointing(self.mode)
                continue
            self.set_checkpointing(self.modes[self.modes.index(self.mode) + 1])
            self.notice(f'the largest micro-batch did not fit; train.gradient_checkpointing = "{self.mode}" is used')
        self.retry_on_oom(work, discard)

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """A run that had to shrink goes on shrunk."""
        self.tokens = min(self.tokens, state["tokens"])


def checkpointing_mode(training: TrainingMemory, policy: Policy, config: Config) -> tuple[str, int]:
    """`train.gradient_checkpointing`; "auto": the first mode of `training` that fits into the memory that is free now,
    and, if that is "mlp", in how many layers there is room to keep the MLP's gate and up all the same.

    Raises UserError for a mode that this run's layers have not.
    """
    chosen = str(config.train.gradient_checkpointing)
    if chosen != "auto":
        if chosen not in training.modes:
            raise UserError(
                f'train.gradient_checkpointing = "{chosen}" needs the Triton kernels, so a GPU and no '
                'lora.lora_dropout; set "auto"'
            )
        return chosen, 0
    base, on_gpu = policy.base, policy.base.device.type == "cuda"
    host = free = psutil.virtual_memory().available
    if on_gpu:
        free_cached(base.device)
        free = torch.cuda.mem_get_info(base.device)[0]
    # Gradients and moments do not exist yet.
    numbers, itemsize = sum(p.numel() for p in policy.parameters()), base.dtype.itemsize
    if config.model.full_finetuning:
        form = chosen_form(config)
        state = state_bytes(form, config.train.optim, itemsize, on_gpu=on_gpu)
        free -= int(numbers * (gradient_bytes(form, itemsize) + state))
    else:
        free -= numbers * (4 + moment_bytes(config.train.optim, on_gpu=on_gpu))
    mode = training.first_that_fits(free, host)
    return mode, training.mlps_that_fit(free) if mode == "mlp" else 0


def free_cached(device: torch.device) -> None:
    """Give what no tensor uses any more back, so that other sizes can be allocated."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def largest_batch(config: Config, tokens: int) -> list[TrainingSequence]:
    """A micro-batch that takes most memory: groups at full length, then a sequence that fills the budget up."""
    prompt, completion = config.rollout.max_prompt_length, config.rollout.max_completion_length
    groups = 1 + tokens // (prompt + completion)
    sequences = [
        dummy_sequence(number, prompt, completion)
        for number in range(groups)
        for _ in range(config.rollout.num_generations)
    ]
    batch = filled(sequences, tokens)[0][0]
    used = sum(len(sequence) for sequence in batch)
    used -= sum(len(a.prompt_ids) for a, b in zip(batch, batch[1:], strict=False) if a.prompt_ids == b.prompt_ids)
    room = tokens - used
    if room >= 2:
        length = min(completion, room - 1)
        batch.append(dummy_sequence(groups, min(prompt, room - length + 1), length))
    return batch


def dummy_sequence(number: int, prompt: int, completion: int) -> TrainingSequence:
    """A sequence of these lengths; `number` tells prompts apart."""
    return TrainingSequence(
        [number % 2] * (prompt - 1) + [number % 97], [0] * completion, [-1.0] * completion, 1.0, False
    )
