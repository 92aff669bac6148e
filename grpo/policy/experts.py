"""Mixtures of experts in the training graph: transformers' blocks with our router and our experts in them.

Both compute by `grpo.kernels.experts`, as sampling does. A router gives what transformers' gives, in its order, so the
block around the two stays transformers'.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from grpo.kernels.experts import experts_mlp, route
from grpo.model.expert_weights import ExpertStack
from grpo.policy.packing import running_routes


class RoutedExperts(nn.Module):
    """The experts of a block over the one copy."""

    def __init__(self, stack: ExpertStack):
        super().__init__()
        self.stack = stack

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x [tokens, hidden]; each token's experts and their weights [tokens, top_k]."""
        return experts_mlp(x, self.stack.experts, chosen, weights)


class Router(nn.Module):
    """Scores a block's experts and chooses among them."""

    def __init__(self, stack: ExpertStack, number: int, order: tuple[str, ...]):
        """number: among the model's routers; order: what to return, of "logits", "weights" and "chosen"."""
        super().__init__()
        self.routing, self.number, self.order = stack.routing, number, order
        self.register_parameter("weight", None)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        logits = nn.functional.linear(x.reshape(-1, x.shape[-1]), self.weight)
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
