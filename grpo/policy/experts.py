"""Mixtures of experts in the training graph: transformers' blocks with our router and our experts in them.

Both compute by `grpo.kernels.experts`, as sampling does. A router gives what transformers' gives, in its order, so the
block around the two stays transformers'.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from grpo.kernels.experts import ExpertAdapter, ExpertAdapters, ExpertMatrix, experts_mlp, route
from grpo.model.adapter_layers import LayerAdapter
from grpo.model.expert_sizes import MATRICES
from grpo.model.expert_weights import ExpertStack
from grpo.policy.lora_linear import ADAPTER
from grpo.policy.packing import running_routes


class RoutedExperts(nn.Module):
    """The experts of a block over the one copy."""

    def __init__(self, stack: ExpertStack):
        super().__init__()
        self.stack = stack

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x [tokens, hidden]; each token's experts and their weights [tokens, top_k]."""
        return experts_mlp(x, self.stack.experts, chosen, weights)


class ExpertsAdapter(nn.Module, BaseTunerLayer):
    """LoRA of every expert on one of the two matrices of a block, around its experts or around the other's.

    A [experts * r, in] holds the experts' factors one below the other, B [out, r * experts] column by column, the
    expert counted fastest: peft's layout of an adapter on a stacked parameter, and its names. Rows of B are in the
    order of transformers' parameter.
    """

    adapter_layer_names = ("lora_A", "lora_B")
    other_param_names = ("r", "scaling")

    def __init__(self, base_layer: nn.Module, matrix: str, adapter: LayerAdapter):
        super().__init__()
        self.base_layer = base_layer
        self.stack: ExpertStack = base_layer.stack
        self.matrix = matrix
        experts, out, columns = self.stored.shape
        self.experts = experts
        device = self.stored.weight.device
        self.lora_A = nn.ModuleDict({ADAPTER: nn.Linear(columns, experts * adapter.rank, bias=False, device=device)})
        self.lora_B = nn.ModuleDict({ADAPTER: nn.Linear(experts * adapter.rank, out, bias=False, device=device)})
        self.r, self.scaling = {ADAPTER: adapter.rank}, {ADAPTER: adapter.scale}
        nn.init.kaiming_uniform_(self.lora_A[ADAPTER].weight, a=5**0.5)
        nn.init.zeros_(self.lora_B[ADAPTER].weight)
        self._active_adapter = ADAPTER

    @property
    def stored(self) -> ExpertMatrix:
        """The matrix that is adapted."""
        experts = self.stack.experts
        return experts.gate_up if self.matrix == MATRICES[0] else experts.down

    def scaled(self) -> tuple[Tensor, Tensor]:
        """A [experts, r, in] and s B [experts, out, r] in float32."""
        a, b = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        apart = b.view(len(b), self.r[ADAPTER], self.experts).permute(2, 0, 1)
        apart = self.stack.graph.rows(self.matrix, apart)
        return a.view(self.experts, self.r[ADAPTER], -1), apart * self.scaling[ADAPTER]

    def is_fresh(self) -> bool:
        """Whether the adapter changes nothing."""
        return not bool(self.lora_B[ADAPTER].weight.any())

    def chain(self) -> Iterator[ExpertsAdapter]:
        """This one and the one inside it."""
        yield self
        if isinstance(self.base_layer, ExpertsAdapter):
            yield from self.base_layer.chain()

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """As `RoutedExperts`."""
        found = {
            each.matrix: ExpertAdapter(*(factor.to(x.dtype).contiguous() for factor in each.scaled()))
            for each in self.chain()
            if not each.disable_adapters
        }
        if not found:
            return experts_mlp(x, self.stack.experts, chosen, weights)
        adapters = ExpertAdapters(*(found.get(matrix) for matrix in MATRICES))
        return experts_mlp(x, self.stack.experts, chosen, weights, adapters)


def adapt_experts(graph: nn.Module, adapters: dict[str, LayerAdapter]) -> None:
    """Put adapters on the stacked parameters of experts in `graph`, which have `RoutedExperts`."""
    for name, adapter in adapters.items():  # the two of a block in the order in which peft wraps them
        module, _, matrix = name.rpartition(".")
        parent, _, leaf = module.rpartition(".")
        owner = graph.get_submodule(parent)
        setattr(owner, leaf, ExpertsAdapter(getattr(owner, leaf), matrix, adapter))


class Router(nn.Module):
    """Scores a block's experts and chooses among them."""

    def __init__(self, stack: ExpertStack, number: int, order: tuple[str, ...]):
        """number: among the model's routers; order: what to return, of "logits", "weights" and "chosen"."""
        super().__init__()
        self.routing, self.number, self.order = stack.routing, number, order
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        logits = nn.functional.linear(x.reshape(-1, x.shape[-1]), self.weight, self.bias)
        replayed = running_routes.get()
        chosen = None if replayed is None else replayed[:, self.number].long()
        weights, chosen = route(logits, *self.routing, chosen)
        results = {"logits": logits, "weights": weights, "chosen": chosen}
        return tuple(results[name] for name in self.order)


def result_order(router: nn.Module, stack: ExpertStack) -> tuple[str, ...]:
    """What transformers' router, on meta, returns, in its order."""
    _, _, hidden = stack.experts.gate_up.shape
    weight: Any = router.weight
    output = router(torch.empty(1, hidden, dtype=weight.dtype, device="meta"))
    names = []
    for tensor in output:
        if not tensor.is_floating_point():
            names.append("chosen")
        else:
            among_all = tensor.shape[-1] != stack.routing.top_k or "logits" not in names and output[0] is tensor
            names.append("logits" if among_all else "weights")
    return tuple(names)


def install_experts(graph: nn.Module, stacks: dict[str, ExpertStack]) -> None:
    """Put our experts and routers into `graph`, transformers' on meta; the routers' weights are not set yet."""
    for number, (name, stack) in enumerate(stacks.items()):
        order = result_order(graph.get_submodule(stack.router), stack)
        for place, module in ((name, RoutedExperts(stack)), (stack.router, Router(stack, number, order))):
            parent, _, leaf = place.rpartition(".")
            setattr(graph.get_submodule(parent), leaf, module)
