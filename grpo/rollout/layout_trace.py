"""How vLLM lays out a model, found by watching vLLM load one that has no weights. For the engine's side alone.

Both models are built on the meta device. vLLM's own `load_weights` is fed the training graph's parameters, and every
copy into one of vLLM's parameters says from which rows of which tensor they come. Nothing is computed, and no table
names a tensor. What a copy does not explain (a value that vLLM computes, rows in another order) is not shared storage,
and is refused here by name.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import vllm
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.config import set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers import rotary_embedding
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.utils import set_weight_attrs

from grpo.errors import UserError
from grpo.model.architectures import vllm_class
from grpo.model.checks import one_line
from grpo.model.config_keys import served_values
from grpo.model.decoder_config import DecoderConfig
from grpo.model.layout import Record, pattern_of
from grpo.model.meta_graph import graph_tensors, meta_graph
from grpo.model.stored_form import stored_form
from grpo.rollout.vllm_backend import attributes, prepare_class
from grpo.rollout.vllm_environment import set_environment

TRACED = "grpo_traced"
"""Name of the quantisation method whose layers are watched."""


class TracedMethod(LinearMethodBase):
    """A plain weight [out, in] with what vLLM's loaders ask of one."""

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
        size = (sum(output_partition_sizes), input_size_per_partition)
        weight = nn.Parameter(torch.empty(size, dtype=params_dtype), requires_grad=False)
        set_weight_attrs(weight, {"input_dim": 1, "output_dim": 0, **extra_weight_attrs})
        layer.register_parameter("weight", weight)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        raise NotImplementedError("a traced model is not run")


class TracedExpertsMethod(FusedMoEMethodBase):
    """Plain stacked weights of experts, w13 [experts, 2 * inner, hidden] and w2 [experts, hidden, inner]."""

    def create_weights(
        self,
        layer: nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        inner = intermediate_size_per_partition
        for name, size in (("w13_weight", (2 * inner, hidden_size)), ("w2_weight", (hidden_size, inner))):
            weight = nn.Parameter(torch.empty(num_experts, *size, dtype=params_dtype), requires_grad=False)
            set_weight_attrs(weight, extra_weight_attrs)
            layer.register_parameter(name, weight)
        for name, rows in (("w13_bias", 2 * inner), ("w2_bias", hidden_size)) if self.moe.has_bias else ():
            bias = nn.Parameter(torch.empty(num_experts, rows, dtype=params_dtype), requires_grad=False)
            set_weight_attrs(bias, extra_weight_attrs)
            layer.register_parameter(name, bias)

    def get_fused_moe_quant_config(self, layer: nn.Module) -> None:
        return None


@register_quantization_config(TRACED)
class TracedConfig(QuantizationConfig):
    """Gives every linear layer a `TracedMethod`, and experts a `TracedExpertsMethod`."""

    def get_name(self) -> str:
        return TRACED

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> TracedConfig:
        return cls()

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, RoutedExperts):
            return TracedExpertsMethod(layer.moe_config)
        return TracedMethod() if isinstance(layer, LinearBase) else None


@dataclass(frozen=True)
class Rows:
    """Whole rows of a tensor that `count` of its elements, from `offset` on, are."""

    name: str
    offset: int
    count: int
    moved: bool = False
    """Whether the elements are all of the tensor's, in another order."""


@dataclass
class Copies(TorchDispatchMode):
    """Inside, what is copied into `targets` from `sources`; both name -> tensor on meta."""

    sources: dict[str, Tensor]
    targets: dict[str, Tensor]
    found: list[tuple[Rows, Rows | None]] = field(default_factory=list)
    """(where in a target, where in a source or None for what was computed)."""

    def __post_init__(self) -> None:
        super().__init__()
        self._known = {storage(tensor): Rows(name, 0, tensor.numel()) for name, tensor in self.sources.items()}
        self._targets = {storage(tensor): name for name, tensor in self.targets.items()}
        self._alive: list[Tensor] = []  # a storage's address must not be used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operator = func.overloadpacket.__name__
        if operator == "_local_scalar_dense":  # loaders ask whether a value is, say, 1
            return 1.0
        if operator == "equal":
            return True
        if operator == "copy_" and storage(args[0]) in self._targets:
            place = Rows(self._targets[storage(args[0])], args[0].storage_offset(), args[0].numel())
            self.found.append((place, self.where(args[1]) if args[0].is_contiguous() else None))
            return args[0]
        result = func(*args, **(kwargs or {}))
        if operator in ("clone", "_to_copy", "contiguous") and args[0].numel() == result.numel():
            copied = self.where(args[0]) or self.turned(args[0])
            if copied is not None:
                self._alive.append(result)
                self._known[storage(result)] = copied
        return result

    def where(self, tensor: Tensor) -> Rows | None:
        """Where in a source the elements of `tensor` are, one after another."""
        known = self._known.get(storage(tensor))
        if known is None or not tensor.is_contiguous():
            return None
        return Rows(known.name, known.offset + tensor.storage_offset(), tensor.numel(), known.moved)

    def turned(self, tensor: Tensor) -> Rows | None:
        """The source whose elements are those of `tensor`, a view in another order."""
        known = self._known.get(storage(tensor))
        return None if known is None or known.count != tensor.numel() else Rows(known.name, 0, known.count, moved=True)


