"""Random optimiser steps for tests of the loss: flat tokens, float64, off policy enough for every clip to bind."""

from dataclasses import fields, replace

import torch

from grpo.config.schema import Loss
from grpo.training.loss import BatchTotals, LossInputs, batch_totals

LENGTHS = [5, 1, 9, 3, 7, 4]
MAX_COMPLETION_LENGTH = 12


def random_inputs(*, on_policy=False, lengths=LENGTHS, seed=0) -> LossInputs:
    """A batch of `lengths`; the third sequence is truncated."""
    generator = torch.Generator().manual_seed(seed)

    def normal(size, scale=1.0):
        return torch.randn(size, generator=generator, dtype=torch.float64) * scale

    tokens, sequences = sum(lengths), len(lengths)
    old = -normal(tokens).abs() - 0.1
    logprobs = old if on_policy else old + normal(tokens, 0.4)
    # In float32 first, because TRL takes the quantile of entropies in it.
    entropy = normal(tokens).abs().float().double()
    truncated = torch.zeros(sequences, dtype=torch.bool)
    truncated[2:3] = True
    return LossInputs(
        logprobs=logprobs.clone().requires_grad_(),
        old_logprobs=None if on_policy else old,
        rollout_logprobs=old + normal(tokens, 0.5),
        ref_logprobs=old + normal(tokens, 0.5),
        advantages=normal(sequences),
        sequence=torch.arange(sequences).repeat_interleave(torch.tensor(lengths)),
        mask=torch.ones(tokens, dtype=torch.bool),
        entropy=entropy.requires_grad_(),
        truncated=truncated,
    )


def lengths_of(inputs: LossInputs) -> list[int]:
    return torch.bincount(inputs.sequence, minlength=inputs.num_sequences).tolist()


def totals_of(inputs: LossInputs, settings: Loss) -> BatchTotals:
    return batch_totals(
        lengths_of(inputs),
        settings,
        MAX_COMPLETION_LENGTH,
        truncated=inputs.truncated.tolist(),
        entropy=inputs.entropy,
    )


def select(inputs: LossInputs, sequences: list[int]) -> LossInputs:
    """The micro-batch of these sequences, in this order, of the same leaf tensors."""
    parts = [(inputs.sequence == number).nonzero()[:, 0] for number in sequences]
    tokens = torch.cat([*parts, torch.zeros(0, dtype=torch.int64)])
    sizes = torch.tensor([len(part) for part in parts], dtype=torch.int64)
    chosen = {}
    for field in fields(inputs):
        values = getattr(inputs, field.name)
        if values is not None:
            index = torch.tensor(sequences, dtype=torch.int64) if len(values) == inputs.num_sequences else tokens
            chosen[field.name] = values[index]
    return replace(inputs, **chosen | {"sequence": torch.arange(len(sequences)).repeat_interleave(sizes)})


def gradients(loss: torch.Tensor, inputs: LossInputs) -> list[torch.Tensor]:
    """d loss / d logprobs and d loss / d entropy."""
    found = torch.autograd.grad(loss, [inputs.logprobs, inputs.entropy], allow_unused=True)
    return [torch.zeros_like(inputs.logprobs) if gradient is None else gradient for gradient in found]
