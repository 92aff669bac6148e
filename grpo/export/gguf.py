"""A merged model as a GGUF file, for llama.cpp, Ollama and whatever else reads it; beside it, a Modelfile for Ollama.

Tensors are stored as llama.cpp wants them: under its names, Llama's query and key rows with the two halves of a rotary
pair side by side, Gemma's norms plus one. They are written one at a time. f16, bf16 and q8_0 are made by the gguf
package; 4 bit is made by llama.cpp's own quantiser, as a program or in the package cyllama, which is looked for and
not brought along.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from grpo.errors import UserError
from grpo.export.gguf_metadata import ARCHITECTURE, add_from_config, add_from_gguf, add_tokenizer
from grpo.export.merge import MergedSource
from grpo.export.modelfile import Chat, modelfile
from grpo.model.architectures import causal_class
from grpo.model.gguf_source import GGUFSource
from grpo.model.gguf_states import CONVOLUTIONS, named_for_gguf, shape_in_gguf, to_gguf

FILE_TYPES = {"f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
Q8_BLOCK = 32
PACKAGE = "cyllama"
"""A package with llama.cpp's quantiser in it."""
BY_PACKAGE = f"""
import sys
from cyllama.llama.llama_cpp import LlamaModelQuantizeParams, model_quantize
params = LlamaModelQuantizeParams()
params.ftype = {gguf.LlamaFileType.MOSTLY_Q4_K_M.value}
model_quantize(sys.argv[1], sys.argv[2], params)
"""
"""The program `llama-quantize SOURCE TARGET Q4_K_M`, by that package."""
HOW_TO_GET_IT = (
    'q4_k_m needs llama.cpp\'s quantiser: pip install "cyllama>=0.2.18,<0.3"; or install llama.cpp (brew install '
    "llama.cpp; conda install -c conda-forge llama.cpp; or build its target llama-quantize) and name the program with "
    "--llama-quantize, or LLAMA_QUANTIZE, or have it on the PATH; f16, bf16 and q8_0 need nothing"
)


def find_quantizer(named: str | Path | None) -> list[str]:
    """The command line of llama.cpp's quantiser: `named`, else LLAMA_QUANTIZE, else llama-quantize on the PATH, else
    the package's. Raises UserError."""
    named = named or os.environ.get("LLAMA_QUANTIZE")
    program = shutil.which(Path(named).expanduser() if named else "llama-quantize")
    if program is not None:
        return [str(program)]
    if named:
        raise UserError(f"{named}: no such program; {HOW_TO_GET_IT}")
    if find_spec(PACKAGE) is None:
        raise UserError(HOW_TO_GET_IT)
    return [sys.executable, "-P", "-c", BY_PACKAGE]


def write_gguf(
    source: MergedSource,
    folder: Path,
    kind: str,
    chat: Chat,
    quantizer: Sequence[str] | None,
    notice: Callable[[str], None],
) -> Path:
    """Write `source` to `folder` as a GGUF file of type `kind` (f16, bf16, q8_0, q4_k_m) with a Modelfile; the file.

    `quantizer` makes q4_k_m. Raises UserError for what llama.cpp cannot compute or split into tokens.
    """
    file = folder / f"{chat.name}-{kind}.gguf"
    if kind == "q4_k_m":
        assert quantizer is not None
        between = folder / "between.gguf"
        write_file(source, between, "f16", chat, notice)
        run_quantizer(quantizer, between, file)
        between.unlink()
    else:
        write_file(source, file, kind, chat, notice)
    (folder / "Modelfile").write_text(modelfile(file.name, chat, notice), encoding="utf-8")
    return file


