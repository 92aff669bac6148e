"""Arguments of a policy's methods that are no configuration: what is refused before anything is started, and how."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from grpo.errors import UserError

EXPORT_OPTIONS = ("to", "base", "gguf_type", "llama_quantize", "system", "check", "notice")
EXPORT_NAMES = {
    "save_method": 'write to="merged-16bit" or "merged-4bit"',
    "quantization_method": 'write to="gguf", gguf_type="q8_0", or "q4_k_m"',
    "tokenizer": "the tokenizer is written with the model; leave it out",
    "maximum_memory_usage": "one weight is in memory at a time; leave it out",
    "safe_serialization": "the files are safetensors; leave it out",
    "max_shard_size": "shards have at most 2 GB; leave it out",
    **dict.fromkeys(("push_to_hub", "token", "private"), "upload the folder afterwards; leave it out"),
}
"""Arguments of other libraries for the same, with what to write instead."""


def as_folder(folder: Any, call: str) -> Path:
    """A folder that is written or read. Raises UserError for what is no path, and for a file."""
    if not isinstance(folder, str | Path) or not str(folder):
        raise UserError(f"{call}: the folder is {folder!r}; pass a path, as {call}('adapters/mine')")
    path = Path(folder).expanduser()
    if path.is_file():
        raise UserError(f"{call}: {path} is a file; name a folder")
    return path


def check_export(to: Any, options: Mapping[str, Any], signature: inspect.Signature) -> None:
    """Raise UserError for an export that is not written as `save_merged` takes it, with how it is."""
    if not isinstance(to, str):
        raise UserError(
            f"policy.save_merged: the second argument is the form, such as 'merged-16bit' or 'gguf', and no "
            f"{type(to).__name__}; the tokenizer is written with the model"
        )
    for name in options:
        if name not in signature.parameters or name in ("source", "out", "checkpoint"):
            hint = EXPORT_NAMES.get(name) or f"there are {', '.join(EXPORT_OPTIONS)}"
            raise UserError(f"policy.save_merged: there is no argument {name!r}; {hint}")


def check_sampling(temperature: float, max_tokens: int, top_p: float, n: int, seed: int | None) -> None:
    """Raise UserError naming the argument of `generate` that is of another kind or out of range."""
    kinds = {
        "temperature": (temperature, Real, "a number"),
        "top_p": (top_p, Real, "a number"),
        "max_tokens": (max_tokens, Integral, "a whole number"),
        "n": (n, Integral, "a whole number"),
        "seed": (0 if seed is None else seed, Integral, "a whole number"),
    }
    for name, (value, kind, expected) in kinds.items():
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(f"{name} = {value!r}: must be {expected}")
    ranges = {
        "temperature": (temperature, 0 <= temperature <= 2, "from 0 to 2"),
        "max_tokens": (max_tokens, max_tokens >= 1, "at least 1"),
        "top_p": (top_p, 0 < top_p <= 1, "above 0 and at most 1"),
        "n": (n, n >= 1, "at least 1"),
    }
    for name, (value, right, expected) in ranges.items():
        if not right:
            raise UserError(f"{name} = {value}: must be {expected}")
    if n > 1 and temperature == 0:
        raise UserError(f"n = {n} completions are all the same at temperature 0; set a temperature such as 1.0")
