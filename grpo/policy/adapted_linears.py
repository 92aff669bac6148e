"""The linear modules over one fused layer of the base as kernels take them: frozen weights, and adapters that are on.

Not here: what is computed with them (`fused_layers.py`, `fused_mlp.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from grpo.kernels.lora_factors import Adapter
from grpo.kernels.lora_linear import LinearGroup
from grpo.model.base_weights import FusedLinear
from grpo.model.decoder_config import DecoderConfig
from grpo.policy.lora_linear import ADAPTER, LoraLinear
from grpo.policy.trained_weights import TrainedLinear

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""transformers' names of the activations that kernels/glu.py has."""


def activation_of(config: DecoderConfig) -> str:
    """transformers' name of the MLP's activation; Gemma's configurations have a key of their own."""
    return getattr(config, "hidden_activation", None) or config.hidden_act


class AdaptedLinears:
    """The linear modules over one fused layer of the base, with what adapters they have at the moment."""

    def __init__(self, linear: FusedLinear, modules: Sequence[nn.Module]):
        segments = tuple((segment.weight, segment.absmax) for segment in linear.segments)
        trained = tuple((module.weight, module.bias) for module in modules if isinstance(module, TrainedLinear))
        self.frozen = LinearGroup(segments, linear.bias, linear.segments[0].dtype, trained)
        self.modules = tuple(modules)
        self.row_ranges = tuple(linear.parts.values())

    def active(self) -> Iterator[tuple[tuple[int, int], LoraLayer, str]]:
        """(place, module, adapter name) of every adapter that is on."""
        for rows, module in zip(self.row_ranges, self.modules, strict=True):
            if isinstance(module, LoraLayer) and not module.disable_adapters:
                yield from ((rows, module, name) for name in module.active_adapters if name in module.lora_A)

    def adapters(self) -> tuple[list[Adapter], list[Tensor]]:
        """For the kernels: where each acts, and A, B of each; of disabled ones what they started from in the base."""
        listed, factors = [], []
        for (first, rows), module, name in self.active():
            listed.append(Adapter(first, rows, float(module.scaling[name])))
            factors += [module.lora_A[name].weight, module.lora_B[name].weight]
        for (first, rows), module in zip(self.row_ranges, self.modules, strict=True):
            if isinstance(module, LoraLinear) and module.disable_adapters and module.initial_a is not None:
                listed.append(Adapter(first, rows, float(module.scaling[ADAPTER])))
                factors += [module.initial_a, module.initial_b]
        return listed, factors

    @property
    def drops(self) -> bool:
        """Whether dropout acts on an adapter's input: the kernels have none, the modules do."""
        return any(
            isinstance(drop := module.lora_dropout[name], nn.Dropout) and drop.p > 0 and drop.training
            for _, module, name in self.active()
        )

    def plain(self, x: Tensor) -> Tensor:
        """All outputs by the modules themselves."""
        return torch.cat([module(x) for module in self.modules], -1)
