"""The metadata of a GGUF file and the names of its tensors, read without numpy, so that a dry run answers at once.

Layout: `docs/gguf.md` of the ggml project, versions 2 and 3, little-endian. For weights see `source.py`.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

from grpo.errors import UserError

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""GGUF's value types as struct's."""
STRING, ARRAY = 8, 9


class _Reader:
    """A position in a file that moves as values are read."""

    def __init__(self, data: mmap.mmap):
        self.data, self.position = data, 0

    def take(self, kind: str) -> Any:
        (value,) = struct.unpack_from(f"<{kind}", self.data, self.position)
        self.position += struct.calcsize(f"<{kind}")
        return value

    def skip(self, count: int) -> None:
        self.position += count

    def string(self) -> str:
        length = self.take("Q")
        text = self.data[self.position : self.position + length].decode()
        self.skip(length)
        return text

    def value(self) -> Any:
        """A value with its type before it; of an array only the length."""
        kind = self.take("I")
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.take(SCALARS[kind])
        inner, count = self.take("I"), self.take("Q")
        if inner == STRING:
            for _ in range(count):
                self.skip(self.take("Q"))
        else:
            self.skip(count * struct.calcsize(f"<{SCALARS[inner]}"))
        return count


def read_header(path: Path) -> tuple[dict[str, Any], set[str]]:
    """(metadata, tensor names) of `path`; an array's value is its length. Raises UserError for another format."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            reader = _Reader(data)
            if data[:4] != b"GGUF":
                raise UserError(f"{path}: not a GGUF file; pass a .gguf file or a model folder")
            reader.skip(4)
            if (version := reader.take("I")) not in (2, 3):
                raise UserError(f"{path}: GGUF version {version} is not known; convert the model again")
            tensors, entries = reader.take("Q"), reader.take("Q")
            metadata = {reader.string(): reader.value() for _ in range(entries)}
            names = set()
            for _ in range(tensors):
                names.add(reader.string())
                reader.skip(8 * reader.take("I") + 12)
            if reader.position > len(data):
                raise ValueError("it ends within its header")
            return metadata, names
    except (OSError, ValueError, LookupError, OverflowError, struct.error) as error:
        raise UserError(f"{path}: not a readable GGUF file ({error}); download it again") from None
