"""A base with an adapter folded in, W + s (B A - B0 A0), read tensor by tensor: what whole models are exported from.

`MergedSource` is a `Source` like the base below it and holds no more than one weight at a time. The sum is made in
float32 and left there; B0 A0 is what the adapter started from in the base, mostly nothing; the one rounding is the
writer's. What an adapter is, and that it fits the base, is read where training reads it: `grpo.model.adapter_config`
and `grpo.policy.adapter_files`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from grpo.model.adapter_layers import adapted_experts
from grpo.model.initial_adapter import InitialLayer
from grpo.model.meta_graph import graph_tensors
from grpo.model.stored_form import Piece, stored_form
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
        self.vision, self.tower = base.vision, base.tower
        self.adapters = {} if adapter is None else adapter.check(base.config.get_text_config())

    def shape(self, name: str) -> tuple[int, ...]:
        """As the base's."""
        return self.base.shape(name)

    def read(self, name: str) -> Tensor:
        """The tensor `name` on the CPU: float32 where the adapter or dequantising changed it, else as stored."""
        weight = dense(self.base.read(name))
        if self.adapter is not None and name in self._expert_pieces:
            return self._merged_experts(weight.float(), name)
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

    @cached_property
    def _expert_pieces(self) -> dict[str, tuple[str, Piece]]:
        """The checkpoint's name of a piece of adapted experts -> the graph's parameter and the piece."""
        if self.adapter is None or not self.adapter.saved.lora.target_parameters:
            return {}
        config = self.config.get_text_config()
        form = stored_form(config)
        names = adapted_experts(config, self.adapter.saved.lora)
        return {piece.name: (name, piece) for name in names for piece in form.pieces[name]}

    def _merged_experts(self, weight: Tensor, name: str) -> Tensor:
        """`weight` of one expert, or of all, with its adapter folded in."""
        parameter, piece = self._expert_pieces[name]
        assert self.adapter is not None
        a, b, scale = self.adapter.expert_factors(self.config.get_text_config(), parameter)
        rows = slice(piece.first_row, piece.first_row + piece.rows)
        module = parameter.rpartition(".")[0]
        if graph_tensors(self.config.get_text_config()).experts[module].form.transposed:
            return torch.baddbmm(weight, a.float().mT, b.float().mT, alpha=scale)
        if piece.expert is None:
            return torch.baddbmm(weight, b.float(), a.float(), alpha=scale)
        return torch.addmm(weight, b[piece.expert, rows].float(), a[piece.expert].float(), alpha=scale)

    def stored_name(self, name: str) -> str:
        """What the written model calls it: with images the whole model is written, else the decoder alone."""
        return name if self.vision is None else self.base.stored_name(name)

    def tokenizer(self) -> Any:
        """As the base's."""
        return self.base.tokenizer()
