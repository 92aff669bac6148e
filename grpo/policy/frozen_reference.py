"""What a KL penalty holds weights in training to: a second, frozen copy of the model as the run found it.

It is made of the weights in memory, before the first step, in 16, 8 or 4 bit; nothing is read again. With an adapter
there is no need of it: the base without the adapter is the reference (`Policy.reference`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from grpo.config.schema import Model
from grpo.errors import UserError
from grpo.model.base_weights import BaseWeights
from grpo.model.vision import Vision
from grpo.policy.fused_layers import install_fused_layers, wants_kernels
from grpo.policy.graph import build_graph

STORAGE: dict[str, dict[str, bool]] = {
    "16bit": {"load_in_4bit": False},
    "8bit": {"load_in_8bit": True},
    "4bit": {"load_in_4bit": True},
}
"""`loss.reference_storage` as keys of `[model]`."""


class WeightsInMemory:
    """A `Source` of the parameters of a model, by transformers' names, as they are when they are read."""

    def __init__(self, base: BaseWeights, parameters: Mapping[str, nn.Parameter]):
        self.path: Path = base.source_path
        self.config = copy.deepcopy(base.config)
        self.parameters = parameters
        self.names, self.notices = set(parameters), list[str]()
        self.stored_as = str(base.dtype).removeprefix("torch.")
        self.vision: Vision | None = None
        self.tower: dict[str, str] = {}

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.parameters[name].shape)

    def stored_name(self, name: str) -> str:
        return name

    def read(self, name: str) -> Tensor:
        return self.parameters[name].detach()

    def tokenizer(self) -> Any:
        raise UserError("weights in memory have no tokenizer")


class FrozenReference:
    """A training graph that is never trained, over weights of its own."""

    def __init__(self, base: BaseWeights, parameters: Mapping[str, nn.Parameter], storage: str, kernels: str):
        """A copy of `parameters`, those over `base`, held in `storage`; `kernels` is `train.kernels`."""
        model = Model(name=str(base.source_path), **STORAGE[storage])  # type: ignore[arg-type]
        self.base = BaseWeights(WeightsInMemory(base, parameters), model, device=base.device, dtype=base.dtype)
        self.decoder = build_graph(self.base)
        if wants_kernels(kernels, base.device):
            install_fused_layers(self.decoder, self.base)
        self.decoder.eval()

    def set_longest(self, tokens: int) -> None:
        """As the policy's."""
        self.decoder.model.rotary_emb.set_longest(tokens)