class Unread(TorchDispatchMode):
    """Inside, a value of a tensor on meta may be asked for, as by layers that keep one as a number: it is 1."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operator, kwargs = func.overloadpacket.__name__, kwargs or {}
        if operator == "_to_copy" and args[0].is_meta and torch.device(kwargs.get("device") or "meta").type != "meta":
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device=kwargs["device"])
        if operator == "_local_scalar_dense" and args[0].is_meta:
            return 1.0
        return func(*args, **kwargs)


def storage(tensor: Tensor) -> int:
    """The identity of the memory of a tensor, also of one that has none."""
    return tensor.untyped_storage()._cdata


def trace(config: DecoderConfig, dtype: torch.dtype = torch.bfloat16) -> Record:
    """How vLLM lays out the model of `config`, transformers' of a text model. Raises UserError naming a tensor that
    cannot be shared, or what vLLM says of a model that it cannot build."""
    set_environment()
    sources = checkpoint_tensors(config, dtype)
    linears, stored = graph_tensors(config).linears, list(as_stored(config, sources))
    with traced_model(config, dtype) as model:
        targets = dict(model.named_parameters()) | dict(model.named_buffers())
        with torch.no_grad(), Copies(sources, {name: tensor.data for name, tensor in targets.items()}) as copies:
            model.load_weights(iter(stored))
        layers = {name for name, each in model.named_modules() if isinstance(quant_method(each), TracedMethod)}
        widths = {name: model.get_submodule(name).weight.shape[1] for name in layers}
        parameters = {name for name, _ in model.named_parameters() if name.rpartition(".")[0] not in widths}
    wider = {name for name, tensor in targets.items() if tensor.dtype == torch.float32 != dtype}
    experts = {f"{name}.{key}" for name, each in graph_tensors(config).experts.items() for key in each.shapes()}
    # Of experts the place is used alone: their storage is ours in vLLM too.
    found = [
        (to, source) for to, source in copies.found if source is None or not source.moved or source.name in experts
    ]
    return record(found, sources, Places(widths, set(linears), parameters, wider))


def as_stored(config: DecoderConfig, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The graph's `tensors` as a checkpoint has them: pieces of stacked experts are views."""
    form = stored_form(config)
    for name, tensor in tensors.items():
        if name not in form.pieces:
            yield form.renamed.get(name, name), tensor
        for piece in form.pieces.get(name, ()):
            rows = slice(piece.first_row, piece.first_row + piece.rows)
            yield piece.name, tensor if piece.expert is None else tensor[piece.expert, rows]


def quant_method(module: nn.Module) -> Any:
    return getattr(module, "quant_method", None)


