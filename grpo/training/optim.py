"""The optimiser of the adapter, its learning rate, and the loss scale of float16.

The schedule is a pure function of the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from grpo.config.schema import Train
from grpo.errors import UserError


def build_optimizer(
    parameters: Sequence[nn.Parameter], train: Train, device: torch.device, notice: Callable[[str], None]
) -> torch.optim.Optimizer:
    """AdamW over `parameters` as `[train]` says. The 8-bit ones run on a GPU; elsewhere `notice` says so."""
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


def moments_like(parameters: Sequence[nn.Parameter], train: Train) -> list[Tensor]:
    """Tensors of the size of the moments that the optimiser will keep on the parameters' device."""
    if train.optim.startswith("paged") and parameters[0].is_cuda:
        return []
    dtype = torch.uint8 if train.optim == "adamw_8bit" and parameters[0].is_cuda else torch.float32
    return [torch.empty_like(parameter, dtype=dtype) for parameter in parameters for _ in range(2)]


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


class LossScaler:
    """Keeps the gradients of a float16 graph within its range: the loss is multiplied by `scale` before the backward
    pass, the float32 gradients of the adapter are divided by it after (Micikevicius et al., 2018, arXiv:1710.03740).

    The scale is a power of two, so neither changes a bit of what is in range. It is halved where a gradient
    overflowed, and doubled after `GROWTH_INTERVAL` steps without that. Other dtypes keep a scale of 1.
    """

    FIRST_SCALE = 2.0**16
    GROWTH_INTERVAL = 100
    """Steps. A step of reinforcement learning costs a rollout, so runs are short against supervised ones."""

    def __init__(self, dtype: torch.dtype):
        self.enabled = dtype == torch.float16
        self.scale = self.FIRST_SCALE if self.enabled else 1.0
        self.good_steps = 0

    def backward(self, loss: Tensor) -> None:
        """Accumulate the scaled gradients of `loss`."""
        (loss * self.scale if self.enabled else loss).backward()

    def unscale(self, gradients: Sequence[Tensor]) -> None:
        """Divide `gradients`, in place."""
        if self.enabled:
            torch._foreach_mul_(list(gradients), 1.0 / self.scale)

    def overflowed(self, loss: float | None, grad_norm: float) -> bool:
        """Whether a smaller scale would have helped: the gradient is not finite though the loss is."""
        return self.enabled and self.scale > 1 and not math.isfinite(grad_norm) and math.isfinite(loss or 0.0)

    def update(self, overflowed: bool) -> None:
        """Adapt the scale to the optimiser step that was made, or skipped because it `overflowed`."""
        if not self.enabled:
            return
        self.good_steps = 0 if overflowed else self.good_steps + 1
        if overflowed:
            self.scale = max(self.scale / 2, 1.0)
        elif self.good_steps == self.GROWTH_INTERVAL:
            self.scale, self.good_steps = self.scale * 2, 0

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scale, self.good_steps = state["scale"], state["good_steps"]


class OptimizerBackup:
    """A copy of `parameters` and of `optimizer`'s state, made when it is created."""

    def __init__(self, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer):
        self.parameters, self.optimizer = parameters, optimizer
        self._values = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
        self._state = on_host(optimizer.state_dict())

    @torch.no_grad()
    def restore(self) -> None:
        """Put the copied values back in place."""
        for parameter, value in zip(self.parameters, self._values, strict=True):
            parameter.copy_(value)
        self.optimizer.load_state_dict(self._state)


def on_host(value: Any) -> Any:
    """`value`, nested dicts and lists of tensors and plain values, with its tensors copied to the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: on_host(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(on_host(entry) for entry in value)
    return value
