"""Where the training graph's tensors are in vLLM's parameters: which linear layers vLLM stacks, and in which order.

A `Layout` is found by watching vLLM load a model without weights (`layout_trace.py`). What was found for the families
that are tested is kept in `layout_records.py`, in a form that holds for any number of layers: from it a layout is made
without vLLM, for planning, exports and supervised training. Families that have no record are traced first.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from grpo.errors import UserError
from grpo.model.decoder_config import DecoderConfig
from grpo.model.expert_sizes import is_in_mlp
from grpo.model.families.table import family_of
from grpo.model.layout_records import FAMILIES, LAYOUTS, SEEN

if TYPE_CHECKING:
    from grpo.model.graph_experts import GraphExperts

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
"""Parameters with a row for every token of the vocabulary."""

GATE_UP = "gate_up_proj"
"""The first of transformers' two parameters of a block's experts."""

LAYER = re.compile(r"(?<=\.)\d+(?=\.)")
"""The number of a layer in a dotted name."""

Pattern = dict[str, tuple[str, ...]]
"""vLLM's linear layer -> the graph's whose rows it stacks, in order; `*` stands for a layer's number."""


@dataclass(frozen=True)
class Record:
    """How vLLM lays out a family, whatever its sizes."""

    linears: Pattern
    renamed: dict[str, str] = field(default_factory=dict)
    """The graph's name of a tensor outside linear layers -> vLLM's, where they differ."""
    float32: tuple[str, ...] = ()
    """The graph's names of the tensors that vLLM keeps in float32, whatever it computes in."""

    def digest(self) -> str:
        """A short name of the content: another one says that vLLM changed."""
        content = json.dumps([self.linears, self.renamed, *([self.float32] if self.float32 else [])], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class LinearLayout:
    """One of vLLM's linear layers [out_features, in_features]."""

    parts: dict[str, tuple[int, int]]
    """The graph's module -> (first row, rows)."""
    in_features: int
    out_features: int
    biased: tuple[str, ...]
    """The parts that have a bias."""


@dataclass(frozen=True)
class ExpertsLayout:
    """The experts of a block, which both graphs keep in the same order."""

    graph: GraphExperts
    served: str
    """vLLM's module that has them."""


@dataclass(frozen=True)
class Layout:
    """The whole of a model: every tensor of the graph is in one of `linears`, `tensors` and `experts`."""

    linears: dict[str, LinearLayout]
    """vLLM's module name -> its rows."""
    tensors: dict[str, str]
    """The graph's name of every other tensor -> vLLM's parameter or buffer."""
    shapes: dict[str, tuple[int, ...]]
    """The graph's name of every tensor -> its shape."""
    experts: dict[str, ExpertsLayout] = field(default_factory=dict)
    """The graph's name of a block's experts -> where vLLM has them."""
    float32: frozenset[str] = frozenset()
    """Those of `tensors` that are float32, whatever is computed in."""

    @classmethod
    def of(cls, config: DecoderConfig) -> Layout:
        """Of transformers' `config` of a text model whose family has a record. Raises UserError for one without."""
        from grpo.model.meta_graph import graph_tensors

        record, graph = record_of(config.model_type), graph_tensors(config)
        if record is None:
            raise UserError(f"no layout is known of the family {config.model_type!r}; train or generate with it first")
        fused_of = {part: fused for fused, parts in record.linears.items() for part in parts}
        stacked: dict[str, dict[str, int]] = {}
        for name in graph.linears:
            pattern = pattern_of(name)
            if pattern not in fused_of:
                raise UserError(f"vLLM has no linear layer for {name} of the family {config.model_type!r}")
            index = record.linears[fused_of[pattern]].index(pattern)
            stacked.setdefault(numbered(fused_of[pattern], name), {})[name] = index
        linears = {
            fused: stack(sorted(parts, key=parts.__getitem__), graph.linears) for fused, parts in stacked.items()
        }
        tensors = {name: served_name(record, name) for name in graph.plain}
        experts = {
            name: ExpertsLayout(each, served_name(record, f"{name}.{GATE_UP}").rpartition(".")[0])
            for name, each in graph.experts.items()
        }
        float32 = frozenset(name for name in graph.plain if pattern_of(name) in record.float32)
        return cls(linears, tensors, graph.shapes(), experts, float32)


def served_name(record: Record, name: str) -> str:
    """vLLM's name of the graph's tensor `name`, which is in no linear layer."""
    return numbered(record.renamed.get(pattern_of(name), pattern_of(name)), name)


def stack(parts: list[str], sizes: Mapping[str, Any]) -> LinearLayout:
    """The rows of `parts`, one below the other. `sizes`: GraphLinear of each."""
    first, rows = 0, {}
    for part in parts:
        rows[part] = (first, sizes[part].rows)
        first += sizes[part].rows
    biased = tuple(part for part in parts if sizes[part].bias)
    return LinearLayout(rows, sizes[parts[0]].columns, first, biased)


def pattern_of(name: str) -> str:
    """`name` with a `*` for the number of its layer."""
    return LAYER.sub("*", name, count=1)


def numbered(pattern: str, like: str) -> str:
    """`pattern` with the number of the layer that `like` is in."""
    number = LAYER.search(like)
    return pattern if number is None else pattern.replace("*", number.group())


ALIKE = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3")
"""Families that every vLLM from 0.26 on lays out as recorded."""

_learned: dict[str, Record] = {}
"""Families that this process has traced."""


def is_traced(model_type: str) -> bool:
    """Whether this process has traced the family."""
    return model_type in _learned


def record_of(model_type: str) -> Record | None:
    """How vLLM lays out the family, as traced in this process or as recorded; None where neither is known."""
    if model_type in _learned:
        return _learned[model_type]
    return Record(**LAYOUTS[FAMILIES[model_type]]) if model_type in FAMILIES else None


def is_recorded(model_type: str, vllm: str | None) -> bool:
    """Whether the record of the family is known to hold for the version `vllm`; None: for planning, without vLLM."""
    if model_type not in FAMILIES or vllm is None or model_type in ALIKE:
        return model_type in FAMILIES
    return model_type in SEEN.get(".".join(vllm.split("+")[0].split(".")[:2]), {})


def learn(model_type: str, record: Record) -> None:
    """Use what was traced."""
    _learned[model_type] = record


def fused_linears(shape: Any) -> dict[str, list[str]]:
    """vLLM's name of every linear layer to the graph's module names whose rows it stacks.

    shape: a plan's Shape, or transformers' configuration, of which only the family, the number of layers, their kinds
    and which of them have experts are read: those of a kind are taken to be alike.
    """
    record = record_of(shape.model_type) or Record(**LAYOUTS[FAMILIES["llama"]])
    return {
        pattern.replace("*", str(layer)): [part.replace("*", str(layer)) for part in parts]
        for layer in range(shape.num_hidden_layers)
        for pattern, parts in record.linears.items()
        if is_in_mlp(parts[0], shape, layer) and is_in_layer(parts[0], shape, layer)
    }


def is_in_layer(part: str, shape: Any, layer: int) -> bool:
    """Whether the layer of that number has the module `part`, a pattern of the graph's names."""
    mixers = family_of(shape.model_type).mixers
    module = part.partition(".*.")[2].partition(".")[0]
    return module not in mixers.values() or mixers[shape.layer_types[layer]] == module
