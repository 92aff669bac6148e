"""Mixtures of experts in a training graph, found by their form: where experts are, and how their router chooses.

transformers keeps the experts of a block as stacked matrices beside a router. What the router computes is not asked of
its class's name: it is run on random numbers, and compared with what `grpo.kernels.experts` computes, which is what
both graphs run. A router that chooses otherwise is refused by name.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from grpo.errors import UserError
from grpo.kernels.experts import route
from grpo.model.checks import one_line
from grpo.model.expert_sizes import MATRICES

TRIED_TOKENS = 64
"""Random inputs of a router that is compared."""
LIKE_OURS = 1e-4
"""Largest difference of a weight."""


class Routing(NamedTuple):
    """How a token's experts are chosen: the `top_k` of the softmax over all, perhaps renormalised to add up to 1."""

    top_k: int
    renormalize: bool


@dataclass(frozen=True)
class GraphExperts:
    """The experts of one block: gate_up_proj [experts, 2 * inner, hidden] and down_proj [experts, hidden, inner]."""

    experts: int
    inner: int
    hidden: int
    router: str
    """The module that chooses among them."""
    routing: Routing

    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """Parameter -> shape."""
        sizes = (self.experts, 2 * self.inner, self.hidden), (self.experts, self.hidden, self.inner)
        return dict(zip(MATRICES, sizes, strict=True))


def experts_in(graph: nn.Module) -> dict[str, GraphExperts]:
    """Module name -> experts, of every block of `graph`, on meta, that has some. Raises UserError for other kinds."""
    found: dict[str, GraphExperts] = {}
    known: dict[tuple[type, int, int], Routing] = {}
    for name, module in graph.named_modules():
        if not holds_experts(module):
            continue
        check_form(name, module)
        experts, double, hidden = module.gate_up_proj.shape
        router_name, router = router_beside(graph, name, experts, hidden)
        key = type(router), experts, hidden
        if key not in known:
            known[key] = routing_of(router, experts, hidden)
        found[name] = GraphExperts(experts, double // 2, hidden, router_name, known[key])
    return found


def holds_experts(module: nn.Module) -> bool:
    """Whether `module` has matrices of several experts."""
    return any(each.ndim == 3 and key.endswith("_proj") for key, each in module.named_parameters(recurse=False))


def check_form(name: str, module: nn.Module) -> None:
    """Raise UserError for experts that are not computed here."""
    parameters = {key: tuple(each.shape) for key, each in module.named_parameters(recurse=False)}
    flags = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}
    usual = set(parameters) == set(MATRICES) and all(getattr(module, key, on) == on for key, on in flags.items())
    if not usual:
        raise UserError(
            f"the experts of transformers' {type(module).__name__} ({name}: {', '.join(sorted(parameters))}) are no "
            "gated MLPs without biases, which are the ones that are computed; use a model of another family"
        )


def router_beside(graph: nn.Module, name: str, experts: int, hidden: int) -> tuple[str, nn.Module]:
    """The module beside the experts `name` that has a row for each of them."""
    block, _, _ = name.rpartition(".")
    for child, module in graph.get_submodule(block).named_children():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and tuple(weight.shape) == (experts, hidden):
            return f"{block}.{child}", module
    kind = type(graph.get_submodule(block)).__name__
    raise UserError(f"transformers' {kind} has no router beside its experts; use a model of another family")


def routing_of(router: nn.Module, experts: int, hidden: int) -> Routing:
    """What the router, on meta, computes. Raises UserError where that is none of what `route` does."""
    tried = copy.deepcopy(router).to_empty(device="cpu").float().train(False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*tried.parameters(), *tried.buffers()):
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float32) / hidden**0.5 * 2)
        x = torch.randn(TRIED_TOKENS, hidden, generator=generator, dtype=torch.float32)
        theirs = parts(run(tried, x), experts)
        if theirs is not None:
            weights, chosen = theirs
            logits = nn.functional.linear(x, tried.weight, getattr(tried, "bias", None))
            for renormalize in (False, True):
                if alike(route(logits, chosen.shape[1], renormalize), (weights, chosen)):
                    return Routing(chosen.shape[1], renormalize)
    raise UserError(
        f"transformers' {type(router).__name__} chooses experts in another way than by the largest of a softmax, with "
        "their own weights or renormalised, which is what is implemented; use a model of another family"
    )


def run(router: nn.Module, x: Tensor) -> Any:
    """What the router gives for x. Raises UserError for one that cannot be run, as where it chooses more experts than
    there are."""
    try:
        return router(x)
    except Exception as error:
        raise UserError(
            f"transformers' {type(router).__name__} does not run as config.json describes it ({one_line(error)}); "
            "correct it, or use another model"
        ) from None


def parts(output: Any, experts: int) -> tuple[Tensor, Tensor] | None:
    """(weights, numbers) [tokens, top_k] of the chosen experts, of what a router gives, in whatever order."""
    tensors = [each for each in output if isinstance(each, Tensor)] if isinstance(output, tuple) else []
    chosen = next((each for each in tensors if not each.is_floating_point()), None)
    if chosen is None:
        return None
    alike = [each for each in tensors if each.is_floating_point() and each.shape == chosen.shape]
    return (alike[-1], chosen) if len(alike) == (2 if chosen.shape[1] == experts else 1) else None


def alike(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> bool:
    """Whether two choices are the same experts with the same weights, whatever their order."""
    (weights, chosen), (other_weights, other_chosen) = ours, theirs
    order, other_order = chosen.argsort(-1), other_chosen.argsort(-1)
    same = torch.equal(chosen.gather(-1, order), other_chosen.gather(-1, other_order))
    gap = weights.gather(-1, order).float() - other_weights.gather(-1, other_order).float()
    return same and bool(gap.abs().max() < LIKE_OURS)
