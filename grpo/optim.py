"""The optimiser of the adapter and its learning rate. The schedule is a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from grpo.config import Train
from grpo.errors import UserError


def build_optimizer(
    parameters: Sequence[nn.Parameter], train: Train, device: torch.device, notice: Callable[[str], None]
) -> torch.optim.Optimizer:
    """AdamW over `parameters` as `[train]` says. The 8-bit forms run on a GPU; elsewhere `notice` is told."""
    arguments = {
        "lr": train.learning_rate,
        "betas": (train.adam_beta1, train.adam_beta2),
        "eps": train.adam_epsilon,
        "weight_decay": train.weight_decay,
    }
    if train.optim != "adamw":
        if device.type == "cuda":
            return eight_bit(train.optim, parameters, arguments)
        notice(f"train.optim = {train.optim!r} needs a GPU; adamw is used on this CPU")
    return torch.optim.AdamW(parameters, fused=device.type == "cuda", **arguments)


def eight_bit(name: str, parameters: Sequence[nn.Parameter], arguments: dict) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW with 8-bit moments, paged to host memory for the paged form."""
    try:
        from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit
    except ImportError:
        raise UserError(f'train.optim = {name!r} needs bitsandbytes; pip install it, or set "adamw"') from None
    return (PagedAdamW8bit if name.startswith("paged") else AdamW8bit)(parameters, **arguments)


def learning_rate(step: int, max_steps: int, train: Train) -> float:
    """The rate of step `step` (from 1): k / w of the peak in step k of w warm-up steps, then constant, or falling
    from the peak towards zero after the last step.
    """
    warmup = math.ceil(train.warmup_ratio * max_steps)
    if step <= warmup:
        return train.learning_rate * step / warmup
    progress = (step - 1 - warmup) / max(max_steps - warmup, 1)
    if train.lr_scheduler_type == "linear":
        return train.learning_rate * (1 - progress)
    if train.lr_scheduler_type == "cosine":
        return train.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
    return train.learning_rate
