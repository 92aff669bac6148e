"""vLLM's model on our storage: a quantisation method and a loader, by its plugin interfaces. For engine.py alone.

vLLM builds its model with empty linear layers; the loader gives them the storage that the training graph uses. The
quantisation method multiplies with it and adds the adapter from two buffers a layer. vLLM's own LoRA is not used: it
would need per-token adapter look-ups for a batch that always shares one adapter.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import vllm
from torch import Tensor, nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from grpo.errors import UserError
from grpo.kernels.lora_factors import LowRank
from grpo.kernels.lora_shrink import lora_shrink
from grpo.kernels.lora_shrink import serves as shrink_serves
from grpo.kernels.stored_weight import linear as stored_linear
from grpo.model.architectures import vllm_class
from grpo.model.base_weights import BaseWeights, FusedLinear, Segment
from grpo.model.config_keys import served_values
from grpo.model.decoder_config import DecoderConfig
from grpo.model.layout import pattern_of
from grpo.model.rope import EVERYWHERE, Rotary
from grpo.policy.float32_stream import has_float32_stream
from grpo.policy.full_policy import FullPolicy
from grpo.rollout.decoding_attention import serve_decoding
from grpo.rollout.decoding_layers import serve_between, widen_stream
from grpo.rollout.experts import SharedExpertsMethod, serve_experts
from grpo.rollout.lora_buffers import RolloutAdapter
from grpo.rollout.route_recorder import RouteRecorder
from grpo.rollout.vllm_images import ImageStore, class_with_images

SHARED = "grpo_shared"
"""Name of our quantisation method and load format in vLLM."""

ADAPTER_KEY = "adapter"
"""Under which the loader's part of vLLM's configuration has an AdapterHandle."""


@dataclass(frozen=True)
class AdapterHandle:
    """An engine's adapter, and with it the base, on its way through vLLM's configuration to our loader.

    vLLM copies and prints configurations: a copy is the same handle, and what is printed names no tensor.
    """

    adapter: RolloutAdapter = field(repr=False)
    recorder: RouteRecorder | None = field(default=None, repr=False)
    """Of a mixture of experts."""
    images: ImageStore | None = field(default=None, repr=False)
    """Of a model that takes images."""
    step_tokens: int = 0
    """Tokens of one step of vLLM, at most."""
    decoding_kernels: bool = False
    """Whether decoding steps are by our kernels throughout (decoding_attention.py, decoding_layers.py), each of which
    may be launched while the one in front of it runs."""

    def __deepcopy__(self, memo: dict[int, Any]) -> AdapterHandle:
        return self


class SharedLinearMethod(LinearMethodBase):
    """y = x W^T + b + (x A^T) (s B)^T, rounded once, from storage that the loader attaches."""

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        layer.register_parameter("weight", nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False))
        layer.served_features = sum(output_partition_sizes)
        layer.begins_early = False

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        adapter = layer.adapter
        early = layer.begins_early and shrink_serves(flat)
        x_lora_a = None if adapter is None else lora_shrink(flat, adapter.a, layer.adapter_on, overlapped=early)
        y = torch.empty(flat.shape[0], layer.served_features, dtype=x.dtype, device=x.device)
        for number, segment in enumerate(layer.shared.segments):
            rows = slice(segment.first_row, segment.first_row + segment.rows)
            low_rank = None if adapter is None else LowRank(x_lora_a, adapter.b[rows], early and number == 0)
            segment_linear(flat, segment, None if bias is None else bias[rows], y[:, rows], low_rank)
        fill_rest(layer.shared, y)
        return y.reshape(*x.shape[:-1], -1)


def fill_rest(linear: FusedLinear, y: Tensor) -> None:
    """Columns of y [tokens, served] behind those that are stored: parts that come again, then zeros nobody reads."""
    column = linear.out_features
    for part in linear.again:
        first, rows = linear.parts[part]
        y[:, column : column + rows].copy_(y[:, first : first + rows])
        column += rows
    if column < y.shape[1]:
        y[:, column:].zero_()


def segment_linear(x: Tensor, segment: Segment, bias: Tensor | None, out: Tensor, low_rank: LowRank | None) -> None:
    """Write one segment's columns of a layer's result into `out`."""
    stored_linear(x, segment.weight, segment.absmax, bias, low_rank, out)


class SharedEmbeddingMethod(QuantizeMethodBase):
    """Embedding and output head as they are in the storage: vLLM's own method multiplies, on a CPU, with a copy of the
    head that it lays out anew when it starts, and which an optimiser's step does not reach."""

    def create_weights(self, layer: nn.Module, *args: Any, **extra_weight_attrs: Any) -> None:
        """The layer has its weight when this takes its place."""

    def embedding(self, layer: nn.Module, input_: Tensor) -> Tensor:
        return F.embedding(input_, layer.weight)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, layer.weight, bias)


