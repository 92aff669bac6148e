"""The one copy of the base model: storage that vLLM's parameters and the training graph's weights both view.

`BaseWeights` reads a `Source` tensor by tensor, quantises where asked, and owns the result. q, k, v (and gate, up)
are rows of one tensor, because vLLM multiplies them at once and NF4 blocks never cross a row. Nothing here computes a
layer: `policy.py` and `engine.py` borrow the storage. On a CPU a 4-bit base is kept dequantised, since nothing there
multiplies packed weights fast; the values are those of the packed weights.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from grpo.config.schema import Model
from grpo.errors import UserError
from grpo.kernels import mxfp4, nf4, stored_weight
from grpo.kernels.launch import disable_reduced_precision
from grpo.model import host_memory
from grpo.model.architectures import check_supported
from grpo.model.config_keys import check_keys, normalize_config
from grpo.model.decoder_config import DecoderConfig
from grpo.model.eight_bit_segments import in_eight_bit, stacked
from grpo.model.expert_weights import ExpertStack, load_stack
from grpo.model.fingerprint import Fingerprint
from grpo.model.head import Head
from grpo.model.inventory import account
from grpo.model.layout import EMBEDDING, HEAD, ExpertsLayout, Layout, LinearLayout
from grpo.model.sizes import VOCABULARY_PADDING, embedding_bytes, pinned_bytes, weights_on_host
from grpo.model.stored_form import stored_form
from grpo.model.weight_source import MXFP4Tensor, NF4Tensor, Packed, Source, dense

logger = logging.getLogger("grpo")

BLOCK = 64
"""Weights that share one NF4 scale."""


@dataclass
class Segment:
    """Consecutive rows of a fused linear layer, stored in one way.

    Dense: `weight` [rows, in] in the compute dtype, `absmax` None. NF4: `weight` packed uint8 [rows, in / 2] and
    `absmax` [rows, in / 64] in the compute dtype. 8 bit: `weight` int8 or float8_e4m3fn [rows, in], and `absmax` its
    float32 scales, of which `kernels/eight_bit.py` says what they are for.
    """

    first_row: int
    rows: int
    weight: Tensor
    absmax: Tensor | None = None
    compute_dtype: torch.dtype | None = None
    """Where the tensors do not tell: in 8 bit."""

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self.compute_dtype or (self.weight.dtype if self.absmax is None else self.absmax.dtype)

    @property
    def columns(self) -> int:
        """The inputs of the layer."""
        return stored_weight.columns(self.weight, self.absmax)


@dataclass
class FusedLinear:
    """One of vLLM's linear layers: the rows of its parts, stacked."""

    name: str
    parts: dict[str, tuple[int, int]]
    """transformers module name -> (first row, rows)."""
    in_features: int
    out_features: int
    again: tuple[str, ...] = ()
    """Parts whose rows vLLM's layer has once more, behind all others; they are stored and computed once."""
    segments: list[Segment] = field(default_factory=list)
    """One, unless `keep_16bit` holds only some of the parts in 16 bit."""
    bias: Tensor | None = None

    def part(self, name: str) -> tuple[Segment, Tensor | None]:
        """The rows of the part `name` as views: a Segment counted from its own first row, and the bias."""
        first, rows = self.parts[name]
        for segment in self.segments:
            inside = first - segment.first_row
            if 0 <= inside and inside + rows <= segment.rows:
                views = stored_weight.rows_of(segment.weight, segment.absmax, slice(inside, inside + rows))
                bias = None if self.bias is None else self.bias[first : first + rows]
                return Segment(0, rows, *views, segment.compute_dtype), bias
        raise KeyError(f"{name} spans segments of {self.name}")


