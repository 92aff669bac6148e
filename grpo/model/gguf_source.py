"""A checkpoint in one GGUF file: its tensors under transformers' names, its configuration and tokenizer."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo.errors import UserError
from grpo.model import gguf_gemma4
from grpo.model.architectures import check_supported
from grpo.model.checks import check_sizes, one_line
from grpo.model.decoder_config import DecoderConfig
from grpo.model.gguf_config import ROTARY_TENSORS, complete_config
from grpo.model.gguf_header import read_header
from grpo.model.gguf_states import from_gguf, named_for_gguf, shape_from_gguf
from grpo.model.layout import HEAD
from grpo.model.meta_graph import graph_tensors
from grpo.model.vision import Vision


class GGUFSource:
    """A GGUF file: metadata and tokenizer through transformers, tensors dequantised one by one through `gguf`."""

    def __init__(self, path: Path, config: DecoderConfig | None = None):
        """config: the model's, where it is known better than from the file (and of families that transformers does
        not read from GGUF)."""
        from transformers import AutoConfig

        from grpo.model.gguf_reader import PlainReader

        self.path = path
        self.notices: list[str] = []
        self.vision: Vision | None = None
        self.tower: dict[str, str] = {}
        read_header(path)
        try:
            self.reader = PlainReader(path)
            known = AutoConfig.from_pretrained(metadata_folder(path, self.reader)) if config is None else config
            self.config: DecoderConfig = known
        except UserError:
            raise
        except Exception as error:  # both readers trust what the file says
            raise UserError(f"{path}: not a readable GGUF file ({one_line(error)}); download it again") from None
        check_sizes(self.config.get_text_config().to_dict(), path)
        self._tensors = self._name_tensors()
        self.names = set(self._tensors)
        if config is None and self._architecture != gguf_gemma4.ARCHITECTURE:
            complete_config(self.config.get_text_config(), self.reader, str(path))
        if config is None:
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
        named = {}
        for candidate in candidate_names(text_config):
            stored = names.get_name(named_for_gguf(candidate), try_suffixes=(".weight", ".bias"))
            if stored in tensors:
                named[candidate] = tensors.pop(stored)
        # What has no name in transformers keeps its own, but for rotary factors: these are in the configuration.
        return named | {name: tensor for name, tensor in tensors.items() if name not in ROTARY_TENSORS}

    @property
    def stored_as(self) -> str:
        kinds = [tensor.tensor_type.name for name, tensor in self._tensors.items() if "proj" in name]
        common = max(set(kinds), key=kinds.count)
        return {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(common, common)

    def shape(self, name: str) -> tuple[int, ...]:
        from gguf.quants import dequantize

        stored = self._tensors[name]
        try:
            dequantize(stored.data[:1], stored.tensor_type)
        except NotImplementedError:
            raise UserError(
                f"{self.path}: {name} is kept as {stored.tensor_type.name}, which the gguf package does not read; "
                "convert the model to another type"
            ) from None
        return shape_from_gguf(name, tuple(int(size) for size in reversed(stored.shape)))

    def read(self, name: str) -> Tensor:
        from gguf.quants import dequantize

        stored = self._tensors[name]
        weight = torch.from_numpy(dequantize(stored.data, stored.tensor_type).copy()).float()
        return self._undo_conversion(name, weight)

    def _undo_conversion(self, name: str, weight: Tensor) -> Tensor:
        """llama.cpp interleaves the rotary halves of Llama's q and k; the rest is in gguf_states.py."""
        text_config = self.config.get_text_config()
        if self._architecture == "llama" and name.endswith(
            ("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias")
        ):
            heads = text_config.num_attention_heads if ".q_proj." in name else text_config.num_key_value_heads
            halves = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
            return halves.transpose(1, 2).reshape(weight.shape).contiguous()
        return from_gguf(name, weight, text_config)

    def stored_name(self, name: str) -> str:
        """What the checkpoint calls it."""
        return name

    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(metadata_folder(self.path, self.reader))


def metadata_folder(path: Path, reader: Any = None) -> Path:
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
        from grpo.model.gguf_reader import PlainReader

        reader = PlainReader(path) if reader is None else reader
        architecture = reader.get_field("general.architecture")
        if architecture is not None and architecture.contents() == gguf_gemma4.ARCHITECTURE:
            config: Any = gguf_gemma4.gemma4_config(reader, str(path))
            tokenizers: Any = transformers.PreTrainedTokenizerFast  # AutoTokenizer reads transformers' configuration
        else:
            config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
            tokenizers = transformers.AutoTokenizer
        config.save_pretrained(scratch)
        tokenizers.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(scratch)
    except BaseException:
        shutil.rmtree(scratch)
        raise
    try:
        return scratch.rename(folder)
    except OSError:
        return folder if folder.is_dir() else scratch


def candidate_names(config: DecoderConfig) -> Iterator[str]:
    """Every parameter name that a supported decoder with transformers' `config` may have."""
    tensors = graph_tensors(config)
    yield from (*tensors.plain, HEAD)
    for part in tensors.linears:
        yield from (f"{part}.weight", f"{part}.bias")
