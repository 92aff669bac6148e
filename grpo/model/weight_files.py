"""Which files of a model's folder hold its weights: the rules are transformers' own.

A file that the configuration names counts before all others, then `model.safetensors`, then the shards of
`model.safetensors.index.json`. Whatever else lies beside them is not read; other safetensors are named in a notice.
For what the files hold, see `safetensors_source.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from grpo.errors import UserError

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SUFFIXES = (".safetensors", ".safetensors.index.json")
PICKLED = ("*.bin", "*.pt", "*.pth")
ADAPTER_CONFIG = "adapter_config.json"


def weights_entry(folder: Path, named: str | None) -> Path:
    """The safetensors file, or index of shards, that holds the weights of the model in `folder`.

    named: `transformers_weights` of its configuration. Raises UserError where there is none that may be read, and where
    transformers would put an adapter on the model.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"{folder}: holds a model and, by {ADAPTER_CONFIG}, an adapter on it; move the adapter's files to a folder "
            "of their own"
        )
    if named is not None:
        return named_entry(folder, named)
    for name in (WHOLE, INDEX):
        if (folder / name).is_file():
            return folder / name
    if pickled := sorted(file for pattern in PICKLED for file in folder.glob(pattern)):
        raise UserError(
            f"{pickled[0]}: pickled weights can run code and are never loaded; convert the model to safetensors"
        )
    if others := sorted(folder.glob("*.safetensors")):
        raise UserError(
            f"{folder}: there is neither {WHOLE} nor {INDEX}, which alone are read, and {others[0].name} is neither; "
            "download the model again"
        )
    raise UserError(f"{folder}: no .safetensors file; pass a complete model folder")


def named_entry(folder: Path, named: Any) -> Path:
    """The file that `transformers_weights` names. Raises UserError for one that is not there, or not in `folder`."""
    if not isinstance(named, str) or not named.endswith(SUFFIXES) or Path(named).name != named:
        raise UserError(
            f"{folder / 'config.json'}: transformers_weights = {json.dumps(named)[:80]}: must be a safetensors file of "
            "the folder, or an index of some; correct it"
        )
    if not (folder / named).is_file():
        raise UserError(f"{folder}: {named}, which config.json names, is missing; download the model again")
    return folder / named


def unread_files(folder: Path, read: Iterable[Path]) -> list[str]:
    """A sentence about the safetensors in `folder` that are not among those `read`; empty where there are none."""
    read = sorted(read)
    others = sorted(set(folder.glob("*.safetensors")) - set(read))
    if not others or not read:
        return []
    more = f" and {len(others) - 1} more" if len(others) > 1 else ""
    also = f"not read: {others[0].name}{more}"
    return [f"{folder}: the weights are those of {read[0].name}, as for transformers; {also}"]


def stored_names(file: Path) -> list[str]:
    """The names in the header of the safetensors `file`. Raises ValueError for one that occurs twice."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = opened.read(size)
    return [name for name in json.loads(header, object_pairs_hook=unique) if name != "__metadata__"]


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of `pairs`, for json. Raises ValueError for a key that occurs twice."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"{key} occurs twice")
        result[key] = value
    return result
