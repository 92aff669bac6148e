"""How many experts a model has, how large they are, and in which layers, by arithmetic from its configuration.

For planning: torch is not imported. What the graph has is in `graph_experts.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Entries of configurations that say how many experts a layer has."""


MATRICES = ("gate_up_proj", "down_proj")
"""transformers' stacked parameters of the experts of a block."""


class ExpertSizes(NamedTuple):
    """The experts of a layer, each gate_up [2 * inner, hidden] and down [hidden, inner]."""

    experts: int
    chosen: int
    """Of them for each token."""
    inner: int
    hidden: int
    layers: int
    """That have some."""

    @property
    def matrices(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(rows, columns) of all experts' gate_up, one below the other, and of their down."""
        return (self.experts * 2 * self.inner, self.hidden), (self.experts * self.hidden, self.inner)


def expert_sizes(shape: Any) -> ExpertSizes | None:
    """Of a plan's Shape or transformers' configuration; None of a dense model."""
    experts = expert_count(shape)
    if not experts:
        return None
    inner = getattr(shape, "moe_intermediate_size", None) or shape.intermediate_size
    layers = sum(is_sparse(shape, layer) for layer in range(shape.num_hidden_layers))
    return ExpertSizes(experts, shape.num_experts_per_tok, inner, shape.hidden_size, layers)


def expert_count(shape: Any) -> int:
    """Experts of a layer that has some; 0 of a dense model."""
    return next((count for key in COUNTS if (count := getattr(shape, key, None))), 0)


def is_sparse(shape: Any, layer: int) -> bool:
    """Whether the layer of that number has experts in place of one MLP."""
    step = getattr(shape, "decoder_sparse_step", None) or 1
    only = getattr(shape, "mlp_only_layers", None) or ()
    return bool(expert_count(shape)) and layer not in only and (layer + 1) % step == 0


def is_in_mlp(part: str, shape: Any, layer: int) -> bool:
    """Whether the layer of that number has `part`, a pattern of the graph's names, as far as its MLP decides that."""
    _, _, inside = part.partition(".*.mlp.")
    if not inside or not expert_count(shape):
        return True
    return is_sparse(shape, layer) == ("." in inside)  # `mlp.shared_expert.up_proj`, or `mlp.up_proj` of a dense layer
