"""The experts of a block in the one copy: two stacked matrices, which vLLM and the training graph keep alike.

Pieces of a checkpoint are read one at a time, quantised and written where they belong. Nothing here computes anything;
that is `grpo.kernels.experts`, for both graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo.errors import UserError
from grpo.kernels import mxfp4
from grpo.kernels.experts import ExpertMatrix, Experts
from grpo.model.decoder_config import DecoderConfig
from grpo.model.graph_experts import GraphExperts, Routing
from grpo.model.layout import ExpertsLayout
from grpo.model.stored_form import Piece, stored_form
from grpo.model.weight_source import MXFP4Tensor, Packed, Source, dense

ROWS = 1 << 14
"""Of matrices in MXFP4, whose values are made at once."""

Allocate = Callable[[int, int, Tensor | Packed], tuple[Tensor, Tensor | None]]
"""(rows, columns, what is to be kept) -> empty storage: dense, or packed with its scales."""
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
    graph: GraphExperts
    """How the graph has them."""

    def storages(self) -> Iterator[Tensor]:
        """Every owned tensor."""
        for matrix in (self.experts.gate_up, self.experts.down):
            yield from (tensor for tensor in (matrix.weight, matrix.absmax, matrix.bias) if tensor is not None)


def load_stack(
    source: Source, config: DecoderConfig, name: str, layout: ExpertsLayout, allocate: Allocate, fill: Fill
) -> ExpertStack:
    """Read the experts `name` of the graph of `config` from `source`, one piece after the other."""
    pieces, graph = stored_form(config).pieces, layout.graph
    matrices = []
    for parameter, (rows, columns) in graph.matrices().items():
        storage: tuple[Tensor, Tensor | None] | None = None
        for piece in pieces[f"{name}.{parameter}"]:
            tensor = source.read(piece.name)
            storage = storage or allocate(graph.experts * rows, columns, tensor)
            fill_piece(tensor, piece, parameter, graph, storage, fill)
        assert storage is not None
        matrices.append(ExpertMatrix(*storage, graph.experts, load_bias(source, name, parameter, graph, storage)))
    gate_up, down = matrices
    experts = Experts(gate_up, down, graph.form.activation)
    return ExpertStack(name, layout.served, graph.router, graph.routing, experts, graph)


def fill_piece(
    tensor: Tensor | Packed,
    piece: Piece,
    parameter: str,
    graph: GraphExperts,
    storage: tuple[Tensor, Tensor | None],
    fill: Fill,
) -> None:
    """Write `tensor`, a piece of the experts' `parameter`, to where it belongs."""
    (rows, columns), (weight, scales) = graph.matrices()[parameter], storage
    if piece.expert is not None:
        if graph.form.transposed or graph.form.interleaved:
            raise UserError(f"{piece.name} of one expert, in an order of its own, is not read; use another model")
        fill(tensor, weight, scales, piece.expert * rows + piece.first_row, (piece.rows, columns))
        return
    if isinstance(tensor, MXFP4Tensor):
        codes, exponents = (each.to(weight.device) for each in (tensor.codes, tensor.exponents))
        codes = graph.rows(parameter, codes.flatten(2)).unflatten(2, codes.shape[2:])
        fill_mxfp4(codes.flatten(0, 1), graph.rows(parameter, exponents).flatten(0, 1), storage, piece.name)
        return
    for expert, matrix in enumerate(dense(tensor).reshape(graph.shapes()[parameter])):
        kept = graph.rows(parameter, matrix.mT if graph.form.transposed else matrix).contiguous()
        fill(kept, weight, scales, expert * rows, (rows, columns))


def fill_mxfp4(codes: Tensor, exponents: Tensor, storage: tuple[Tensor, Tensor | None], name: str) -> None:
    """Write all experts' matrices in MXFP4, packed or as their values. Raises UserError for values that the storage
    does not hold exactly."""
    weight, scales = storage
    if not mxfp4.is_exact(codes, exponents):
        raise UserError(f"{name} has values that bfloat16 cannot hold; use another checkpoint of the model")
    if scales is not None:
        mxfp4.pack_rows(weight, scales, 0, codes, exponents)
        return
    for rows in range(0, len(codes), ROWS):
        values = mxfp4.value(codes[rows : rows + ROWS], exponents[rows : rows + ROWS], torch.float32)
        kept = weight[rows : rows + ROWS]
        kept.copy_(values)
        if not torch.equal(kept.float(), values):
            raise UserError(f'{name} has values that float16 cannot hold; set model.dtype = "bfloat16"')


def load_bias(
    source: Source, name: str, parameter: str, graph: GraphExperts, storage: tuple[Tensor, Tensor | None]
) -> Tensor | None:
    """The bias of every expert [experts, out], in the order of the rows that are kept."""
    if not graph.form.biased:
        return None
    weight, scales = storage
    bias = graph.rows(f"{parameter}_bias", dense(source.read(f"{name}.{parameter}_bias")))
    return bias.to(weight.device, ExpertMatrix(weight, scales, graph.experts).dtype).contiguous()
