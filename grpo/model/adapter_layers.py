"""Which linear layers of a model `[lora]` gives an adapter, of which rank and scale: peft's rules, without a model.

Memory is planned and files are checked by it before anything is built. The training graph is built by peft itself,
and has to come to the same.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from grpo.config.schema import Lora
from grpo.errors import UserError
from grpo.model.architectures import adapter_targets
from grpo.model.expert_sizes import MATRICES, is_sparse
from grpo.model.layout import HEAD, fused_linears


class LayerAdapter(NamedTuple):
    """The update of one linear layer is scale B A, of this rank."""

    rank: int
    scale: float


def adapted_layers(config: Any, lora: Lora) -> dict[str, LayerAdapter]:
    """transformers' name -> adapter of every linear layer of the model of `config` that has one.

    config: a plan's Shape or transformers'. Raises UserError where there is none, and where patterns of ranks or scales
    contradict one another.
    """
    names = [part for group in fused_linears(config).values() for part in group]
    targets = adapter_targets(config, lora.target_modules)
    layers = {name: adapter_of(name, lora) for name in names if is_adapted(name, targets, lora)}
    if not layers:
        leaves = dict.fromkeys(name.rpartition(".")[2] for name in names)
        raise UserError(
            f"lora.target_modules = {lora.target_modules!r}, with what limits it, selects no linear layer; "
            f"this model has {', '.join(leaves)}"
        )
    return layers


def adapted_experts(config: Any, lora: Lora) -> dict[str, LayerAdapter]:
    """The graph's parameter -> adapter of each of its experts, of every stacked parameter that has one.

    config: a plan's Shape or transformers'. Raises UserError for an entry of `lora.target_parameters` that names none.
    """
    names = [f"{module}.{matrix}" for module in expert_modules(config) for matrix in MATRICES]
    for target in lora.target_parameters:
        if not any(is_named(name, [target]) for name in names):
            has = f"this model has {', '.join(dict.fromkeys(map(ending, names)))}" if names else "this model has none"
            raise UserError(f"lora.target_parameters names {target!r}, which are no experts; {has}")
    return {name: adapter_of(name, lora) for name in names if is_named(name, lora.target_parameters)}


def expert_modules(config: Any) -> list[str]:
    """The graph's modules that hold experts; of a plan's Shape by their usual name."""
    if hasattr(config, "to_dict"):
        from grpo.model.meta_graph import graph_tensors

        return list(graph_tensors(config).experts)
    return [
        f"model.layers.{layer}.mlp.experts" for layer in range(config.num_hidden_layers) if is_sparse(config, layer)
    ]


def ending(name: str) -> str:
    """The module's and the parameter's own names: "experts.down_proj"."""
    return ".".join(name.split(".")[-2:])


def check_selected(config: Any, lora: Lora, owners: Iterable[str]) -> None:
    """Raise UserError unless `lora` gives adapters to linear layers of the decoder's blocks, and to nothing else.

    owners: the model's modules that have tensors of their own.
    """
    layers, targets = adapted_layers(config, lora), adapter_targets(config, lora.target_modules)
    adapted_experts(config, lora)
    modules = {HEAD.rpartition(".")[0]}
    for name in owners:
        parts = name.split(".")
        modules.update(".".join(parts[:depth]) for depth in range(1, len(parts) + 1))
    for name in sorted(modules - layers.keys()):
        if is_adapted(name, targets, lora):
            raise UserError(
                f"lora.target_modules = {lora.target_modules!r} matches {name}, which is no linear layer of a decoder "
                "block; only these can have an adapter, so write a narrower pattern or names"
            )


def is_adapted(name: str, targets: list[str] | str, lora: Lora) -> bool:
    """Whether the module `name` gets an adapter. targets: `lora.target_modules` in the family's own names."""
    if lora.exclude_modules and is_named(name, lora.exclude_modules):
        return False
    if isinstance(targets, str) or not lora.layers_to_transform or name in targets:
        # A whole name in a list is meant whatever its layer's number.
        return is_named(name, targets)
    return is_named(name, targets) and layer_number(name, lora.layers_pattern) in lora.layers_to_transform


def is_named(name: str, wanted: Iterable[str] | str) -> bool:
    """Whether the pattern `wanted` matches all of `name`, or one of the names `wanted` is its end."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in wanted)


def layer_number(name: str, lists: list[str]) -> int | None:
    """The first number in `name`: behind one of `lists`, where some are given."""
    before = [rf"(?:^|.*?\.){pattern}" for pattern in lists] or [r".*?\.[^.]*"]
    found = next((match for pattern in before if (match := re.match(rf"{pattern}\.(?P<number>\d+)\.", name))), None)
    return None if found is None else int(found["number"])


def adapter_of(name: str, lora: Lora) -> LayerAdapter:
    """Rank and scale of the adapter on the module `name`."""
    rank = value_for(name, "rank_pattern", lora.rank_pattern, lora.r)
    alpha = value_for(name, "alpha_pattern", lora.alpha_pattern, lora.lora_alpha)
    return LayerAdapter(rank, alpha / (math.sqrt(rank) if lora.use_rslora else rank))


def value_for(name: str, key: str, patterns: Mapping[str, Any], otherwise: Any) -> Any:
    """The value of the first of `patterns` that matches an end of `name`; peft keeps them in alphabetical order.

    Raises UserError where another order gives another value: a saved adapter would not be the trained one.
    """
    fitting = [pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", name)]
    if not fitting:
        return otherwise
    if patterns[fitting[0]] != patterns[min(fitting)]:
        raise UserError(
            f"lora.{key}: {fitting[0]!r} and {min(fitting)!r} both match {name}, and peft saves them in alphabetical "
            "order, where the second counts; write patterns of which only one matches"
        )
    return patterns[fitting[0]]


def expert_ranks(shape: Any, lora: Lora | None) -> tuple[int, int]:
    """The largest ranks of adapters on the two matrices of experts."""
    adapters = {} if lora is None else adapted_experts(shape, lora)
    above, below = (
        max((adapter.rank for name, adapter in adapters.items() if name.endswith(matrix)), default=0)
        for matrix in MATRICES
    )
    return above, below