class BaseWeights:
    """Every tensor of the base model, loaded once.

    `linears`: vLLM's name -> FusedLinear. `experts`: the graph's name -> ExpertStack. `tensors`: parameter name ->
    plain tensor (embedding, norms, head) in the compute dtype; embeddings and head are padded to vLLM's vocabulary and
    hold zeros there. With `model.offload_embedding` or `model.offload_head` the memory of one, a tensor on the GPU like
    the others, is the host's; `pinned` has the same memory, under the same name, as a tensor on the CPU.
    """

    def __init__(self, source: Source, model: Model, *, device: torch.device, dtype: torch.dtype):
        """Load `source`. Peak memory is the result plus one tensor. Raises UserError for what does not fit."""
        check_supported(source.config, str(source.path))
        self.config: DecoderConfig = source.config.get_text_config()
        check_keys(self.config, str(source.path))
        normalize_config(self.config)
        for sentence in account(source):  # nothing is left to say where `read_model` has been
            logger.warning(sentence)
        self.layout = Layout.of(self.config)
        self.vision = source.vision
        self.head_form = Head.of(self.config)
        if self.vision is not None:
            self.head_form = replace(self.head_form, never=self.vision.never)
        self.source_path = source.path
        self.fingerprint = Fingerprint.of(source)
        self.device, self.dtype = device, dtype
        if device.type == "cuda":
            disable_reduced_precision()
        self.load_in_4bit, self.load_in_8bit = model.load_in_4bit, model.load_in_8bit
        self.quantized = model.load_in_4bit or model.load_in_8bit
        self.packed = self.quantized and device.type == "cuda"
        if twice := rounded_twice(source, model):
            logger.warning(twice)
        wanted = weights_on_host(model, self.config)
        self._on_host = wanted if host_memory.has_own_memory(device) else {}
        self.pinned: dict[str, Tensor] = {}
        if self._on_host:  # now, not after minutes of loading
            size = len(self._on_host) * pinned_bytes(embedding_bytes(self.config, dtype.itemsize))
            host_memory.check_host_memory(size, *self._on_host.values())
        self.kept_16bit: list[str] = []
        self._keep_16bit = self._chosen_16bit(model)
        self.linears = {name: self._load_linear(source, name, layout) for name, layout in self.layout.linears.items()}
        self.experts = {name: self._load_experts(source, name, layout) for name, layout in self.layout.experts.items()}
        self.tensors = self._load_plain(source)
        self.initial: Mapping[str, Any] = getattr(source, "initial", {})
        """Linear layer -> what its adapter starts from (`initial_adapter.InitialLayer`), without which it is held."""

    def _chosen_16bit(self, model: Model) -> list[str]:
        """Names or endings of the parts that stay unquantised. Raises UserError for one that names no part."""
        if not self.quantized:
            return []
        parts = [part for linear in self.layout.linears.values() for part in linear.parts]
        parts += self.layout.experts
        if model.keep_16bit == "auto":
            raise ValueError('keep_16bit = "auto" is resolved by grpo.policy.keep_16bit.load_base')
        for ending in model.keep_16bit:
            if not any(matches_module(part, ending) for part in parts):
                raise UserError(
                    f"model.keep_16bit names {ending!r}, which is no linear layer of this model; name one such "
                    f"as {parts[0]!r} or its ending"
                )
        return list(model.keep_16bit)

    def keep_16bit(self, source: Source, parts: list[str]) -> None:
        """Read `parts`, which are NF4, again, to be held in 16 bit; before anything borrows the weights."""
        self._keep_16bit = parts
        for name, linear in self.linears.items():
            if any(part in parts for part in linear.parts):
                self.linears[name] = self._load_linear(source, name, self.layout.linears[name])

    def _load_plain(self, source: Source) -> dict[str, Tensor]:
        return {name: self._load_one(source, name) for name in sorted(self.layout.tensors)}

    def _load_one(self, source: Source, name: str) -> Tensor:
        tensor = dense(source.read(stored_form(self.config).renamed.get(name, name)), self.dtype)
        if name in self.layout.by_token:
            vocabulary, width = tensor.shape
            padded = -(-vocabulary // VOCABULARY_PADDING) * VOCABULARY_PADDING
            key = self._on_host.get(name)
            if key is None:
                storage = torch.zeros(padded, width, dtype=self.dtype, device=self.device)
            else:
                storage = host_memory.pinned_zeros(padded, width, dtype=self.dtype, wanted_by=key)
                self.pinned[name] = storage
            storage[:vocabulary].copy_(tensor)
            return storage if key is None else host_memory.device_view(self.device, storage)
        return tensor.to(self.device, torch.float32 if name in self.layout.float32 else self.dtype, copy=True)

    def _load_linear(self, source: Source, name: str, layout: LinearLayout) -> FusedLinear:
        linear = FusedLinear(name, dict(layout.parts), layout.in_features, layout.out_features, layout.again)
        for segment_parts in self._same_storage(source, list(layout.parts)):
            if self.load_in_8bit and not self._is_kept(segment_parts[0]):
                linear.segments += self._load_eight_bit(source, linear, segment_parts)
            else:
                linear.segments.append(self._load_segment(source, linear, segment_parts))
        linear.bias = self._load_bias(source, linear, layout.biased)
        return linear

    def _same_storage(self, source: Source, parts: list[str]) -> Iterator[list[str]]:
        """Runs of neighbouring parts that are all quantised or all kept."""
        run: list[str] = []
        for part in parts:
            if run and self._is_kept(part) != self._is_kept(run[-1]):
                yield run
                run = []
            run.append(part)
        yield run

    def _is_kept(self, part: str) -> bool:
        return not self.quantized or any(matches_module(part, ending) for ending in self._keep_16bit)

    def _load_eight_bit(self, source: Source, linear: FusedLinear, parts: list[str]) -> Iterator[Segment]:
        """The rows of `parts` in 8 bit, or on a CPU their values."""
        first = linear.parts[parts[0]][0]
        for rows in stacked([in_eight_bit(source.read(f"{part}.weight"), self.device) for part in parts]):
            if self.packed:
                yield Segment(first, rows.shape[0], rows.codes, rows.scales, self.dtype)
            else:
                yield Segment(first, rows.shape[0], rows.dense(self.dtype))
            first += rows.shape[0]

    def _load_segment(self, source: Source, linear: FusedLinear, parts: list[str]) -> Segment:
        first = linear.parts[parts[0]][0]
        rows = sum(linear.parts[part][1] for part in parts)
        columns = linear.in_features
        in_16bit = self._is_kept(parts[0])
        if self.quantized and in_16bit:
            self.kept_16bit += parts
        for part in parts:
            self._check_blocks(source, part, (linear.parts[part][1], columns), not in_16bit)
        if not in_16bit and self.packed:
            packed, absmax = nf4.allocate(rows, columns, self.dtype, self.device)
            segment = Segment(first, rows, packed, absmax)
        else:
            segment = Segment(first, rows, torch.empty(rows, columns, dtype=self.dtype, device=self.device))
        for part in parts:
            offset, count = linear.parts[part]
            self._fill(source, part, segment, offset - first, (count, columns), quantize=not in_16bit)
        return segment

    def _check_blocks(self, source: Source, module: str, size: tuple[int, int], quantize: bool) -> None:
        rows, columns = size
        if quantize and self.packed and rows % nf4.GROUP:
            raise UserError(
                f"{source.path}: {module} has {rows} outputs, not a multiple of {nf4.GROUP}, which NF4 needs on a "
                f"GPU; name {module.rpartition('.')[2]!r} in model.keep_16bit"
            )
        if quantize and columns % BLOCK:
            raise UserError(
                f"{source.path}: {module} has {columns} inputs, not a multiple of {BLOCK}, so NF4 blocks "
                "would cross rows; set model.load_in_4bit = false"
            )

    def _fill(
        self, source: Source, part: str, segment: Segment, row: int, shape: tuple[int, int], *, quantize: bool
    ) -> None:
        """Read one weight into rows `row`... of `segment`."""
        weight = source.read(f"{part}.weight")
        self._write(weight, segment.weight, segment.absmax, row, shape, quantize=quantize)

    def _write(
        self,
        weight: Tensor | Packed,
        stored: Tensor,
        scales: Tensor | None,
        row: int,
        shape: tuple[int, int],
        *,
        quantize: bool,
    ) -> None:
        """Put `weight` of `shape` into rows `row`... of the storage `stored`, with `scales` where that is NF4."""
        if scales is not None and isinstance(weight, NF4Tensor):
            codes, absmax = weight.codes.to(self.device), weight.absmax.to(self.device)
            nf4.pack_rows(stored, scales, row, codes, absmax, shape)
        elif scales is not None and not isinstance(weight, NF4Tensor):
            nf4.quantize_rows(stored, scales, row, dense(weight).to(self.device))
        else:
            if quantize and not isinstance(weight, NF4Tensor):
                weight = NF4Tensor(*nf4.quantize(dense(weight)), shape)
            stored[row : row + shape[0]].copy_(dense(weight, self.dtype))

    def _load_experts(self, source: Source, name: str, layout: ExpertsLayout) -> ExpertStack:
        if self.load_in_8bit:
            raise UserError(
                f"model.load_in_8bit: the experts of {source.path} are held in 4 or in 16 bit alone; set "
                "model.load_in_4bit = true instead, or both to false"
            )
        quantize = not self._is_kept(name)
        if self.load_in_4bit and not quantize:
            self.kept_16bit.append(name)

        def allocate(rows: int, columns: int, kept: Tensor | Packed) -> tuple[Tensor, Tensor | None]:
            self._check_blocks(source, name, (rows, columns), quantize)
            if isinstance(kept, MXFP4Tensor):
                if quantize and self.packed and self.dtype == torch.bfloat16:
                    return mxfp4.allocate(rows, columns, self.device)
            elif quantize and self.packed:
                return nf4.allocate(rows, columns, self.dtype, self.device)
            return torch.empty(rows, columns, dtype=self.dtype, device=self.device), None

        return load_stack(source, self.config, name, layout, allocate, partial(self._write, quantize=quantize))

    def _load_bias(self, source: Source, linear: FusedLinear, biased: tuple[str, ...]) -> Tensor | None:
        if not biased:
            return None
        bias = torch.zeros(linear.out_features, dtype=self.dtype, device=self.device)
        for part in biased:
            first, rows = linear.parts[part]
            bias[first : first + rows].copy_(source.read(f"{part}.bias"))
        return bias

    @property
    def stored_as(self) -> str:
        """What the linear layers are held in: "NF4", "int8", "FP8", or the compute dtype."""
        if self.load_in_8bit:
            return self.fingerprint.stored_as if self.fingerprint.stored_as in ("int8", "FP8") else "int8"
        return "NF4" if self.load_in_4bit else str(self.dtype).removeprefix("torch.")

    def nbytes(self) -> int:
        """Bytes of all storage on `device`, each counted once."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.storages()) - self.host_nbytes()

    def host_nbytes(self) -> int:
        """Bytes of storage in host memory while `device` has memory of its own."""
        return sum(storage.nbytes for storage in self.pinned.values())

    def head(self) -> Tensor:
        """The output head [vocabulary, hidden] where a product finds it: on `device`, or pinned on the CPU."""
        name = EMBEDDING if self.config.tie_word_embeddings else HEAD
        return self.pinned.get(name, self.tensors[name])[: self.config.vocab_size]

    def storages(self) -> Iterator[Tensor]:
        """Every owned tensor."""
        yield from self.tensors.values()
        for linear in self.linears.values():
            for segment in linear.segments:
                yield segment.weight
                if segment.absmax is not None:
                    yield segment.absmax
            if linear.bias is not None:
                yield linear.bias
        for stack in self.experts.values():
            yield from stack.storages()


def rounded_twice(source: Source, model: Model) -> str | None:
    """A sentence about a quantised checkpoint whose weights are to be held in another quantised form."""
    held = "NF4" if model.load_in_4bit else "int8"
    if model.load_in_4bit and source.stored_as in ("int8", "FP8"):
        remedy = "model.load_in_8bit = true keeps them as they are"
    elif model.load_in_8bit and source.stored_as == "NF4":
        remedy = "model.load_in_4bit = true keeps them as they are"
    else:
        return None
    return f"{source.path}: its weights, in {source.stored_as}, are rounded a second time, to {held}; {remedy}"


def matches_module(part: str, name: str) -> bool:
    """Whether `name` is the module name `part` or an ending of it."""
    return part == name or part.endswith("." + name)
