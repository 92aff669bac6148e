"""Mixtures of experts in a training graph, found by their form: where experts are, and how their router chooses.

transformers keeps the experts of a block as stacked matrices beside a router. What the router computes, and what is
made of gates, is not asked of the class's name: both are run on random numbers, and compared with what `grpo.kernels`
computes, which is what both graphs run. A router that chooses otherwise is refused by name, and so are other gates.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from grpo.errors import UserError
from grpo.kernels.experts import route
from grpo.kernels.glu import ACTIVATIONS, glu_forward
from grpo.model.checks import one_line
from grpo.model.expert_sizes import MATRICES

BIASES = tuple(f"{name}_bias" for name in MATRICES)
"""transformers' parameters of experts with biases, [experts, out] each."""

TRIED_TOKENS = 64
"""Random inputs of a router that is compared."""
LIKE_OURS = 1e-4
"""Largest difference of a weight."""


class Routing(NamedTuple):
    """How a token's experts are chosen: the `top_k` of the softmax over all, perhaps renormalised to add up to 1."""

    top_k: int
    renormalize: bool


@dataclass(frozen=True)
class Form:
    """How transformers keeps the experts of a block."""

    activation: str
    """What gates go through, one of kernels/glu.py."""
    transposed: bool = False
    """Whether matrices are [in, out]."""
    interleaved: bool = False
    """Whether a row of gates is followed by that of its up, rather than all gates by all ups."""
    biased: bool = False


@dataclass(frozen=True)
class GraphExperts:
    """The experts of one block: of each gate_up_proj [2 * inner, hidden] and down_proj [hidden, inner]."""

    experts: int
    inner: int
    hidden: int
    router: str
    """The module that chooses among them."""
    routing: Routing
    form: Form

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Parameter -> (out, in) of one expert, however it is kept."""
        return dict(zip(MATRICES, ((2 * self.inner, self.hidden), (self.hidden, self.inner)), strict=True))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter -> shape."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, size in self.matrices().items():
            shapes[name] = (self.experts, *(reversed(size) if self.form.transposed else size))
        if self.form.biased:
            shapes |= {f"{name}_bias": (self.experts, rows) for name, (rows, _) in self.matrices().items()}
        return shapes

    def rows(self, parameter: str, tensor: Tensor) -> Tensor:
        """`tensor` [..., out] or [..., out, in] of the graph's order of rows with all gates before all ups; the second
        form is not the graph's where that is transposed."""
        if not self.form.interleaved or not parameter.startswith(MATRICES[0]):
            return tensor
        row = -1 if parameter in BIASES else -2
        pairs = tensor.unflatten(row, (-1, 2))
        return pairs.transpose(*((-1, -2) if row == -1 else (-2, -3))).flatten(row - 1, row)


def experts_in(graph: nn.Module) -> dict[str, GraphExperts]:
    """Module name -> experts, of every block of `graph`, on meta, that has some. Raises UserError for other kinds."""
    found: dict[str, GraphExperts] = {}
    known: dict[tuple[type, type, int, int], tuple[Form, Routing]] = {}
    for name, module in graph.named_modules():
        if not holds_experts(module):
            continue
        check_form(name, module)
        transposed = bool(getattr(module, "is_transposed", False))
        experts, inner, hidden = module.down_proj.shape if transposed else module.down_proj.mT.shape
        router_name, router = router_beside(graph, name, experts, hidden)
        key = type(module), type(router), experts, hidden
        if key not in known:
            known[key] = form_of(module, transposed), routing_of(router, experts, hidden)
        form, routing = known[key]
        found[name] = GraphExperts(experts, inner, hidden, router_name, routing, form)
    return found


def holds_experts(module: nn.Module) -> bool:
    """Whether `module` has matrices of several experts."""
    return any(each.ndim == 3 and key.endswith("_proj") for key, each in module.named_parameters(recurse=False))


def check_form(name: str, module: nn.Module) -> None:
    """Raise UserError for experts that are not computed here."""
    parameters = {key: tuple(each.shape) for key, each in module.named_parameters(recurse=False)}
    biased = set(parameters) == {*MATRICES, *BIASES}
    usual = (biased or set(parameters) == set(MATRICES)) and getattr(module, "has_gate", True)
    if not usual or getattr(module, "has_bias", biased) != biased:
        raise UserError(
            f"the experts of transformers' {type(module).__name__} ({name}: {', '.join(sorted(parameters))}) are no "
            "gated MLPs, with a bias in both products or in none, which are the ones that are computed; use a model of "
            "another family"
        )


def form_of(module: nn.Module, transposed: bool) -> Form:
    """How `module` keeps its experts, and what it makes of gates, which is tried on random numbers. Raises UserError
    where that is none of what is computed."""
    biased = BIASES[0] in dict(module.named_parameters(recurse=False))
    interleaved = not getattr(module, "is_concatenated", True)
    pairs = torch.randn(TRIED_TOKENS, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float32) * 6
    theirs = run(lambda x: gated(module, x), pairs, module)
    ours = torch.cat([pairs[:, ::2], pairs[:, 1::2]], 1) if interleaved else pairs
    for activation in ACTIVATIONS:
        if float((glu_forward(ours, activation) - theirs).abs().max()) < LIKE_OURS:
            return Form(activation, transposed, interleaved, biased)
    raise UserError(
        f"transformers' {type(module).__name__} makes of gates something else than is computed, which is "
        f"{', '.join(ACTIVATIONS)}; use a model of another family"
    )


def gated(module: Any, gate_up: Tensor) -> Tensor:
    """What the experts `module` make of gates and ups [rows, 2 * inner] in its order."""
    with torch.device("cpu"), torch.no_grad():
        if hasattr(module, "_apply_gate"):
            return module._apply_gate(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return module.act_fn(gate) * up


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
        theirs = parts(run(tried, x, tried), experts)
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


def run(call: Any, x: Tensor, module: nn.Module) -> Any:
    """`call`(x), of a router or experts. Raises UserError where it fails, as a router that chooses more experts than
    there are."""
    try:
        return call(x)
    except Exception as error:
        raise UserError(
            f"transformers' {type(module).__name__} does not run as config.json describes it ({one_line(error)}); "
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
