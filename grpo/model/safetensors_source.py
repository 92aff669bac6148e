"""A checkpoint in Hugging Face's format: a folder of safetensors, unquantised, 8-bit or bitsandbytes 4-bit.

Pickled checkpoints are refused: loading one can run arbitrary code.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from grpo.config.schema import Model
from grpo.errors import UserError
from grpo.kernels.mxfp4 import BLOCK as MXFP4_BLOCK
from grpo.kernels.nf4_lookup import CODE
from grpo.model.architectures import check_supported
from grpo.model.checks import check_family, check_sizes, one_line, read_object
from grpo.model.eight_bit_source import CODES, read_eight_bit, scales_name
from grpo.model.layout import HEAD
from grpo.model.meta_graph import graph_tensors
from grpo.model.quantization import (
    MXFP4_ENTRIES,
    READ_INSTEAD,
    check_quantization,
    quantization,
    stated,
    weight_of,
    with_modelopt,
)
from grpo.model.sound import refuse_sound
from grpo.model.text_decoder import decoder_names, text_config
from grpo.model.vision import Vision, tower_shapes
from grpo.model.weight_files import stored_names, unique, unread_files, weights_entry
from grpo.model.weight_source import MXFP4Tensor, NF4Tensor, Packed

NF4_STATE = ".quant_state.bitsandbytes__nf4"
"""What bitsandbytes appends to a weight's name for the description of its NF4 storage."""
NF4_ENTRIES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", NF4_STATE.removeprefix("."))
"""What bitsandbytes keeps beside the codes of a weight, under its name."""
DENSE_TYPES = ("F64", "F32", "F16", "BF16")
"""safetensors' names of the types whose values are the weights; those of any other need scales."""


