"""A base with an adapter folded in, W + s B A, read tensor by tensor: what every export of a whole model is made of.

`MergedSource` is a `Source` like the base below it and holds no more than one weight at a time. The sum is made in
float32 and left there; the one rounding is the writer's. What an adapter is, and that it fits the base, is read where
training reads it: `grpo.model.adapter_config` and `grpo.policy.adapter_files`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo.model.weight_source import Source, dense
from grpo.policy.adapter_files import AdapterFile


class MergedSource:
    """`base` with `adapter` folded in (None: as it is), under the interface of a Source. Weights are dense."""

    def __init__(self, base: Source, adapter: AdapterFile | None):
        """base: one that is accounted for. Raises UserError where the adapter's layers are not those of the base."""
        self.base, self.adapter = base, adapter
        self.path, self.config, self.stored_as = base.path, base.config, base.stored_as
        self.names, self.notices = set(base.names), base.notices
        self.adapters = {} if adapter is None else adapter.check(base.config.get_text_config())

    def shape(self, name: str) -> tuple[int, ...]:
        """As the base's."""
        return self.base.shape(name)

    def read(self, name: str) -> Tensor:
        """The tensor `name` on the CPU: float32 where the adapter or dequantising changed it, else as stored."""
        weight = dense(self.base.read(name))
        layer = name.removesuffix(".weight")
        if self.adapter is None or layer not in self.adapters or layer == name:
            return weight
        a, b = self.adapter.factors(layer)
        return torch.addmm(weight.float(), b.float(), a.float(), alpha=self.adapters[layer].scale)

    def tokenizer(self) -> Any:
        """As the base's."""
        return self.base.tokenizer()
