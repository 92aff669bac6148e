"""Adapters that begin as a part of the base: PiSSA, OLoRA and LoftQ, for which the base is held without that part.

The base becomes Q(W - s B0 A0), where Q is how it is held (NF4, or one rounding), s the adapter's scale, and A0, B0
what the adapter starts from:

    pissa   the largest singular values of W and their vectors
    olora   the first columns and rows of W = QR
    loftq   the largest part of W - Q(W), the error of quantising; several iterations quantise W without the part again

With the adapter as it started, the model is W but for rounding. So that is what "the adapter is off" and the KL
reference mean. A0 and B0 are kept in float32 beside every saved adapter: which numbers a decomposition gives depends on
the machine, and the base has to be the same again. Only where an adapter of peft's comes without them are they computed
from W, as peft does when it loads one.

Not here: the graph's layers over them (`grpo.policy.lora_linear`), and plain LoRA of them (`grpo.export.plain_lora`).
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from grpo.config.schema import Lora
from grpo.errors import UserError
from grpo.kernels import nf4
from grpo.model.adapter_config import PISSA_NITER
from grpo.model.adapter_layers import LayerAdapter, adapted_layers
from grpo.model.base_weights import matches_module
from grpo.model.checks import one_line
from grpo.model.locate import INITIAL_ADAPTER as RECORD
from grpo.model.sizes import linear_shapes
from grpo.model.weight_source import Packed, Source, dense

LOFTQ = "loftq"


class Factors(NamedTuple):
    """A [rank, in] and B [out, rank], float32 on the CPU."""

    a: Tensor
    b: Tensor


@dataclass(frozen=True)
class InitialLayer:
    """What the adapter of one linear layer starts from, and what its base was made without."""

    start: Factors
    scale: float
    taken: Factors | None
    """The base is Q(W - scale B A) of these; None: Q(W), as after LoftQ's first iteration."""


class ResidualSource:
    """`source` without what adapters start from, under the interface of a Source; `initial` is filled as it is read."""

    def __init__(
        self,
        source: Source,
        lora: Lora,
        *,
        record: Mapping[str, InitialLayer] | None = None,
        device: torch.device | None = None,
        in_16bit: Sequence[str] | None = (),
        seed: int = 0,
    ):
        """record: A0 and B0 that are known. device: where decompositions are made. in_16bit: layers that are not
        quantised, None where none is. Raises UserError for what cannot be had from this checkpoint."""
        self.source, self.lora, self.seed = source, lora, seed
        self.path, self.config, self.stored_as = source.path, source.config, source.stored_as
        self.names, self.notices = source.names, source.notices
        self.vision, self.tower = source.vision, source.tower
        self.device = device or torch.device("cpu")
        layers = adapted_layers(source.config.get_text_config(), lora)
        if lora.init_lora_weights == LOFTQ:
            layers = {name: layer for name, layer in layers.items() if quantised(name, in_16bit)}
            if not layers:
                raise UserError(
                    'lora.init_lora_weights = "loftq" corrects the error of NF4, and no layer with an adapter is held '
                    'in 4 bits here; set model.load_in_4bit = true, or use "pissa" or true'
                )
            if source.stored_as == "NF4":
                raise UserError(
                    f'{source.path}: lora.init_lora_weights = "loftq" needs an unquantised checkpoint; this one is '
                    "NF4, whose error is not known"
                )
        if source.stored_as in ("int8", "FP8"):
            raise UserError(
                f"{source.path}: its weights are in 8 bit and are kept so, and lora.init_lora_weights = "
                f"{lora.init_lora_weights!r} would take a part of them; use an unquantised checkpoint"
            )
        check_ranks(source, layers)
        self.layers = layers
        self.initial: dict[str, InitialLayer] = dict(record or {})
        if record is not None:
            check_record(record, source, layers)

    def shape(self, name: str) -> tuple[int, ...]:
        """As the source's."""
        return self.source.shape(name)

    def stored_name(self, name: str) -> str:
        """What the checkpoint calls it."""
        return self.source.stored_name(name)

    def tokenizer(self) -> Any:
        """As the source's."""
        return self.source.tokenizer()

    @torch.no_grad()
    def read(self, name: str) -> Tensor | Packed:
        """The tensor `name`, float32 without what the adapter starts from; as stored where that is nothing."""
        stored = self.source.read(name)
        layer = name.removesuffix(".weight")
        if layer == name or layer not in self.layers:
            return stored
        if layer not in self.initial:
            self.initial[layer] = self.start_of(layer, dense(stored).to(self.device, torch.float32))
        found = self.initial[layer]
        if found.taken is None:
            return stored
        a, b = (factor.to(self.device) for factor in found.taken)
        return dense(stored).to(self.device, torch.float32) - found.scale * (b @ a)

    def start_of(self, layer: str, weight: Tensor) -> InitialLayer:
        """What the adapter of `layer` starts from, by its weight [out, in] in float32."""
        rank, scale = self.layers[layer]
        kind = str(self.lora.init_lora_weights)
        if kind == LOFTQ:
            start, taken = loftq(weight, rank, scale, self.lora.loftq_iter)
        elif kind == "olora":
            start = taken = olora(weight, rank)
        else:
            match = PISSA_NITER.fullmatch(kind)
            seed = zlib.crc32(f"{self.seed} {layer}".encode())
            start = taken = pissa(weight, rank, scale, int(match[1]) if match else None, seed)
        kept = Factors(*(factor.cpu().contiguous() for factor in start))
        same = kept if taken is start else None
        return InitialLayer(kept, scale, same or (taken and Factors(*(factor.cpu().contiguous() for factor in taken))))

    def read_all(self) -> dict[str, InitialLayer]:
        """What every adapter starts from."""
        for layer in self.layers:
            if layer not in self.initial:
                self.read(f"{layer}.weight")
        return self.initial


