"""The adapter and the optimiser as they were, kept in host memory, so that a step of several updates can be undone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


class Snapshot:
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
