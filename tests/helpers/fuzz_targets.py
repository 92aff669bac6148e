"""What reads bytes that nobody vouches for, as functions of bytes: each returns, or it has found a defect.

A reader may refuse with a UserError, which is one line always; any other exception is a defect.
Used by the property tests, and by `benchmarks/fuzz_parsers.py` with a fuzzer that is guided by coverage.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grpo.errors import UserError

Target = Callable[[bytes, Path], Any]
TARGETS: dict[str, Target] = {}


def target(read: Target) -> Target:
    """Add a reader to the table; it is given the bytes and an empty folder."""
    TARGETS[read.__name__] = read
    return read


def scratch() -> Path:
    """A new folder, in memory where that can be had."""
    return Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))


def feed(name: str, data: bytes) -> None:
    """Give `data` to the reader `name`. Raises what is a defect."""
    folder = scratch()
    try:
        TARGETS[name](data, folder)
    except UserError:
        pass
    finally:
        shutil.rmtree(folder)


def written(folder: Path, name: str, data: bytes) -> Path:
    file = folder / name
    file.write_bytes(data)
    return file


@target
def configuration(data: bytes, folder: Path) -> None:
    from grpo.config.schema import read_config

    read_config(written(folder, "config.toml", data))


@target
def override(data: bytes, folder: Path) -> None:
    from grpo.config.schema import parse_config
    from grpo.config.toml import apply_override

    values: dict[str, Any] = {"model": {"name": "m"}, "task": {"name": "t"}, "rewards": [{"function": "f"}]}
    text = data.decode(errors="replace")
    apply_override(values, text)
    parse_config(values, overrides=[text])


@target
def gguf_header(data: bytes, folder: Path) -> None:
    from grpo.model.gguf_header import read_header

    read_header(written(folder, "model.gguf", data))


@target
def gguf_after_the_magic(data: bytes, folder: Path) -> None:
    gguf_header(b"GGUF" + struct.pack("<I", 3) + data, folder)


@target
def weights(data: bytes, folder: Path) -> None:
    from grpo.model.safetensors_source import SafetensorsSource

    SafetensorsSource._handle_names(written(folder, "model.safetensors", data))


@target
def weights_header(data: bytes, folder: Path) -> None:
    weights(struct.pack("<Q", len(data)) + data + bytes(64), folder)


@target
def shard_index(data: bytes, folder: Path) -> None:
    from grpo.model.safetensors_source import read_index

    read_index(written(folder, "model.safetensors.index.json", data))


@target
def model_configuration(data: bytes, folder: Path) -> None:
    from grpo.model.checks import check_sizes, read_object
    from grpo.model.quantization import check_quantization

    file = written(folder, "config.json", data)
    values = read_object(file)
    check_sizes(values, file)
    check_quantization(values, file)


@target
def generation_configuration(data: bytes, folder: Path) -> None:
    from grpo.model.checks import end_tokens

    end_tokens(written(folder, "generation_config.json", data), 100)


@target
def adapter_configuration(data: bytes, folder: Path) -> None:
    from grpo.config.schema import Lora
    from grpo.model.adapter_config import check_same_shape, read_adapter_config

    saved = read_adapter_config(written(folder, "adapter_config.json", data).parent)
    check_same_shape(saved, Lora(r=4, lora_alpha=8, target_modules=["q_proj"]), lambda lora: lora.target_modules)


@target
def saved_state(data: bytes, folder: Path) -> None:
    from grpo.run.tensor_state import load_tensors

    load_tensors(written(folder, "trainer.safetensors", data))


@target
def state_structure(data: bytes, folder: Path) -> None:
    text = json.dumps({"__metadata__": {"structure": data.decode(errors="replace")}}).encode()
    saved_state(struct.pack("<Q", len(text)) + text, folder)


@target
def manifest(data: bytes, folder: Path) -> None:
    from grpo.run.checkpoint import latest

    checkpoint = folder / "checkpoints" / "step-1"
    checkpoint.mkdir(parents=True)
    written(checkpoint, "manifest.json", data)
    latest(folder, lambda notice: None)


@target
def json_lines(data: bytes, folder: Path) -> None:
    from grpo.tasks.common import read_files

    read_files([written(folder, "rows.jsonl", data)], ["question"])


@target
def csv_rows(data: bytes, folder: Path) -> None:
    from grpo.tasks.common import read_files

    read_files([written(folder, "rows.csv", data)], ["question"])


@target
def recorded_metrics(data: bytes, folder: Path) -> None:
    from grpo.run.records import read_entries

    list(read_entries(written(folder, "metrics.jsonl", data)))


@target
def completion(data: bytes, folder: Path) -> None:
    from grpo.printable import printable
    from grpo.rewards.extract import extracted_answer
    from grpo.run.records import json_line

    text = data.decode(errors="surrogateescape")
    extracted_answer(text)
    assert "\x1b" not in printable(text) and "\x1b" not in json_line({"text": text})


@target
def dump_report(data: bytes, folder: Path) -> None:
    from grpo.replay import read_dump
    from grpo.run.tensor_state import save_tensors

    written(folder, "report.json", data)
    save_tensors(folder / "batch.safetensors", {"prompts": [], "idle": [], "rng": {}})
    read_dump(folder)