@register_quantization_config(SHARED)
class SharedConfig(QuantizationConfig):
    """Tells vLLM to leave every linear layer to `SharedLinearMethod`."""

    def get_name(self) -> str:
        return SHARED

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 75

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SharedConfig:
        return cls()

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, RoutedExperts):
            return SharedExpertsMethod(layer.moe_config)
        return SharedLinearMethod() if isinstance(layer, LinearBase) else None


@register_model_loader(SHARED)
class SharedLoader(BaseModelLoader):
    """Gives vLLM's modules the storage of a `BaseWeights` instead of loading anything."""

    def download_model(self, model_config: Any) -> None:
        """Nothing to download."""

    def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> nn.Module:
        handle = self.load_config.model_loader_extra_config[ADAPTER_KEY]
        with windows_of(handle.adapter.base.config):
            return super().load_model(vllm_config, model_config, prefix)

    def load_weights(self, model: nn.Module, model_config: Any) -> None:
        handle = self.load_config.model_loader_extra_config[ADAPTER_KEY]
        adapter = handle.adapter
        base = adapter.base
        attached = attach_experts(model, handle)
        for path, module in model.named_modules():
            if path in attached:
                continue
            if isinstance(getattr(module, "quant_method", None), SharedLinearMethod):
                if path not in base.linears:
                    raise unlike(base, f"with {path}, which the training graph has not")
                attach(module, base.linears[path], adapter)
                module.begins_early = handle.decoding_kernels
                attached.add(path)
        if missing := sorted(set(base.linears) - attached):
            raise unlike(base, f"without {missing[0]}")
        attach_tensors(model, base)
        if isinstance(adapter.policy, FullPolicy):
            for module in model.modules():
                if isinstance(module, VocabParallelEmbedding):
                    module.quant_method = SharedEmbeddingMethod()
        if handle.images is not None:
            model.see(handle.images, handle.step_tokens, base.device, base.dtype)
        share_positions(model, base.config, model_config.max_model_len)
        if handle.decoding_kernels:
            serve_decoding(model, base.dtype)
            serve_between(model)
        if has_float32_stream(base):
            widen_stream(model)


@contextmanager
def windows_of(config: DecoderConfig) -> Iterator[None]:
    """Inside, no layer of attention that vLLM builds has a longer window than `config` says: some of its classes give
    a token more than transformers' do."""
    window, build = getattr(config, "sliding_window", None), Attention.__init__

    def built(self: Any, *args: Any, per_layer_sliding_window: int | None = None, **more: Any) -> None:
        if window is not None and per_layer_sliding_window is not None:
            per_layer_sliding_window = min(window, per_layer_sliding_window)
        build(self, *args, per_layer_sliding_window=per_layer_sliding_window, **more)

    with mock.patch.object(Attention, "__init__", built):
        yield


def attach_experts(model: nn.Module, handle: AdapterHandle) -> set[str]:
    """Hand the experts' storage and their routers' to vLLM's modules; the names of those whose forward is ours."""
    routers, base = set(), handle.adapter.base
    modules = dict(model.named_modules())
    for number, stack in enumerate(base.experts.values()):
        router = base.layout.tensors[f"{stack.router}.weight"].removesuffix(".weight")
        for name in (stack.served, router):
            if name not in modules:
                raise unlike(base, f"without {name}")
        scores = base.tensors[f"{stack.router}.weight"], base.tensors.get(f"{stack.router}.bias")
        serve_experts(
            modules[stack.served],
            modules[router],
            stack,
            scores,
            recorder=handle.recorder,
            number=number,
            adapters=handle.adapter.experts.get(stack.name),
        )
        routers.add(router)
    if other := next((name for name, module in modules.items() if is_unserved(module)), None):
        raise unlike(base, f"with {other}, experts that the training graph has not")
    return routers


def is_unserved(module: nn.Module) -> bool:
    """Whether `module` has experts that nothing was attached to."""
    return isinstance(module, RoutedExperts) and not hasattr(module, "shared")


def unlike(base: BaseWeights, how: str) -> UserError:
    """An error about a model that vLLM builds otherwise than its layout says."""
    return UserError(f"{base.source_path}: vLLM {vllm.__version__} builds this model {how}; use another vLLM or model")