class SafetensorsSource:
    """A folder with config.json and safetensors, whole or in shards: 16-bit, 32-bit, 8-bit, bitsandbytes 4-bit, or
    experts in MXFP4."""

    def __init__(self, path: Path, model: Model):
        from huggingface_hub import constants
        from transformers import AutoConfig
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

        if not (path / "config.json").is_file():
            raise UserError(f"{path}: no config.json; pass a model folder in Hugging Face format or a .gguf file")
        self.path = path
        self._trust_remote_code = model.trust_remote_code
        file = path / "config.json"
        values = read_object(file)
        refuse_sound(values, file)
        check_family(values, file)
        check_sizes(values, file)
        values = with_modelopt(values, path)
        check_quantization(values, file)
        self._quantization = quantization(values)
        # Of a family that transformers has, its own class is used, whatever code lies beside the weights.
        brings_code = "auto_map" in values and values.get("model_type") not in CONFIG_MAPPING_NAMES
        if brings_code and not model.trust_remote_code:
            raise UserError(
                f"{file}: the model brings Python code of its own, which is not run; set model.trust_remote_code = "
                "true if you trust it"
            )
        try:
            # Some classes ask the hub for a part of their configuration, which nobody named.
            with mock.patch.object(constants, "HF_HUB_OFFLINE", constants.HF_HUB_OFFLINE or not brings_code):
                whole = AutoConfig.from_pretrained(path, trust_remote_code=brings_code)
            self.vision = Vision.of(whole, str(path)) if model.images else None
            self.config = text_config(whole, images=model.images)
        except UserError:
            raise
        except Exception as error:  # whatever transformers' checks of an untrusted file raise
            raise UserError(f"{file}: {one_line(error)}; correct it, or download the model again") from None
        if stored := stated(values):
            self.config.quantization_config = stored  # which may be the whole model's, and a memory plan reads
        entry = weights_entry(path, getattr(whole, "transformers_weights", None))
        self._shard_of = self._index(entry)
        self.notices = unread_files(path, set(self._shard_of.values()))
        self._stored_name: dict[str, str] = {}
        self._open: dict[Path, Any] = {}
        if self.config is not whole:
            self._name_decoder()
        self.names = {self._logical_name(name) for name in self._shard_of}
        self.tower = self._find_tower()

    def _find_tower(self) -> dict[str, str]:
        """The tower's tensors -> their entries; none where images are not read."""
        if self.vision is None:
            return {}
        shapes = tower_shapes(self.vision)
        found = self.vision.stored_tower(self.names, shapes, str(self.path))
        for name, entry in found.items():
            if self.shape(entry) != shapes[name]:
                raise UserError(
                    f"{self.path}: {entry} has shape {self.shape(entry)}, config.json says {shapes[name]}; pass a "
                    "model whose files belong together"
                )
        return found

    def _logical_name(self, name: str) -> str:
        """The weight that the entry `name` belongs to: packed ones have several."""
        if name.endswith(MXFP4_ENTRIES) and self._is_mxfp4(whole := name.rpartition("_")[0]):
            return whole
        weight = weight_of(name)
        if weight != name and weight in self._shard_of and self._is_eight_bit(weight):
            return weight
        return logical_name(name, self._shard_of)

    def _name_decoder(self) -> None:
        """Call the tensors of the decoder of text as a model has them that is nothing else."""
        check_supported(self.config, str(self.path))
        try:
            wanted = set(graph_tensors(self.config).shapes()) | {HEAD}
        except UserError as error:
            raise UserError(f"{self.path}: architecture {self.config.model_type!r} is not supported: {error}") from None
        self._stored_name = decoder_names(self._shard_of, wanted)
        renamed = {stored: name for name, stored in self._stored_name.items()}
        self._shard_of = {renamed.get(stored, stored): file for stored, file in self._shard_of.items()}

    def _index(self, entry: Path) -> dict[str, Path]:
        """Name -> file of everything in the safetensors file `entry`, or in the shards of the index `entry`."""
        if entry.suffix == ".safetensors":
            return dict.fromkeys(self._handle_names(entry), entry)
        index = read_index(entry)
        shards = sorted({self.path / file for file in index.values()})
        for shard in shards:
            if not shard.is_file():
                raise UserError(f"{self.path}: shard {shard.name} is missing; download the model again")
        file_of: dict[str, Path] = {}
        for shard in shards:
            for name in self._handle_names(shard):
                if name in file_of:
                    raise UserError(
                        f"{shard}: holds {name}, and so does {file_of[name].name}; download the model again, or leave "
                        "one of the two"
                    )
                file_of[name] = shard
        for name, file in index.items():
            if file_of.get(name) != self.path / file:
                raise UserError(f"{entry}: places {name} in {file}, which lacks it; download the model again")
        return file_of

    @staticmethod
    def _handle_names(file: Path) -> list[str]:
        from safetensors import safe_open

        with damage_as_user_error(file), safe_open(file, framework="pt"):  # the header is believed once it is checked
            return stored_names(file)

    @property
    def stored_as(self) -> str:
        if any(name.endswith(NF4_STATE) for name in self._shard_of):
            return "NF4"
        name = next((name for name in sorted(self.names) if name.endswith("proj.weight")), min(self.names))
        with damage_as_user_error(self._shard_of[name]):
            if (code := CODES.get(self._slice(name).get_dtype())) is not None:
                return code
        return str(self._raw(name).dtype).removeprefix("torch.")

    def shape(self, name: str) -> tuple[int, ...]:
        if self._is_mxfp4(name):
            return self._mxfp4_shape(name)
        if f"{name}{NF4_STATE}" in self._shard_of:
            with damage_as_user_error(self._shard_of[name]):
                return self._nf4_shape(name)
        with damage_as_user_error(self._shard_of[name]):
            stored = self._slice(name)
            if not self._is_eight_bit(name) and stored.get_dtype() not in DENSE_TYPES:
                raise self._unknown_storage(name, stored.get_dtype())
            return tuple(stored.get_shape())

    def _is_mxfp4(self, name: str) -> bool:
        return all(f"{name}{entry}" in self._shard_of for entry in MXFP4_ENTRIES)

    def _mxfp4_shape(self, name: str) -> tuple[int, int, int]:
        """The shape of experts in MXFP4, which the graph has transposed."""
        codes, exponents = (f"{name}{entry}" for entry in MXFP4_ENTRIES)
        with damage_as_user_error(self._shard_of[codes]):
            kinds = {self._slice(codes).get_dtype(), self._slice(exponents).get_dtype()}
            experts, rows, blocks, size = self._slice(codes).get_shape()
            if kinds != {"U8"} or size != MXFP4_BLOCK // 2:
                raise ValueError(f"{codes} are no codes of MXFP4, of which a block of {MXFP4_BLOCK} shares an exponent")
            if tuple(self._slice(exponents).get_shape()) != (experts, rows, blocks):
                raise ValueError(f"{exponents} does not fit {codes}")
            return experts, blocks * MXFP4_BLOCK, rows

    def _slice(self, name: str) -> Any:
        return self._handle(name).get_slice(self._stored_name.get(name, name))

    def _is_eight_bit(self, name: str) -> bool:
        return self._slice(name).get_dtype() in CODES and scales_name(name, self._shard_of) is not None

    def _nf4_shape(self, name: str) -> tuple[int, ...]:
        """Raises ValueError where an entry that `read` needs is missing, or the codes stand for other values."""
        needed = ["absmax", "quant_map"]
        if f"{name}.nested_absmax" in self._shard_of:
            needed.append("nested_quant_map")
        for entry in needed:
            if f"{name}.{entry}" not in self._shard_of:
                raise ValueError(f"{name}.{entry} is missing")
        values = self._raw(f"{name}.quant_map").float()
        if values.shape != (len(CODE),) or not torch.allclose(values, torch.tensor(CODE), atol=1e-3):
            raise ValueError(f"{name}.quant_map is not that of NF4")
        return tuple(self._nf4_state(name)["shape"])

    def read(self, name: str) -> Tensor | Packed:
        if self._is_mxfp4(name):
            self._mxfp4_shape(name)  # the form is one that is read
            codes, exponents = (self._raw(f"{name}{entry}") for entry in MXFP4_ENTRIES)
            return MXFP4Tensor(codes, exponents)
        if f"{name}{NF4_STATE}" in self._shard_of:
            with damage_as_user_error(self._shard_of[name]):
                return self._read_nf4(name, self._raw(name))
        self.shape(name)  # the form is one that is read
        if self._is_eight_bit(name):
            with damage_as_user_error(self._shard_of[name]):
                return read_eight_bit(name, self._shard_of, self._raw, self._quantization)
        return self._raw(name)

    def _unknown_storage(self, name: str, stored: str) -> UserError:
        return UserError(
            f"{self._shard_of[name]}: {name} is kept as {stored}, without the scales of a form that is read; "
            f"{READ_INSTEAD}"
        )

    def _handle(self, name: str) -> Any:
        from safetensors import safe_open

        file = self._shard_of[name]
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt")
        return self._open[file]

    def _raw(self, name: str) -> Tensor:
        with damage_as_user_error(self._shard_of[name]):
            return self._handle(name).get_tensor(self._stored_name.get(name, name))

    def _nf4_state(self, name: str) -> dict[str, Any]:
        with damage_as_user_error(self._shard_of[name]):
            return json.loads(bytes(self._raw(f"{name}{NF4_STATE}").tolist()))

    def _read_nf4(self, name: str, codes: Tensor) -> NF4Tensor:
        state = self._nf4_state(name)
        if state["blocksize"] != 64:
            raise UserError(
                f"{self._shard_of[name]}: {name} has NF4 blocks of {state['blocksize']}; only 64 is supported"
            )
        absmax = self._raw(f"{name}.absmax")
        if f"{name}.nested_absmax" in self._shard_of:
            nested = self._raw(f"{name}.nested_absmax").float()
            table = self._raw(f"{name}.nested_quant_map").float()
            per_block = nested.repeat_interleave(state["nested_blocksize"])[: absmax.numel()]
            absmax = table[absmax.long()] * per_block + state["nested_offset"]
        rows, columns = state["shape"]
        codes = codes.reshape(-1).view(torch.uint8)  # `bnb_4bit_quant_storage` may call the bytes by another type
        if (2 * codes.numel(), 64 * absmax.numel()) != (rows * columns, rows * columns):
            raise ValueError(f"the NF4 codes or scales of {name} do not fit its shape")
        return NF4Tensor(codes, absmax.float().reshape(-1), (rows, columns))

    def stored_name(self, name: str) -> str:
        return self._stored_name.get(name, name)

    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.path, trust_remote_code=self._trust_remote_code)
        except Exception as error:  # tokenizers raises plain Exceptions
            raise UserError(
                f"{self.path}: no usable tokenizer ({one_line(error)}); copy the model's tokenizer files there"
            ) from None


def read_index(index: Path) -> dict[str, str]:
    """Tensor name -> file, from a shard index. Raises UserError for a damaged one, or one that leaves its folder."""
    try:
        places = json.loads(index.read_text(), object_pairs_hook=unique)["weight_map"]
        files = {str(name): str(file) for name, file in places.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index}: not a valid shard index ({error}); download the model again") from None
    outside = next((file for file in files.values() if Path(file).name != file), None)
    if outside is not None:
        raise UserError(f"{index}: names the shard {outside!r}, which is not in its folder; download the model again")
    return files


@contextmanager
def damage_as_user_error(file: Path) -> Iterator[None]:
    """Damage that is met while reading `file` becomes a UserError."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise UserError(f"{file}: damaged safetensors ({one_line(error)}); download it again") from None


def logical_name(name: str, stored: Container[str]) -> str:
    """The weight that the entry `name` belongs to among those `stored`: bitsandbytes has several for one in 4 bit."""
    weight = name.partition(".weight.")[0] + ".weight"
    packed = weight in stored and f"{weight}{NF4_STATE}" in stored
    return weight if packed and name.removeprefix(f"{weight}.") in NF4_ENTRIES else name
