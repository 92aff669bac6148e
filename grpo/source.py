"""Where base weights come from: a folder of safetensors, a bitsandbytes 4-bit checkpoint, a hub id, or a GGUF file.

A `Source` names its tensors as transformers does and reads them one at a time, so that loading never holds more than
one 16-bit tensor. Pickled checkpoints are refused: loading one can run arbitrary code. What becomes of the tensors is
decided in `base.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from grpo.architectures import ARCHITECTURES, check_supported, fused_linears
from grpo.config import Model
from grpo.errors import UserError
from grpo.gguf_config import ROTARY_TENSORS, complete_config
from grpo.gguf_header import read_header
from grpo.locate import local_path
from grpo.model_files import check_quantization, check_sizes, one_line, read_object
from grpo.weight_files import stored_names, unique, unread_files, weights_entry

NF4_STATE = ".quant_state.bitsandbytes__nf4"
"""What bitsandbytes appends to a weight's name for the description of its NF4 form."""
NF4_ENTRIES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", NF4_STATE.removeprefix("."))
"""What bitsandbytes keeps beside the codes of a weight, under its name."""
DENSE_TYPES = ("F64", "F32", "F16", "BF16")
"""safetensors' names of the types whose values are the weights; those of any other need scales."""


@dataclass(frozen=True)
class NF4Tensor:
    """A weight as bitsandbytes stores it.

    `codes` uint8 [out * in / 2], two codes a byte, even column in the high half; `absmax` float32 [out * in / 64].
    """

    codes: Tensor
    absmax: Tensor
    shape: tuple[int, int]


class Source(Protocol):
    """A checkpoint that can be read tensor by tensor."""

    path: Path
    config: Any
    """transformers' configuration of the model."""
    names: set[str]
    notices: list[str]
    """A sentence each about what of the checkpoint is not read."""

    @property
    def stored_as(self) -> str:
        """What most of the weights are kept in: "bfloat16", "float16", "float32", "NF4", or a GGUF type as "Q4_1"."""
        ...

    def read(self, name: str) -> Tensor | NF4Tensor:
        """The tensor called `name`, on the CPU, in the checkpoint's precision."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that `read` gives, without reading the values."""
        ...

    def tokenizer(self) -> Any:
        """transformers' tokenizer."""
        ...


def open_source(model: Model) -> Source:
    """The checkpoint that `[model]` names. Raises UserError when it cannot be found, read or trusted."""
    path = locate(model)
    if path.suffix == ".gguf":
        return GGUFSource(path)
    return SafetensorsSource(path, model)


def locate(model: Model) -> Path:
    """The local file or folder of `model.name`; a hub id is downloaded, unless transformers is told to be offline."""
    return local_path(model.name) or download(model.name, model.revision)


def download(name: str, revision: str | None) -> Path:
    """The hub repository `name` in the local cache, without its pickled or foreign weights."""
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"model.name = {name!r}: not a local path, and the hub gives no such model ({reason})"
        ) from None