def attach_tensors(model: nn.Module, base: BaseWeights) -> None:
    """Hand every tensor outside linear layers to vLLM's parameter or buffer. Raises UserError for what does not fit."""
    wanted = {theirs: base.tensors[ours] for ours, theirs in base.layout.tensors.items()}
    in_linears = tuple(f"{name}." for name in (*base.linears, *(each.served for each in base.experts.values())))
    parameters = {name: each for name, each in model.named_parameters() if not name.startswith(in_linears)}
    empty = sorted(name for name in set(parameters) - set(wanted) if pattern_of(name) not in base.layout.unread)
    if empty:
        raise unlike(base, f"with {empty[0]}, which the training graph has not")
    held = parameters | {name: each for name, each in model.named_buffers() if name in wanted}
    for name, tensor in wanted.items():
        if name not in held:
            raise unlike(base, f"without {name}")
        theirs = held[name]
        if theirs.dtype.itemsize > tensor.dtype.itemsize or theirs.shape != tensor.shape:
            raise unlike(base, f"with {name} as {theirs.dtype} of shape {tuple(theirs.shape)}")
        if theirs.dtype == tensor.dtype:
            theirs.data = tensor
        else:  # some layers are of a precision of their own, whatever the model's is
            module, _, key = name.rpartition(".")
            own = nn.Parameter(tensor, requires_grad=False) if name in parameters else tensor
            setattr(model.get_submodule(module), key, own)


def attach(module: nn.Module, linear: FusedLinear, adapter: RolloutAdapter) -> None:
    """Hand `linear`'s storage, and the adapter's buffers if it has any, to vLLM's layer `module`."""
    module.shared = linear
    if module.served_features < linear.out_features + sum(linear.parts[part][1] for part in linear.again):
        raise ValueError(f"{linear.name} has more rows than vLLM's layer, which has {module.served_features}")
    module.weight = nn.Parameter(linear.segments[0].weight, requires_grad=False)
    if linear.bias is not None:
        module.bias = nn.Parameter(linear.bias, requires_grad=False)
    module.adapter = adapter.buffers.get(linear.name)
    module.adapter_on = adapter.on


def write_model_folder(folder: Path, base: BaseWeights, tokenizer: Any) -> None:
    """A folder with just what vLLM reads: the configuration, and the tokenizer if stop strings need one."""
    values = served_values(base.config, images=base.vision is not None)
    if base.vision is not None:
        values["architectures"] = [class_with_images(vllm_class(base.config.model_type))]
    (folder / "config.json").write_text(json.dumps(values, default=str))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def by_rows(rotate: Callable[..., Any]) -> Callable[..., Any]:
    """A rotary module's forward for q and k [tokens, heads, dim] too, which vLLM's on a CPU turns wrongly."""

    def forward(positions: Tensor, query: Tensor, key: Tensor | None = None, *more: Any) -> Any:
        flat = [None if part is None else part.reshape(len(part), -1) for part in (query, key)]
        turned = rotate(positions, *flat, *more)
        pairs = zip(turned, (query, key), strict=True)
        return tuple(None if like is None else part.reshape(like.shape) for part, like in pairs)

    return forward


def share_positions(model: nn.Module, config: DecoderConfig, longest: int) -> None:
    """Replace the rotary caches of `model`, vLLM's, by ones with the training graph's frequencies.

    Every layer gets its module anew: vLLM shares them with other engines of the process. Where vLLM runs transformers'
    own rotary embedding, the training graph's takes its place.
    """
    rotary = Rotary(config, longest)
    layer_types = getattr(config, "layer_types", None)
    made: dict[tuple[str, int], nn.Module] = {}
    for name, attention in list(model.named_modules()):
        theirs = getattr(attention, "rotary_emb", None)
        if not isinstance(theirs, nn.Module):
            continue
        if not hasattr(theirs, "cos_sin_cache"):
            attention.rotary_emb = Rotary(config, longest, next(model.parameters()).device)
            continue
        layer = int(name.split(".layers.")[1].split(".")[0])
        kind = layer_types[layer] if layer_types and layer_types[layer] in rotary.scalings else EVERYWHERE
        if (kind, id(theirs)) not in made:
            ours = copy.deepcopy(theirs)
            held = ours.cos_sin_cache
            table = rotary.table(held.shape[0], kind or None)
            assert table.shape == held.shape, (name, table.shape, held.shape)
            ours.cos_sin_cache = table.to(held)
            if not held.is_cuda:
                ours.forward = by_rows(ours.forward)
            made[kind, id(theirs)] = ours
        attention.rotary_emb = made[kind, id(theirs)]
