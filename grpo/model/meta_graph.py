"""What a training graph consists of, asked of the graph itself: transformers' model built on the meta device.

Names, shapes and biases of its linear layers, and every other tensor, for any configuration, without weights and
without formulas of ours. How vLLM stacks them is `layout.py`'s.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from grpo.errors import UserError
from grpo.model.checks import one_line
from grpo.model.decoder_config import IMAGE_POSITIONS, DecoderConfig
from grpo.model.graph_experts import GraphExperts, experts_in

HEAD = "lm_head.weight"
FEWEST_ROWS = 2
"""A product with one output, such as the gate of a shared expert, is no linear layer to us: no adapter, no NF4."""
FRAME = ("model.embed_tokens", "model.layers.0", "lm_head")
"""Modules around and in the stack of layers."""
LAST_NORMS = ("norm", "embedding_norm")
"""What families call the one behind the layers, in `model`."""


@dataclass(frozen=True)
class GraphLinear:
    """A linear layer of the graph: weight [rows, columns], perhaps a bias [rows]."""

    rows: int
    columns: int
    bias: bool


@dataclass(frozen=True)
class GraphTensors:
    """Every tensor that a graph reads from a checkpoint."""

    linears: dict[str, GraphLinear]
    """Module name -> its sizes; the output head is not among them."""
    plain: dict[str, tuple[int, ...]]
    """Name -> shape of everything else, the output head only where it is not the embedding."""
    by_token: frozenset[str] = frozenset()
    """Those of `plain` with a row for every token of the vocabulary."""
    experts: dict[str, GraphExperts] = field(default_factory=dict)
    """Module name -> the experts in it."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor, those of linear layers and experts too."""
        result: dict[str, tuple[int, ...]] = dict(self.plain)
        for name, linear in self.linears.items():
            result[f"{name}.weight"] = (linear.rows, linear.columns)
            if linear.bias:
                result[f"{name}.bias"] = (linear.rows,)
        for name, experts in self.experts.items():
            result |= {f"{name}.{parameter}": shape for parameter, shape in experts.shapes().items()}
        return result


def meta_graph(config: DecoderConfig, dtype: torch.dtype = torch.float32, attention: str | None = None) -> nn.Module:
    """transformers' causal LM of `config`, the text model's, without memory. Raises UserError where there is none."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, attn_implementation=attention)
    except Exception as error:  # whatever transformers makes of a stranger's configuration
        raise no_graph(error) from None


def no_graph(error: Exception) -> UserError:
    """What is said of a configuration that transformers fails with `error` to build a model of."""
    reason = f"transformers builds no model of its configuration ({one_line(error)})"
    return UserError(f"{reason}; correct it, or use another model")


def last_norm(graph: nn.Module) -> nn.Module:
    """The norm between the last layer of `graph`, a causal LM, and its output head."""
    named = dict(graph.get_submodule("model").named_children())
    return next(named[name] for name in LAST_NORMS if name in named)


def check_frame(config: DecoderConfig) -> None:
    """Raise UserError unless the graph of `config` has the frame that the training graph runs."""
    graph = meta_graph(config)
    modules = dict(graph.named_modules())
    lacking = [name for name in FRAME if name not in modules]
    if not any(f"model.{name}" in modules for name in LAST_NORMS):
        lacking.append(f"model.{LAST_NORMS[0]}")
    if lacking:
        raise UserError(
            f"transformers' {type(graph).__name__} has no {lacking[0]}, as the decoders have that are trained here; "
            "use a model of another family"
        )
    if getattr(graph.get_submodule("lm_head"), "bias", None) is not None:
        raise UserError(
            f"the output head of transformers' {type(graph).__name__} adds a bias, and those that are trained here are "
            "a product alone; use a model of another family"
        )


def graph_tensors(config: DecoderConfig) -> GraphTensors:
    """The tensors of the graph of `config`, transformers' of a text model."""
    kind: Any = type(config)
    values = config.to_dict()
    if values.get("rope_parameters"):  # of which a text model's class does not know those about images
        values["rope_parameters"] = {k: v for k, v in values["rope_parameters"].items() if k not in IMAGE_POSITIONS}
    return _graph_tensors(kind, json.dumps(values, sort_keys=True, default=str))


@lru_cache(maxsize=8)
def _graph_tensors(kind: Any, values: str) -> GraphTensors:
    try:
        config = kind.from_dict(json.loads(values) | {"pad_token_id": None})  # which may be no row of the embedding
    except Exception as error:  # of a class that does not read what it wrote
        raise no_graph(error) from None
    graph = meta_graph(config)
    head = graph.get_output_embeddings()
    linears = {
        name: GraphLinear(module.out_features, module.in_features, module.bias is not None)
        for name, module in graph.named_modules()
        if isinstance(module, nn.Linear) and module is not head and module.out_features >= FEWEST_ROWS
    }
    experts = experts_in(graph)
    inside = {f"{name}.{kind}" for name in linears for kind in ("weight", "bias")}
    inside |= {f"{name}.{parameter}" for name, each in experts.items() for parameter in each.shapes()}
    tied = {name for name, module in graph.named_modules() if module is head} if config.tie_word_embeddings else set()
    plain = {
        name: tuple(tensor.shape)
        for name, tensor in graph.state_dict().items()
        if name not in inside and name.rpartition(".")[0] not in tied
    }
    modules = dict(graph.named_modules())
    tables = {name for name in plain if isinstance(modules[name.rpartition(".")[0]], nn.Embedding)}
    return GraphTensors(linears, plain, frozenset(tables | ({HEAD} & plain.keys())), experts)