class SafetensorsSource:
    """A folder with config.json and safetensors, whole or in shards, 16-bit, 32-bit or bitsandbytes 4-bit."""

    def __init__(self, path: Path, model: Model):
        from transformers import AutoConfig

        if not (path / "config.json").is_file():
            raise UserError(f"{path}: no config.json; pass a model folder in Hugging Face format or a .gguf file")
        self.path = path
        self._trust_remote_code = model.trust_remote_code
        file = path / "config.json"
        values = read_object(file)
        check_sizes(values, file)
        check_quantization(values, file)
        # Of a family that transformers has, its own class is used, whatever code lies beside the weights.
        brings_code = "auto_map" in values and values.get("model_type") not in ARCHITECTURES
        if brings_code and not model.trust_remote_code:
            raise UserError(
                f"{file}: the model brings Python code of its own, which is not run; set model.trust_remote_code = "
                "true if you trust it"
            )
        try:
            self.config = AutoConfig.from_pretrained(path, trust_remote_code=brings_code)
        except Exception as error:  # whatever transformers' checks of a stranger's file raise
            raise UserError(f"{file}: {one_line(error)}; correct it, or download the model again") from None
        entry = weights_entry(path, getattr(self.config, "transformers_weights", None))
        self._shard_of = self._index(entry)
        self.notices = unread_files(path, set(self._shard_of.values()))
        self.names = {logical_name(name, self._shard_of) for name in self._shard_of}
        self._open: dict[Path, Any] = {}

    def _index(self, entry: Path) -> dict[str, Path]:
        """Name -> file of everything in the safetensors file `entry`, or in the shards of the index `entry`."""
        if entry.suffix == ".safetensors":
            return dict.fromkeys(self._handle_names(entry), entry)
        places = read_index(entry)
        shards = sorted({self.path / file for file in places.values()})
        for shard in shards:
            if not shard.is_file():
                raise UserError(f"{self.path}: shard {shard.name} is missing; download the model again")
        found: dict[str, Path] = {}
        for shard in shards:
            for name in self._handle_names(shard):
                if name in found:
                    raise UserError(
                        f"{shard}: holds {name}, and so does {found[name].name}; download the model again, or leave "
                        "one of the two"
                    )
                found[name] = shard
        for name, file in places.items():
            if found.get(name) != self.path / file:
                raise UserError(f"{entry}: places {name} in {file}, which lacks it; download the model again")
        return found

    @staticmethod
    def _handle_names(file: Path) -> list[str]:
        from safetensors import safe_open

        with damage_named(file), safe_open(file, framework="pt"):  # the header is believed once it is checked
            return stored_names(file)

    @property
    def stored_as(self) -> str:
        if any(name.endswith(NF4_STATE) for name in self._shard_of):
            return "NF4"
        name = next((name for name in sorted(self.names) if "proj" in name), min(self.names))
        return str(self._raw(name).dtype).removeprefix("torch.")

    def shape(self, name: str) -> tuple[int, ...]:
        if f"{name}{NF4_STATE}" in self._shard_of:
            with damage_named(self._shard_of[name]):
                return self._nf4_shape(name)
        with damage_named(self._shard_of[name]):
            stored = self._handle(name).get_slice(name)
            if stored.get_dtype() not in DENSE_TYPES:
                raise self._unknown_form(name, stored.get_dtype())
            return tuple(stored.get_shape())

    def _nf4_shape(self, name: str) -> tuple[int, ...]:
        """Raises LookupError where an entry that `read` needs is missing."""
        needed = ["absmax"]
        if f"{name}.nested_absmax" in self._shard_of:
            needed.append("nested_quant_map")
        for entry in needed:
            self._shard_of[f"{name}.{entry}"]
        return tuple(self._nf4_state(name)["shape"])

    def read(self, name: str) -> Tensor | NF4Tensor:
        if f"{name}{NF4_STATE}" in self._shard_of:
            with damage_named(self._shard_of[name]):
                return self._read_nf4(name, self._raw(name))
        self.shape(name)  # the form is one that is read
        return self._raw(name)

    def _unknown_form(self, name: str, stored: str) -> UserError:
        return UserError(
            f"{self._shard_of[name]}: {name} is quantised in a form other than bitsandbytes NF4 ({stored}); use an NF4 "
            "or an unquantised checkpoint"
        )

    def _handle(self, name: str) -> Any:
        from safetensors import safe_open

        file = self._shard_of[name]
        if file not in self._open:
            self._open[file] = safe_open(file, framework="pt")
        return self._open[file]

    def _raw(self, name: str) -> Tensor:
        with damage_named(self._shard_of[name]):
            return self._handle(name).get_tensor(name)

    def _nf4_state(self, name: str) -> dict[str, Any]:
        with damage_named(self._shard_of[name]):
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
def damage_named(file: Path) -> Iterator[None]:
    """Damage that is met while reading `file` becomes a UserError."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise UserError(f"{file}: damaged safetensors ({one_line(error)}); download it again") from None


def logical_name(name: str, stored: Container[str]) -> str:
    """The weight that the entry `name` belongs to among those `stored`: bitsandbytes has several for one."""
    weight = name.partition(".weight.")[0] + ".weight"
    packed = weight in stored and f"{weight}{NF4_STATE}" in stored
    return weight if packed and name.removeprefix(f"{weight}.") in NF4_ENTRIES else name


class GGUFSource:
    """A GGUF file: metadata and tokenizer through transformers, tensors dequantised one by one through `gguf`."""

    def __init__(self, path: Path, config: Any = None):
        """config: the model's, where it is known better than from the file (and of families that transformers does
        not read from GGUF)."""
        from transformers import AutoConfig

        from grpo.gguf_reader import PlainReader

        self.path = path
        self.notices: list[str] = []
        read_header(path)
        try:
            self.reader = PlainReader(path)
            self.config = AutoConfig.from_pretrained(metadata_folder(path)) if config is None else config
        except Exception as error:  # both readers trust what the file says
            raise UserError(f"{path}: not a readable GGUF file ({one_line(error)}); download it again") from None
        check_sizes(self.config.get_text_config().to_dict(), path)
        self._tensors = self._name_tensors()
        self.names = set(self._tensors)
        if config is None:
            complete_config(self.config.get_text_config(), self.reader, str(path))
            self.config.tie_word_embeddings = "lm_head.weight" not in self.names

    def _name_tensors(self) -> dict[str, Any]:
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        field = self.reader.get_field("general.architecture")
        self._architecture = field.contents() if field else ""
        by_name = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
        if self._architecture not in by_name:
            raise UserError(f"{self.path}: GGUF architecture {self._architecture!r} is unknown to the gguf package")
        text_config = self.config.get_text_config()
        check_supported(text_config, str(self.path))
        names = get_tensor_name_map(by_name[self._architecture], text_config.num_hidden_layers)
        tensors = {tensor.name: tensor for tensor in self.reader.tensors}
        found = {}
        for candidate in candidate_names(text_config):
            stored = names.get_name(candidate, try_suffixes=(".weight", ".bias"))
            if stored in tensors:
                found[candidate] = tensors.pop(stored)
        # What has no name in transformers keeps its own, but for rotary factors: these are in the configuration.
        return found | {name: tensor for name, tensor in tensors.items() if name not in ROTARY_TENSORS}

    @property
    def stored_as(self) -> str:
        kinds = [tensor.tensor_type.name for name, tensor in self._tensors.items() if "proj" in name]
        common = max(set(kinds), key=kinds.count)
        return {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(common, common)

    def shape(self, name: str) -> tuple[int, ...]:
        from gguf.quants import dequantize

        stored = self._tensors[name]
        try:
            dequantize(stored.data[:0], stored.tensor_type)
        except NotImplementedError:
            raise UserError(
                f"{self.path}: {name} is kept as {stored.tensor_type.name}, which the gguf package does not read; "
                "convert the model to another type"
            ) from None
        return tuple(int(size) for size in reversed(stored.shape))

    def read(self, name: str) -> Tensor:
        from gguf.quants import dequantize

        stored = self._tensors[name]
        weight = torch.from_numpy(dequantize(stored.data, stored.tensor_type).copy()).float()
        return self._undo_conversion(name, weight)

    def _undo_conversion(self, name: str, weight: Tensor) -> Tensor:
        """llama.cpp interleaves the rotary halves of Llama's q and k, and stores Gemma's norm weights plus one."""
        text_config = self.config.get_text_config()
        if self._architecture == "llama" and name.endswith(
            ("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias")
        ):
            heads = text_config.num_attention_heads if ".q_proj." in name else text_config.num_key_value_heads
            halves = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
            return halves.transpose(1, 2).reshape(weight.shape).contiguous()
        if self._architecture.startswith("gemma") and name.endswith("norm.weight"):
            return weight - 1
        return weight

    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(metadata_folder(self.path))


def metadata_folder(path: Path) -> Path:
    """Configuration and tokenizer of a GGUF file as transformers saves them, kept in the user's cache.

    Reading the vocabulary out of the file takes transformers seconds, twice; the cache makes that once a file.
    """
    import transformers

    stat = path.stat()
    key = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {transformers.__version__}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "grpo" / "gguf"
    folder = cache / hashlib.sha256(key.encode()).hexdigest()[:16]
    if folder.is_dir():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=cache))
    except OSError:
        scratch = Path(tempfile.mkdtemp(prefix="grpo-gguf-"))
    try:
        transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(scratch)
        transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(scratch)
    except BaseException:
        shutil.rmtree(scratch)
        raise
    try:
        return scratch.rename(folder)
    except OSError:
        return folder if folder.is_dir() else scratch


def candidate_names(config: Any) -> Iterator[str]:
    """Every parameter name that a supported decoder with transformers' `config` may have."""
    yield from ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    for parts in fused_linears(config).values():
        for part in parts:
            yield from (f"{part}.weight", f"{part}.bias")
    for layer in range(config.num_hidden_layers):
        for norm in NORMS:
            yield f"model.layers.{layer}.{norm}.weight"


NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "self_attn.q_norm",
    "self_attn.k_norm",
)
