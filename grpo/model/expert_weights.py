"""The experts of a block in the one copy: two stacked matrices, which vLLM and the training graph keep alike.

Pieces of a checkpoint are read one at a time, quantised and written where they belong. Nothing here computes anything;
that is `grpo.kernels.experts`, for both graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from grpo.errors import UserError
from grpo.kernels.experts import ExpertMatrix, Experts
from grpo.kernels.glu import ACTIVATIONS
from grpo.model.decoder_config import DecoderConfig
from grpo.model.expert_sizes import MATRICES
from grpo.model.graph_experts import Routing
from grpo.model.layout import ExpertsLayout
from grpo.model.stored_form import Piece, stored_form
from grpo.model.weight_source import Packed, Source, dense

TRANSFORMERS_NAMES = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""transformers' names of the activations that kernels/glu.py has."""
assert set(TRANSFORMERS_NAMES.values()) == set(ACTIVATIONS)

Allocate = Callable[[int, int], tuple[Tensor, Tensor | None]]
"""(rows, columns) -> empty storage: dense, or packed with its scales."""
Fill = Callable[[Tensor | Packed, Tensor, Tensor | None, int, tuple[int, int]], None]
"""Writes a weight of that shape to rows of the storage."""


@dataclass(frozen=True)
class ExpertStack:
    """The experts of one block, with how they are chosen."""

    name: str
    """The graph's module."""
    served: str
    """vLLM's module."""
    router: str
    """The graph's module whose weight [experts, hidden] scores them."""
    routing: Routing
    experts: Experts

    def storages(self) -> Iterator[Tensor]:
        """Every owned tensor."""
        for matrix in (self.experts.gate_up, self.experts.down):
            yield matrix.weight
            if matrix.absmax is not None:
                yield matrix.absmax


def activation_of(config: DecoderConfig) -> str:
    """What the experts' gates go through, by its name in kernels/glu.py. Raises UserError for another."""
    if config.hidden_act not in TRANSFORMERS_NAMES:
        raise UserError(
            f"experts with the activation {config.hidden_act!r} (hidden_act) are not computed, of "
            f"{', '.join(TRANSFORMERS_NAMES)} alone; use another model"
        )
    return TRANSFORMERS_NAMES[config.hidden_act]


def load_stack(
    source: Source, config: DecoderConfig, name: str, layout: ExpertsLayout, allocate: Allocate, fill: Fill
) -> ExpertStack:
    """Read the experts `name` of the graph of `config` from `source`, one piece after the other."""
    pieces, graph = stored_form(config).pieces, layout.graph
    matrices = []
    for parameter in MATRICES:
        _, rows, columns = graph.shapes()[parameter]
        weight, absmax = allocate(graph.experts * rows, columns)
        for piece in pieces[f"{name}.{parameter}"]:
            fill_piece(source, piece, weight, absmax, (rows, columns), fill)
        matrices.append(ExpertMatrix(weight, absmax, graph.experts))
    gate_up, down = matrices
    experts = Experts(gate_up, down, activation_of(config))
    return ExpertStack(name, layout.served, graph.router, graph.routing, experts)


def fill_piece(
    source: Source, piece: Piece, weight: Tensor, absmax: Tensor | None, shape: tuple[int, int], fill: Fill
) -> None:
    """Write one piece, of experts with matrices of `shape`, to where it belongs."""
    rows, columns = shape
    tensor = source.read(piece.name)
    if piece.expert is not None:
        fill(tensor, weight, absmax, piece.expert * rows + piece.first_row, (piece.rows, columns))
        return
    for expert, matrix in enumerate(dense(tensor).reshape(-1, rows, columns)):
        fill(matrix, weight, absmax, expert * rows, (rows, columns))
