"""A base with an adapter folded in, W + s (B A - B0 A0), read tensor by tensor: what whole models are exported from.

`MergedSource` is a `Source` like the base below it and holds no more than one weight at a time. The sum is made in
float32 and left there; B0 A0 is what the adapter started from in the base, mostly nothing; the one rounding is the
writer's. What an adapter is, and that it fits the base, is read where training reads it: `grpo.model.adapter_config`
and `grpo.policy.adapter_files`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from grpo.model.initial_adapter import InitialLayer
from grpo.model.weight_source import Source, dense
from grpo.policy.adapter_files import AdapterFile


class MergedSource:
    """`base` with `adapter` folded in (None: as it is), under the interface of a Source. Weights are dense."""

    def __init__(self, base: Source, adapter: AdapterFile | None, initial: Mapping[str, InitialLayer] | None = None):
        """base: one that is accounted for; initial: what the adapter started from in it. Raises UserError where the
        adapter's layers are not those of the base."""
        self.base, self.adapter, self.initial = base, adapter, initial or {}
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
        scale = self.adapters[layer].scale
        merged = torch.addmm(weight.float(), b.float(), a.float(), alpha=scale)
        if layer in self.initial:
            start = self.initial[layer].start
            merged = torch.addmm(merged, start.b, start.a, alpha=-scale)
        return merged

    def tokenizer(self) -> Any:
        """As the base's."""
        return self.base.tokenizer()