def write_file(source: MergedSource, file: Path, kind: str, chat: Chat, notice: Callable[[str], None]) -> None:
    """Metadata, then every tensor."""
    config = source.config.get_text_config()
    writer = gguf.GGUFWriter(file, ARCHITECTURE[config.model_type])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(chat.name)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[kind]])
    if kind == "q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if chat.template is not None:
        writer.add_chat_template(chat.template)
    if isinstance(source.base, GGUFSource):
        add_from_gguf(writer, source.base.reader)
        extra = unnamed_tensors(source.base)
    else:
        extra = add_from_config(writer, config, notice)
        add_tokenizer(writer, source.tokenizer(), config)
    tensors = list(planned(source, kind))
    for name, tensor in extra.items():
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), tensor.nbytes)
    for _, stored, shape, gguf_type in tensors:
        add_info(writer, stored, shape, gguf_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in extra.values():
        writer.write_tensor_data(tensor.numpy())
    for name, stored, _, gguf_type in tensors:
        writer.write_tensor_data(encoded(as_stored(source, name), gguf_type, stored))
    writer.close()


def unnamed_tensors(base: GGUFSource) -> dict[str, Tensor]:
    """Tensors of a GGUF base that are no weights of transformers' model: rotary frequencies."""
    return {
        tensor.name: torch.tensor(tensor.data.tolist(), dtype=torch.float32)
        for tensor in base.reader.tensors
        if tensor.name.startswith("rope_")
    }


def planned(source: MergedSource, kind: str) -> Iterator[tuple[str, str, tuple[int, ...], str]]:
    """(transformers' name, llama.cpp's name, shape, GGUF type) of every tensor, in the order of the model."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    config = source.config.get_text_config()
    by_name = {name: architecture for architecture, name in MODEL_ARCH_NAMES.items()}
    names = get_tensor_name_map(by_name[ARCHITECTURE[config.model_type]], config.num_hidden_layers)
    for name in sorted(source.names, key=in_model_order):
        stored = names.get_name(named_for_gguf(name), try_suffixes=(".weight", ".bias"))
        if stored is None:
            raise UserError(f"{source.path}: llama.cpp's {causal_class(config.model_type)} has no tensor {name}")
        shape = shape_in_gguf(name, source.shape(name))
        yield name, stored, shape, "f32" if name.endswith(CONVOLUTIONS) else form_of(shape, kind)


def in_model_order(name: str) -> tuple[int, str]:
    """Sorts embedding, layers by number, then the rest."""
    pieces = name.split(".")
    number = next((int(piece) for piece in pieces if piece.isdecimal()), None)
    return (-1 if "embed" in name else 10**6) if number is None else number, name


def form_of(shape: tuple[int, ...], kind: str) -> str:
    """Vectors stay in float32, as llama.cpp needs them; a row that is no whole number of blocks stays in float16."""
    if len(shape) == 1:
        return "f32"
    return "f16" if kind == "q8_0" and shape[-1] % Q8_BLOCK else kind


def add_info(writer: Any, name: str, shape: tuple[int, ...], gguf_type: str) -> None:
    """Announce a tensor whose data come later."""
    kind = gguf.GGMLQuantizationType[gguf_type.upper()]
    if gguf_type in ("f16", "f32"):
        dtype = np.dtype(np.float16 if gguf_type == "f16" else np.float32)
        writer.add_tensor_info(name, shape, dtype, int(np.prod(shape)) * dtype.itemsize)
        return
    stored = gguf.quant_shape_to_byte_shape(shape, kind)
    writer.add_tensor_info(name, stored, np.dtype(np.uint8), int(np.prod(stored)), raw_dtype=kind)


def encoded(weight: Tensor, gguf_type: str, name: str) -> np.ndarray:
    """`weight` float32 as the bytes or numbers of `gguf_type`. Raises UserError for a value beyond float16."""
    numbers = weight.contiguous().numpy()
    if gguf_type == "f32":
        return numbers
    if gguf_type == "f16":
        with np.errstate(over="ignore"):
            halves = numbers.astype(np.float16)
        if not np.isfinite(halves).all():
            raise UserError(f"{name} has values that float16 cannot hold; take --gguf-type bf16")
        return halves
    return gguf.quants.quantize(numbers, gguf.GGMLQuantizationType[gguf_type.upper()])


def as_stored(source: MergedSource, name: str) -> Tensor:
    """The tensor `name` float32, as llama.cpp computes with it."""
    weight = source.read(name).float()
    config = source.config.get_text_config()
    architecture = ARCHITECTURE[config.model_type]
    module = name.rpartition(".")[0]
    if architecture == "llama" and module.endswith(("q_proj", "k_proj")):
        heads = config.num_attention_heads if module.endswith("q_proj") else config.num_key_value_heads
        return neighbours(weight, heads)
    return to_gguf(name, weight, config)


def neighbours(weight: Tensor, heads: int) -> Tensor:
    """Rows [heads x dim, ...] so that the two of a rotary pair, dim / 2 apart in transformers, follow each other."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)


def run_quantizer(program: Sequence[str], source: Path, target: Path) -> None:
    """Have llama.cpp make Q4_K_M of `source`. Raises UserError with its last words where it fails."""
    command = [*program, str(source), str(target), "Q4_K_M"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode != 0 or not target.is_file():
        said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        name = program[0] if len(program) == 1 else PACKAGE
        raise UserError(f"{name} failed ({said[-1].strip() if said else f'exit code {done.returncode}'})")