def quantised(layer: str, in_16bit: Sequence[str] | None) -> bool:
    return in_16bit is not None and not any(matches_module(layer, ending) for ending in in_16bit)


def check_ranks(source: Source, layers: Mapping[str, LayerAdapter]) -> None:
    """Raise UserError where a rank is larger than the layer has singular values."""
    shapes = linear_shapes(source.config.get_text_config())
    for name, (rank, _) in layers.items():
        if rank > min(shapes[name]):
            raise UserError(
                f"lora.init_lora_weights decomposes {name}, of {shapes[name][0]} x {shapes[name][1]}, which has no "
                f"{rank} singular values; lower lora.r to {min(shapes[name])}"
            )


# The three ways


def pissa(weight: Tensor, rank: int, scale: float, iterations: int | None = None, seed: int = 0) -> Factors:
    """The `rank` largest singular values of `weight` and their vectors, half of each value in either factor.

    iterations: of a randomised decomposition, which is fast on large layers; None: the exact one.
    """
    if iterations is None:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        left, values, right = left[:, :rank], values[:rank], right[:rank]
    else:
        devices = [weight.device] if weight.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            left, values, transposed = torch.svd_lowrank(weight, rank, niter=iterations)
        right = transposed.t()
    root = torch.diag(torch.sqrt(values / scale))
    return Factors(root @ right, left @ root)


def olora(weight: Tensor, rank: int) -> Factors:
    """The first columns of Q and rows of R, of which `weight` is the product."""
    q, r = torch.linalg.qr(weight)
    return Factors(r[:rank], q[:, :rank])


def loftq(weight: Tensor, rank: int, scale: float, iterations: int) -> tuple[Factors, Factors | None]:
    """(what corrects most of the error of quantising, what was taken from `weight` before it was quantised).

    peft leaves the scale out, and its adapter begins at `scale` times the correction; here it is divided by it.
    """
    start: Factors | None = None
    taken = None
    for _ in range(iterations):
        taken = start
        residual = weight if taken is None else weight - scale * (taken.b @ taken.a)
        error = weight - rounded_to_nf4(residual)
        start = pissa(error, rank, scale)
    assert start is not None
    return start, taken


