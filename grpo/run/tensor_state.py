"""Nested state (dicts, lists, tensors, plain values) as a file or as a message to another process, free of pickle.

The structure is JSON, the tensors are safetensors: reading either back runs no code. For what a checkpoint holds
see grpo/training/trainer.py, and for who sends what to whom grpo/distributed/ranks.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from grpo.errors import UserError

if TYPE_CHECKING:
    import torch

LENGTH_BYTES = 8
"""Of the number, little endian, that a message begins with: how long its JSON is."""


def save_tensors(path: Path, state: Any) -> None:
    """Write nested dicts, lists and tuples of tensors, numbers, strings, booleans and None to one safetensors file.

    The structure goes into the file's metadata as JSON. Tensors of any dtype and device keep their bits; keys are
    strings or integers. Raises TypeError for anything else.
    """
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    structure = _encoded(state, tensors)
    save_file(tensors, str(path), metadata={"structure": json.dumps(structure)})


def load_tensors(path: Path) -> Any:
    """The state that `save_tensors` wrote to `path`, with its tensors on the CPU. Raises UserError for another file."""
    from safetensors import safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            structure = json.loads((file.metadata() or {})["structure"])
            return _decoded(structure, file.get_tensor)
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a saved state ({error}); take an earlier checkpoint") from None


def packed(state: Any) -> bytes:
    """`state`, of what `save_tensors` takes, as a message: the length of its JSON, that, and its tensors."""
    from safetensors.torch import save

    tensors: dict[str, torch.Tensor] = {}
    structure = json.dumps(_encoded(state, tensors)).encode()
    return len(structure).to_bytes(LENGTH_BYTES, "little") + structure + save(tensors)


def unpacked(message: bytes) -> Any:
    """The state in a message of `packed`."""
    from safetensors.torch import load

    end = LENGTH_BYTES + int.from_bytes(message[:LENGTH_BYTES], "little")
    return _decoded(json.loads(message[LENGTH_BYTES:end]), load(message[end:]).__getitem__)


def _encoded(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    import torch

    match value:
        case torch.Tensor():
            # A copy: safetensors refuses tensors that share storage.
            tensors[str(len(tensors))] = value.detach().to("cpu", copy=True).contiguous()
            return {"tensor": str(len(tensors) - 1)}
        case None | bool() | int() | float() | str():
            return value
        case dict() if all(type(key) in (str, int) for key in value):
            return {"dict": [[key, _encoded(entry, tensors)] for key, entry in value.items()]}
        case list() | tuple():
            return {type(value).__name__: [_encoded(entry, tensors) for entry in value]}
    raise TypeError(f"a checkpoint has no form for {type(value).__name__} {value!r:.60}")


def _decoded(value: Any, tensor: Callable[[str], torch.Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, inside),) = value.items()
    match kind:
        case "tensor":
            return tensor(inside)
        case "dict":
            return {key: _decoded(entry, tensor) for key, entry in inside}
        case "tuple":
            return tuple(_decoded(entry, tensor) for entry in inside)
        case "list":
            return [_decoded(entry, tensor) for entry in inside]
    raise ValueError(f"unknown kind {kind!r}")
