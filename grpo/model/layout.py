"""Where the training graph's tensors are in vLLM's parameters: which linear layers vLLM stacks, and in which order.

A `Layout` is found by watching vLLM load a model without weights (`layout_trace.py`). What was found for the families
that are tested is kept in `layout_records.py`, in a form that holds for any number of layers: from it a layout is made
without vLLM, for planning, exports and supervised training. Families that have no record are traced first.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
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
USUAL = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")
"""The linear layers of decoders of the usual kind, whose sizes follow from those of the model."""
"""The first of transformers' two parameters of a block's experts."""

LAYER = re.compile(r"(?<=\.)\d+(?=\.)")
"""The number of a layer in a dotted name."""

Pattern = dict[str, tuple[str, ...]]
"""vLLM's linear layer -> the graph's whose rows it stacks, in order; `*` stands for a layer's number. One that comes
twice has its rows in two places of vLLM's layer."""


@dataclass(frozen=True)
class Record:
    """How vLLM lays out a family, whatever its sizes."""

    linears: Pattern
    renamed: dict[str, str] = field(default_factory=dict)
    """The graph's name of a tensor outside linear layers -> vLLM's, where they differ."""
    others: dict[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    """vLLM's linear layer -> what it stacks in layers that have not all that `linears` names."""
    unread: tuple[str, ...] = ()
    """vLLM's tensors outside linear layers that it fills from nothing of the graph, and leaves as it made them."""
    float32: tuple[str, ...] = ()
    """The graph's names of the tensors that vLLM keeps in float32, whatever it computes in."""

    def digest(self) -> str:
        """A short name of the content: another one says that vLLM changed."""
        rare = [each for each in (self.others, self.unread, self.float32) if each]
        return hashlib.sha256(json.dumps([self.linears, self.renamed, *rare], sort_keys=True).encode()).hexdigest()[:12]

    def with_stacks(self, other: Record) -> Record:
        """This one, with what `other`, of another model of the family, stacks in kinds of layers that it has not."""
        linears, others = {**other.linears, **self.linears}, dict(self.others)
        for fused, parts in other.stacks():
            known = (linears[fused], *others.get(fused, ()))
            others |= {} if parts in known else {fused: (*known[1:], parts)}
        unread, float32 = (
            tuple(dict.fromkeys(each)) for each in (self.unread + other.unread, self.float32 + other.float32)
        )
        return Record(linears, other.renamed | self.renamed, others, unread, float32)

    def stacks(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """(vLLM's linear layer, what it stacks) for every kind of layer."""
        yield from self.linears.items()
        yield from ((fused, parts) for fused, several in self.others.items() for parts in several)

    def stacked(self, linears: Collection[str]) -> dict[str, tuple[str, ...]]:
        """vLLM's name of each linear layer -> which of `linears`, the graph's, it stacks, in order.

        Each is a part of the largest stack of which its layer has all parts. Raises KeyError for one that is in none.
        """
        found: dict[str, tuple[str, ...]] = {}
        candidates: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
        for fused, parts in self.stacks():
            for part in set(parts):
                candidates.setdefault(part, []).append((fused, parts))
        for name in linears:
            best: tuple[str, tuple[str, ...]] = ("", ())
            for fused, parts in candidates.get(pattern_of(name), []):
                named = tuple(numbered(part, name) for part in parts)
                if len(set(named)) > len(set(best[1])) and all(part in linears for part in named):
                    best = (numbered(fused, name), named)
            if not best[0]:
                raise KeyError(name)
            found[best[0]] = best[1]
        return found


@dataclass(frozen=True)
class LinearLayout:
    """One of vLLM's linear layers [out_features, in_features]."""

    parts: dict[str, tuple[int, int]]
    """The graph's module -> (first row, rows)."""
    in_features: int
    out_features: int
    biased: tuple[str, ...]
    """The parts that have a bias."""
    again: tuple[str, ...] = ()
    """Parts whose rows vLLM's layer has once more, behind all others and in this order."""


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
    by_token: frozenset[str]
    """Those of `tensors` with a row for every token of the vocabulary."""
    unread: frozenset[str]
    """Patterns of vLLM's tensors that have no counterpart in the graph."""
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
        try:
            stacked = record.stacked(graph.linears)
        except KeyError as error:
            name = error.args[0]
            raise UserError(f"vLLM has no linear layer for {name} of the family {config.model_type!r}") from None
        linears = {fused: stack(parts, graph.linears) for fused, parts in stacked.items()}
        tensors = {name: served_name(record, name) for name in graph.plain}
        experts = {
            name: ExpertsLayout(each, served_name(record, f"{name}.{GATE_UP}").rpartition(".")[0])
            for name, each in graph.experts.items()
        }
        float32 = frozenset(name for name in graph.plain if pattern_of(name) in record.float32)
        unread = frozenset(record.unread)
        return cls(linears, tensors, graph.shapes(), graph.by_token, unread, experts, float32)


def served_name(record: Record, name: str) -> str:
    """vLLM's name of the graph's tensor `name`, which is in no linear layer."""
    return numbered(record.renamed.get(pattern_of(name), pattern_of(name)), name)


def stack(parts: Sequence[str], sizes: Mapping[str, Any]) -> LinearLayout:
    """The rows of `parts`, one below the other; one that comes twice is kept once. `sizes`: GraphLinear of each."""
    first, rows = 0, {}
    for part in dict.fromkeys(parts):
        rows[part] = (first, sizes[part].rows)
        first += sizes[part].rows
    again = tuple(parts[len(rows) :])
    if tuple(rows) != tuple(parts[: len(rows)]):
        raise UserError(f"vLLM keeps {again[0]} twice, not behind all else of its layer; use a model of another family")
    biased = tuple(part for part in rows if sizes[part].bias)
    return LinearLayout(rows, sizes[parts[0]].columns, first, biased, again)


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


def is_known(config: DecoderConfig, vllm: str | None) -> bool:
    """Whether it is known how the version `vllm` lays out the model of transformers' `config`: this process has traced
    one of its kind, or the record holds for that version and kind."""
    if config.model_type not in _learned and not is_recorded(config.model_type, vllm):
        return False
    try:
        Layout.of(config)
    except UserError:
        return False
    return True


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
    """Use what was traced, beside what was traced of the family before."""
    before = _learned.get(model_type)
    _learned[model_type] = record if before is None else record.with_stacks(before)


def fused_linears(shape: Any) -> dict[str, list[str]]:
    """vLLM's name of every linear layer to the graph's module names whose rows it stacks.

    shape: transformers' configuration, whose graph is asked; or a plan's Shape, of which only the family, the number of
    layers, their kinds and which of them have experts are read: those of a kind are taken to be alike.
    """
    known = record_of(shape.model_type)
    record = known or Record(**LAYOUTS[FAMILIES["llama"]])
    if known and hasattr(shape, "to_dict"):
        from grpo.model.meta_graph import graph_tensors

        stacked = record.stacked(graph_tensors(shape).linears)
        return {fused: list(dict.fromkeys(parts)) for fused, parts in stacked.items()}
    return {
        pattern.replace("*", str(layer)): [part.replace("*", str(layer)) for part in parts]
        for layer in range(shape.num_hidden_layers)
        for pattern, parts in record.linears.items()
        if is_in_mlp(parts[0], shape, layer) and is_in_layer(parts[0], shape, layer)
    }


def usual_linears(model_type: str) -> bool:
    """Whether the linear layers of the family have the names, and so the sizes, that a plan's Shape knows."""
    known = record_of(model_type)
    return known is None or all(part.rpartition(".")[2] in USUAL for parts in known.linears.values() for part in parts)


def is_in_layer(part: str, shape: Any, layer: int) -> bool:
    """Whether the layer of that number has the module `part`, a pattern of the graph's names."""
    mixers = family_of(shape.model_type).mixers
    module = part.partition(".*.")[2].partition(".")[0]
    return module not in mixers.values() or mixers[shape.layer_types[layer]] == module