def rounded_to_nf4(weight: Tensor) -> Tensor:
    """`weight` [out, in], float32, with its values replaced by NF4's."""
    shape = (weight.shape[0], weight.shape[1])
    return nf4.dequantize_bitsandbytes(*nf4.quantize(weight), shape, torch.float32)


# The record


def write_record(folder: Path, lora: Lora, initial: Mapping[str, InitialLayer]) -> None:
    """Keep A0 and B0 beside the adapter in `folder`; nothing where there are none."""
    from safetensors.torch import save_file

    if not initial:
        return
    tensors: dict[str, Tensor] = {}
    for name, layer in initial.items():
        tensors |= {f"{name}.A": layer.start.a, f"{name}.B": layer.start.b}
        if layer.taken is not None and layer.taken is not layer.start:
            tensors |= {f"{name}.taken_A": layer.taken.a, f"{name}.taken_B": layer.taken.b}
    described = {
        "init_lora_weights": str(lora.init_lora_weights),
        "loftq_iter": lora.loftq_iter,
        "layers": {name: {"scale": each.scale, "taken": held_as(each)} for name, each in initial.items()},
    }
    save_file(tensors, str(folder / RECORD), metadata={"initial_adapter": json.dumps(described)})


def held_as(layer: InitialLayer) -> str:
    """Which factors the base was made without: none, the start's, or others."""
    return "nothing" if layer.taken is None else "start" if layer.taken is layer.start else "other"


def read_record(folder: Path) -> dict[str, InitialLayer] | None:
    """What `write_record` left in `folder`, or None. Raises UserError where it is damaged."""
    file = folder / RECORD
    if not file.is_file():
        return None
    try:
        with safe_open(str(file), framework="pt") as stored:
            described = json.loads((stored.metadata() or {})["initial_adapter"])
            found = {}
            for name, entry in described["layers"].items():
                # Copies: the file may be written anew, and its memory is mapped.
                start = Factors(*(stored.get_tensor(f"{name}.{factor}").clone() for factor in "AB"))
                taken = {"nothing": None, "start": start}.get(entry["taken"])
                if entry["taken"] == "other":
                    taken = Factors(*(stored.get_tensor(f"{name}.taken_{factor}").clone() for factor in "AB"))
                found[str(name)] = InitialLayer(start, float(entry["scale"]), taken)
        return found
    except (OSError, SafetensorError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(f"{file}: damaged ({one_line(error)}); copy the adapter again") from None


def check_record(record: Mapping[str, InitialLayer], source: Source, layers: Mapping[str, LayerAdapter]) -> None:
    """Raise UserError unless `record` is of adapters on these layers of this model."""
    shapes = linear_shapes(source.config.get_text_config())
    for name in sorted(record.keys() ^ layers.keys()):
        which = "lacks" if name in layers else "has"
        raise UserError(f"{RECORD}: it {which} {name}, so it is of another adapter; copy the adapter again")
    for name, (rank, scale) in layers.items():
        rows, columns = shapes[name]
        found = record[name]
        for factors in (found.start, found.taken or found.start):
            sizes = (tuple(factors.a.shape), tuple(factors.b.shape))
            floats = factors.a.dtype == factors.b.dtype == torch.float32
            if sizes != ((rank, columns), (rows, rank)) or not floats or abs(found.scale - scale) > 1e-6 * abs(scale):
                raise UserError(
                    f"{RECORD}: {name} has rank {sizes[0][0]} and scale {found.scale:g}, the adapter {rank} and "
                    f"{scale:g}; copy the adapter again"
                )


def recorded_initial(folders: Sequence[Path]) -> dict[str, InitialLayer] | None:
    """The record in the first of `folders` that has one."""
    return next((found for folder in folders if (found := read_record(folder)) is not None), None)


def digest(initial: Mapping[str, InitialLayer]) -> str:
    """Of every A0 and B0, by which several processes know that theirs are the same."""
    state = hashlib.sha256()
    for name in sorted(initial):
        state.update(name.encode())
        for factor in initial[name].start:
            state.update(factor.numpy().tobytes())
    return state.hexdigest()
