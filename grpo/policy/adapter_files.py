"""The tensors of a saved LoRA adapter that nobody vouches for: each accounted for before any is used.

Only safetensors are read; a pickled adapter is refused. Which tensors there have to be follows from the adapter's
configuration (`grpo.model.adapter_config`) and its base; for what becomes of the values see `policy.py`.
"""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from grpo.config.schema import Lora
from grpo.errors import UserError
from grpo.model.adapter_config import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MERGE,
    AdapterConfig,
    check_same_shape,
    read_adapter_config,
)
from grpo.model.adapter_layers import LayerAdapter, adapted_experts, adapted_layers
from grpo.model.architectures import adapter_targets
from grpo.model.checks import one_line
from grpo.model.decoder_config import DecoderConfig
from grpo.model.expert_sizes import MATRICES
from grpo.model.meta_graph import graph_tensors
from grpo.model.safetensors_source import DENSE_TYPES
from grpo.model.sizes import linear_shapes
from grpo.model.text_decoder import plain_name
from grpo.model.weight_files import stored_names

PEFT_PREFIX = "base_model.model."
OTHER_BASE = "name the base that the adapter was trained on (model.name, or --base)"


class AdapterFile:
    """adapter_model.safetensors beside an adapter's configuration, read tensor by tensor."""

    def __init__(self, saved: AdapterConfig):
        """Raises UserError for a file that is missing, damaged or pickled."""
        self.saved = saved
        self.file = saved.file.parent / ADAPTER_WEIGHTS
        if not self.file.is_file():
            raise UserError(
                f"{saved.file.parent}: no {ADAPTER_WEIGHTS}; pickled adapters are never loaded, save it as safetensors"
            )
        try:
            self._handle = safe_open(self.file, framework="pt")
            self._stored = {plain_name(name): name for name in stored_names(self.file)}
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{self.file}: damaged safetensors ({one_line(error)}); copy the adapter again") from None

    @property
    def names(self) -> set[str]:
        """peft's names of all tensors, those of a model of several inputs as the decoder alone has them."""
        return set(self._stored)

    def _tensor(self, name: str) -> Tensor:
        return self._handle.get_tensor(self._stored[name])

    def check(self, config: DecoderConfig) -> dict[str, LayerAdapter]:
        """The adapter of each linear layer of the base, whose A and B are there and of the right size; and no others.

        config: transformers', of the base. Raises UserError naming the tensor.
        """
        layers, shapes = self._layers(config), linear_shapes(config)
        expected: dict[str, tuple[int, ...]] = {}
        for name, adapter in layers.items():
            a, b = factor_names(name)
            rows, columns = shapes[name]
            expected |= {a: (adapter.rank, columns), b: (rows, adapter.rank)}
        expected |= self._expert_shapes(config)
        for key, shape in expected.items():
            self._check_tensor(key, shape)
        for key in sorted(self.names - expected.keys()):
            remedy = OTHER_BASE if key.endswith((".lora_A.weight", ".lora_B.weight")) else MERGE
            raise UserError(
                f"{self.file}: holds {key}, which is no A or B of a layer that {ADAPTER_CONFIG} selects on this base; "
                f"{remedy}"
            )
        return layers

    def _expert_shapes(self, config: DecoderConfig) -> dict[str, tuple[int, ...]]:
        """The factors of adapters on experts: those of all experts in one matrix, as peft has them."""
        expected: dict[str, tuple[int, ...]] = {}
        if not self.saved.lora.target_parameters:
            return expected
        found = graph_tensors(config).experts
        try:
            adapters = adapted_experts(config, self.saved.lora)
        except UserError as error:
            raise UserError(f"{self.saved.file}: {error}; {OTHER_BASE}") from None
        for name, adapter in adapters.items():
            module, _, matrix = name.rpartition(".")
            experts, (rows, columns) = found[module].experts, found[module].matrices()[matrix]
            a, b = expert_factor_names(name, adapters)
            expected |= {a: (experts * adapter.rank, columns), b: (rows, experts * adapter.rank)}
        return expected

    def expert_factors(self, config: DecoderConfig, name: str) -> tuple[Tensor, Tensor, float]:
        """A [experts, rank, in], B [experts, out, rank] and the scale of the adapter on the experts' parameter."""
        adapters = adapted_experts(config, self.saved.lora)
        module, _, _ = name.rpartition(".")
        a, b = (self._tensor(key) for key in expert_factor_names(name, adapters))
        experts, rank = graph_tensors(config).experts[module].experts, adapters[name].rank
        return a.view(experts, rank, -1), b.view(len(b), rank, experts).permute(2, 0, 1), adapters[name].scale

    def _layers(self, config: DecoderConfig) -> dict[str, LayerAdapter]:
        try:
            return adapted_layers(config, self.saved.lora)
        except UserError as error:  # speaks of `[lora]`, and how to correct that
            raise UserError(f"{self.saved.file}: {str(error).partition(';')[0]}; {OTHER_BASE}") from None

    def _check_tensor(self, key: str, shape: tuple[int, ...]) -> None:
        if key not in self.names:
            raise UserError(f"{self.file}: tensor {key} is missing; {OTHER_BASE}")
        stored = self._handle.get_slice(self._stored[key])
        if stored.get_dtype() not in DENSE_TYPES:
            raise UserError(f"{self.file}: {key} is kept as {stored.get_dtype()}; save the adapter in float32")
        if (shape_here := tuple(stored.get_shape())) != shape:
            raise UserError(f"{self.file}: {key} has shape {shape_here}, on this base it has {shape}; {OTHER_BASE}")

    def factors(self, layer: str) -> tuple[Tensor, Tensor]:
        """A [rank, in] and B [out, rank] of the linear layer `layer`, as they are stored."""
        a, b = (self._tensor(key) for key in factor_names(layer))
        return a, b

    def tensors(self) -> dict[str, Tensor]:
        """Everything, by peft's names, on the CPU."""
        return {name: self._tensor(name) for name in sorted(self.names)}


def open_adapter(folder: Path, lora: Lora, config: DecoderConfig) -> AdapterFile:
    """The adapter in `folder`, which has to be one of the shape `lora` on the base that transformers' `config` is of.

    Raises UserError for any other.
    """
    saved = read_adapter_config(folder)
    check_same_shape(saved, lora, lambda each: adapter_targets(config, each.target_modules))
    file = AdapterFile(saved)
    file.check(config)
    return file


def expert_factor_names(name: str, adapters: Container[str]) -> tuple[str, str]:
    """peft's names of the A and B on a stacked parameter of experts: where both of a block have one, the second is
    wrapped around the first."""
    module, _, matrix = name.rpartition(".")
    inner = matrix == MATRICES[0] and f"{module}.{MATRICES[1]}" in adapters
    return factor_names(f"{module}.base_layer" if inner else module)


def factor_names(layer: str) -> tuple[str, str]:
    """peft's names of the A and B of a linear layer."""
    return f"{PEFT_PREFIX}{layer}.lora_A.weight", f"{PEFT_PREFIX}{layer}.lora_B.weight"