def checkpoint_tensors(config: DecoderConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """The graph's parameters on meta, without an output head that is the embedding."""
    graph = meta_graph(config, dtype)
    tensors = graph.state_dict()
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    return dict(tensors)


@contextmanager
def traced_model(config: DecoderConfig, dtype: torch.dtype) -> Iterator[nn.Module]:
    """vLLM's model of `config` on meta; inside, vLLM's configuration is the current one."""
    with tempfile.TemporaryDirectory(prefix="grpo-layout-") as folder, one_process():
        prepare_class(vllm_class(config.model_type))
        (Path(folder) / "config.json").write_text(json.dumps(served_values(config), default=str))
        try:
            settings = EngineArgs(
                model=folder, skip_tokenizer_init=True, dtype=str(dtype).removeprefix("torch."), quantization=TRACED,
                max_model_len=64, enforce_eager=True, generation_config="vllm", hf_overrides=attributes(config),
            ).create_engine_config()  # fmt: skip
            with set_current_vllm_config(settings), default_dtype(dtype):
                with torch.device("meta"), Unread():
                    model = initialize_model(settings)
                yield model
        except UserError:
            raise
        except Exception as error:  # whatever vLLM makes of a family that nobody tried
            reason = f"vLLM {vllm.__version__} cannot build it ({one_line(error)})"
            raise UserError(f"{reason}; use a model of another family or another vLLM") from None
        finally:
            rotary_embedding._ROPE_DICT.clear()  # rotary caches on meta are not to be met by an engine


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def one_process() -> Iterator[None]:
    """Inside, vLLM takes this process to be the only one; no group of processes is made."""
    group = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    alone = SimpleNamespace(
        world_size=1, rank=0, rank_in_group=0, local_rank=0, is_first_rank=True, is_last_rank=True, ranks=[0],
        device_group=group, cpu_group=group,
    )  # fmt: skip
    names = [name for name in ("_WORLD", "_TP", "_PP", "_DP", "_EP", "_DCP", "_PCP") if hasattr(parallel_state, name)]
    with ExitStack() as patches:
        for name in names:
            patches.enter_context(mock.patch.object(parallel_state, name, alone))
        yield


@dataclass(frozen=True)
class Places:
    """What of the two models is what."""

    widths: dict[str, int]
    """vLLM's linear layers -> their columns."""
    linears: set[str]
    """The graph's, of which a router of experts is none."""
    parameters: set[str]
    """vLLM's outside of linear layers."""
    wider: set[str]
    """vLLM's tensors in float32 where it computes in less."""


def record(copies: list[tuple[Rows, Rows | None]], sources: dict[str, Tensor], places: Places) -> Record:
    """The copies as a Record."""
    starts: dict[str, list[tuple[int, str]]] = {}
    renamed: dict[str, str] = {}
    float32: dict[str, None] = {}
    for name, tensor in sources.items():
        target, offsets = destination(name, tensor, copies)
        layer, _, kind = target.rpartition(".")
        if layer not in places.widths or name.rpartition(".")[0] not in places.linears:
            if offsets != [0]:
                reason = f"vLLM {vllm.__version__} keeps {name} inside {target}"
                raise UserError(f"{reason}, which is no linear layer of ours; use a model of another family")
            if target in places.wider:
                float32[pattern_of(name)] = None
            if target != name:
                renamed[pattern_of(name)] = pattern_of(target)
        elif kind == "weight":
            part = name.removesuffix(".weight")
            starts.setdefault(layer, []).extend((offset // places.widths[layer], part) for offset in offsets)
    stacks: dict[str, dict[tuple[str, ...], None]] = {}
    for layer, parts in starts.items():
        stacks.setdefault(pattern_of(layer), {})[tuple(pattern_of(part) for _, part in sorted(parts))] = None
    # The stack with most parts first: the others are those of layers that lack some.
    ordered = {fused: sorted(several, key=lambda parts: -len(set(parts))) for fused, several in stacks.items()}
    linears = {fused: several[0] for fused, several in ordered.items()}
    others = {fused: tuple(rest) for fused, (_, *rest) in ordered.items() if rest}
    unread = dict.fromkeys(pattern_of(name) for name in sorted(places.parameters - {to.name for to, _ in copies}))
    return Record(linears, renamed, others, tuple(unread), tuple(float32))


def destination(name: str, tensor: Tensor, copies: list[tuple[Rows, Rows | None]]) -> tuple[str, list[int]]:
    """(vLLM's parameter, the elements of it where the whole of the graph's `tensor` begins: one, or several copies).

    Raises UserError where it is nowhere, or not in whole runs of elements of one parameter.
    """
    runs: dict[tuple[str, int], set[Rows]] = {}
    for to, source in copies:
        if source is not None and source.name == name:
            runs.setdefault((to.name, to.offset - source.offset), set()).add(source)
    whole = all(sum(source.count for source in copied) == tensor.numel() for copied in runs.values())
    if len({target for target, _ in runs}) != 1 or not whole:
        what = "reads nothing from" if not runs else "keeps another form of"
        reason = f"vLLM {vllm.__version__} {what} {name}, so the two graphs cannot share it"
        raise UserError(f"{reason}; use a model of another family")
    return next(iter(runs))[0], sorted(offset for _, offset in runs)
