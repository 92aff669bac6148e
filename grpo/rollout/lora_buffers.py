"""The adapter as the rollout reads it: two buffers a layer at fixed addresses, refreshed after every optimiser step.

The trained A and B belong to the optimiser; sampling reads copies, with B scaled, so that an update in progress cannot
reach a completion and CUDA graphs find their operands where they were. For the products see `vllm_model.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo.kernels.experts import ExpertAdapter, ExpertAdapters
from grpo.kernels.sizes import RANK_MULTIPLE
from grpo.model.base_weights import BaseWeights, FusedLinear
from grpo.model.expert_sizes import MATRICES
from grpo.policy.experts import ExpertsAdapter
from grpo.policy.lora_linear import ADAPTER
from grpo.policy.policy import Policy


@dataclass
class AdapterBuffers:
    """A fused linear's adapter in the compute dtype: y += (x a^T) b^T.

    `a` [ranks, in] stacks the parts' A; `b` [out, ranks] holds each part's scaled B in its own rows and columns, zeros
    elsewhere, so that q, k and v take one small product and an addition to the large one instead of six.
    """

    a: Tensor
    b: Tensor


class CopyPairs(NamedTuple):
    """Where every trained A and B goes; the lists run in parallel."""

    a_buffers: list[Tensor]
    b_buffers: list[Tensor]
    a_trained: list[Tensor]
    b_trained: list[Tensor]
    a_initial: list[Tensor]
    b_initial: list[Tensor]
    """What stands in where the adapter is off, zeros where it started from nothing; empty where no layer has any."""
    scales: list[float]


class RolloutAdapter:
    """The copies that sampling reads.

    `buffers`: fused linear's name -> AdapterBuffers, for those that have an adapter. `experts`: the graph's module of
    experts -> the adapters on them. `on`: 1.0 or 0.0, a scalar tensor that every adapter's product is multiplied by. An
    adapter that started from a part of the base is not switched off but has its first values then.
    """

    def __init__(self, base: BaseWeights, policy: Policy | None):
        """Zero buffers; `policy` None: none at all."""
        self.base, self.policy = base, policy
        self.buffers = allocate(base, policy) if policy is not None else {}
        self.on = torch.ones((), dtype=base.dtype, device=base.device)
        trained = policy.expert_adapters() if policy is not None else {}
        self._of_experts = [(adapter, expert_buffers(adapter, base.dtype)) for adapter in trained.values()]
        by_name = {name: buffers for name, (_, buffers) in zip(trained, self._of_experts, strict=True)}
        modules = dict.fromkeys(name.rpartition(".")[0] for name in trained)
        above, below = MATRICES
        self.experts = {
            module: ExpertAdapters(by_name.get(f"{module}.{above}"), by_name.get(f"{module}.{below}"), self.on)
            for module in modules
        }
        self._enabled = True
        self._pairs: CopyPairs | None = None

    def set_enabled(self, enabled: bool) -> bool:
        """Let the adapter act or not; returns whether that is a change."""
        changed = enabled != self._enabled
        if changed:
            self._enabled = enabled
            if self.base.initial:
                self.refresh()
            else:
                self.on.fill_(float(enabled))
        return changed

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the buffers up to date."""
        if self.policy is None:
            return
        pairs = self._copy_pairs(self.policy)
        if self.base.initial and not self._enabled:
            a, b = pairs.a_initial, pairs.b_initial
        else:
            a, b = pairs.a_trained, pairs.b_trained
        if pairs.a_buffers:
            torch._foreach_copy_(pairs.a_buffers, a)
            torch._foreach_copy_(pairs.b_buffers, torch._foreach_mul(b, pairs.scales))
        acts = self._enabled or not self.base.initial
        for adapter, buffers in self._of_experts:
            expert_a, expert_b = adapter.scaled()
            buffers.a[:, : expert_a.shape[1]].copy_(expert_a)
            buffers.b[..., : expert_b.shape[2]].copy_(expert_b if acts else torch.zeros_like(expert_b))

    def _copy_pairs(self, policy: Policy) -> CopyPairs:
        """Views of the buffers beside the trained tensors that belong there."""
        if self._pairs is None:
            pairs, layers = CopyPairs([], [], [], [], [], [], []), policy.adapter_layers()
            for name, buffers in self.buffers.items():
                for part, ranks, rows in parts_with_adapter(self.base.linears[name], layers):
                    layer = layers[part]
                    pairs.a_buffers.append(buffers.a[ranks])
                    pairs.b_buffers.append(buffers.b[rows, ranks])
                    pairs.a_trained.append(layer.lora_A[ADAPTER].weight)
                    pairs.b_trained.append(layer.lora_B[ADAPTER].weight)
                    if self.base.initial:
                        pairs.a_initial.append(pairs.a_trained[-1] if layer.initial_a is None else layer.initial_a)
                        none = torch.zeros_like(pairs.b_trained[-1]) if layer.initial_b is None else layer.initial_b
                        pairs.b_initial.append(none)
                    pairs.scales.append(layer.scaling[ADAPTER])
            self._pairs = pairs
        return self._pairs


def allocate(base: BaseWeights, policy: Policy) -> dict[str, AdapterBuffers]:
    """Zero buffers for every fused linear that has an adapter. Their addresses never change: CUDA graphs hold them."""
    buffers = {}
    for name, ranks in served_ranks(base, policy).items():
        linear = base.linears[name]
        a = torch.zeros(ranks, linear.in_features, dtype=base.dtype, device=base.device)
        b = torch.zeros(linear.out_features, ranks, dtype=base.dtype, device=base.device)
        buffers[name] = AdapterBuffers(a, b)
    return buffers


def served_ranks(base: BaseWeights, policy: Policy) -> dict[str, int]:
    """Fused linear's name -> ranks of its adapter, all parts' together, for those that have one. The last ones, up to a
    multiple of RANK_MULTIPLE, stay zero."""
    layers = policy.adapter_layers()
    ranks = {
        name: sum(layers[part].r[ADAPTER] for part in linear.parts if part in layers)
        for name, linear in base.linears.items()
    }
    return {name: -(-count // RANK_MULTIPLE) * RANK_MULTIPLE for name, count in ranks.items() if count}


def expert_buffers(adapter: ExpertsAdapter, dtype: torch.dtype) -> ExpertAdapter:
    """Zero buffers for the adapters of every expert on one matrix, their rank rounded up to a power of two."""
    experts, out, columns = adapter.stored.shape
    ranks = max(RANK_MULTIPLE, 1 << (adapter.r[ADAPTER] - 1).bit_length())
    device = adapter.stored.weight.device
    return ExpertAdapter(
        torch.zeros(experts, ranks, columns, dtype=dtype, device=device),
        torch.zeros(experts, out, ranks, dtype=dtype, device=device),
    )


def parts_with_adapter(linear: FusedLinear, layers: dict[str, Any]) -> Iterator[tuple[str, slice, slice]]:
    """(part, its ranks, its rows) for every part of `linear` with an adapter."""
    start = 0
    for part, (first, rows) in linear.parts.items():
        if part in layers:
            rank = layers[part].r[ADAPTER]
            yield part, slice(start, start + rank), slice(first, first + rows)
            start += rank
