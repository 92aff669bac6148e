"""What a table of broken inputs is made of: its rows, and ways to break files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

Tables = dict[str, Any]


class Case(NamedTuple):
    """A row: how to break a working set-up, and what the sentence has to say.

    `prepare` is given the folder of the case, in which "model" is a good model and "scores.py" has good rewards, and
    returns sections to change in the configuration.
    """

    name: str
    prepare: Callable[[Path], Tables | None]
    said: tuple[str, ...]


CASES: list[Case] = []


def case(*said: str) -> Callable[[Callable[[Path], Tables | None]], Callable[[Path], Tables | None]]:
    """Add the decorated function to the table."""

    def add(prepare: Callable[[Path], Tables | None]) -> Callable[[Path], Tables | None]:
        CASES.append(Case(prepare.__name__, prepare, said))
        return prepare

    return add


# Breaking things. Files are hard links to the good ones, so that they are replaced and never written to.


def put(file: Path, content: str | bytes) -> None:
    file.unlink(missing_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)


def edit_json(file: Path, **changes: Any) -> None:
    values = {**json.loads(file.read_text()), **changes}
    put(file, json.dumps({key: value for key, value in values.items() if value != ABSENT}))


ABSENT = "(absent)"


def edit_weights(home: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors of the model (None: remove), their names written with "__" for "."."""
    file = home / "model" / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})


def cut(file: Path, share: float) -> None:
    content = file.read_bytes()
    put(file, content[: int(len(content) * share)])


class Trap:
    """Unpickling it leaves a mark."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)
