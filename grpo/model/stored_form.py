"""What a checkpoint calls the tensors of a training graph, where transformers renames or stacks them when it reads.

Experts are a matrix each in the files of most families and one stacked parameter in the graph. Nothing of that is
listed: transformers writes a model of sizes that are next to nothing, whose numbers say where they come from.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from grpo.errors import UserError
from grpo.model import weight_source
from grpo.model.checks import one_line
from grpo.model.decoder_config import DecoderConfig
from grpo.model.meta_graph import graph_tensors, meta_graph
from grpo.model.weight_source import Source

HALF, COLUMNS = 2, 3
"""Rows of a gate, and columns, in the model that is written."""
SPREAD = 1 << 20
"""Numbers that one stacked parameter may have there."""


@dataclass(frozen=True)
class Piece:
    """Rows of one expert, or all rows of all experts, of a stacked parameter."""

    name: str
    """In the checkpoint."""
    expert: int | None
    """None: all of them."""
    first_row: int
    rows: int


@dataclass(frozen=True)
class StoredForm:
    """Where a checkpoint keeps what the graph has under another name or in another form."""

    renamed: dict[str, str]
    """The graph's name of a whole tensor -> the checkpoint's."""
    pieces: dict[str, tuple[Piece, ...]]
    """The graph's name of a parameter of experts -> what it is put together from."""


def stored_form(config: DecoderConfig) -> StoredForm:
    """Of transformers' `config` of a text model. Raises UserError where transformers writes another form."""
    tensors = graph_tensors(config)
    if not tensors.experts:
        return StoredForm({}, {})
    kind: Any = type(config)
    return _stored_form(kind, config.to_json_string())


def read_whole(source: Source, name: str) -> Tensor:
    """The tensor of the graph of `source` called `name`, float32 where it was packed or put together, else as stored.

    Raises UserError for one, or a piece of one, that is missing.
    """
    form = stored_form(source.config.get_text_config())
    if name not in form.pieces:
        return dense(source, form.renamed.get(name, name))
    pieces = form.pieces[name]
    if pieces[0].expert is None:
        return dense(source, pieces[0].name)
    rows: dict[int, dict[int, Tensor]] = {}
    for piece in pieces:
        assert piece.expert is not None
        rows.setdefault(piece.expert, {})[piece.first_row] = dense(source, piece.name).float()
    return torch.stack([torch.cat([parts[row] for row in sorted(parts)]) for _, parts in sorted(rows.items())])


def dense(source: Source, name: str) -> Tensor:
    """The checkpoint's tensor `name`, dequantised to float32 where it is packed."""
    if name not in source.names:
        raise UserError(f"{source.path}: tensor {name} is missing")
    return weight_source.dense(source.read(name))


@lru_cache(maxsize=8)
def _stored_form(kind: Any, values: str) -> StoredForm:
    config = kind.from_dict(json.loads(values) | {"pad_token_id": None})
    tensors = graph_tensors(config)
    stacks = {f"{name}.{key}": each.shapes()[key] for name, each in tensors.experts.items() for key in each.matrices()}
    plain_names, stack_names = [name for name in tensors.shapes() if name not in stacks], list(stacks)
    marked = {name: torch.tensor([-1 - number]) for number, name in enumerate(plain_names)}
    small = {name: small_stack(number, name, stacks[name][0]) for number, name in enumerate(stack_names)}
    written = as_written(config, marked | small)
    renamed: dict[str, str] = {}
    pieces: dict[str, list[Piece]] = {name: [] for name in stacks}
    for name, tensor in written.items():
        first = int(tensor.reshape(-1)[0])
        if first < 0:
            if plain_names[-1 - first] != name:
                renamed[plain_names[-1 - first]] = name
            continue
        parameter = stack_names[first // SPREAD]
        pieces[parameter].append(piece_of(config, name, tensor, parameter, stacks[parameter], first % SPREAD))
    return StoredForm(renamed, {name: tuple(each) for name, each in pieces.items()})


def small_stack(number: int, name: str, experts: int) -> Tensor:
    """The `number`-th stacked parameter with next to no rows, counted through."""
    rows = 2 * HALF if name.endswith("gate_up_proj") else HALF
    size = experts * rows * COLUMNS
    return torch.arange(size, dtype=torch.int64).add_(number * SPREAD).view(experts, rows, COLUMNS)


def as_written(config: DecoderConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` of the graph of `config` as transformers writes them."""
    from transformers.core_model_loading import revert_weight_conversion

    try:
        return revert_weight_conversion(meta_graph(config), tensors)
    except Exception as error:  # whatever a family's conversion makes of sizes that it did not expect
        raise UserError(
            f"how transformers writes the experts of {config.model_type!r} is not understood ({one_line(error)}); use "
            "a model of another family"
        ) from None


def piece_of(
    config: DecoderConfig, name: str, tensor: Tensor, parameter: str, shape: tuple[int, ...], first: int
) -> Piece:
    """Where in the stacked `parameter` of `shape` the written `tensor` belongs, whose first number is `first`."""
    rows = 2 * HALF if parameter.endswith("gate_up_proj") else HALF
    counted = torch.arange(tensor.numel()).view(tensor.shape)
    expert, inside = divmod(first, rows * COLUMNS)
    whole = tensor.ndim == 3 and first == 0 and tensor.shape[0] == shape[0]
    if not torch.equal(tensor % SPREAD - first, counted) or tensor.shape[-1] != COLUMNS or (tensor.ndim == 3) != whole:
        raise UserError(
            f"transformers writes {parameter} of {config.model_type!r} as {name}, in another order, which is not read; "
            "use a model of another family"
        )
    scale = shape[1] // rows
    return Piece(name, None if whole else expert, inside // COLUMNS * scale, tensor.shape[-2] * scale)
