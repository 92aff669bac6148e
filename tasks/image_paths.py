"""Paths of images in rows that were read: relative ones start at the folder of the data, and those of the hub are none.

Images are in the columns `image` and `images`, in another one that is named, and in parts of messages. They are not
read here: `grpo/data.py` does that for the rows that are used.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo.errors import UserError
from grpo.messages import COLUMNS, HELD, IMAGE_PARTS
from grpo.tasks.cells import reach, require_columns
from grpo.tasks.common import Row


def with_image_paths(row: Row, where: str, path: Path | None, column: str | None = None) -> Row:
    """The row with its images' paths from the folder of the data in `path`, a folder or a file.

    `column`: what is taken as the column "images". Raises UserError where the row lacks it, and for a path in data of
    the hub (`path` None), which would be a file of this machine.
    """
    found = dict(row)
    if column is not None:
        require_columns(row, [column], where)
        value = reach(row, column)
        found["images"] = list(value) if isinstance(value, list | tuple) else [value]
    folder = None if path is None else path if path.is_dir() else path.parent
    for name, value in found.items():
        if name in COLUMNS:
            found[name] = located(value, where, folder)
        elif isinstance(value, list) and any(isinstance(each, Mapping) for each in value):
            found[name] = [with_located_parts(each, where, folder) for each in value]
    return found


def with_located_parts(message: Any, where: str, folder: Path | None) -> Any:
    """A message with the paths in its image parts; whatever else it is, as it is."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, list):
        return message
    parts = [
        {key: located(value, where, folder) if key in HELD else value for key, value in part.items()}
        if isinstance(part, Mapping) and part.get("type") in IMAGE_PARTS
        else part
        for part in content
    ]
    return {**message, "content": parts}


def located(value: Any, where: str, folder: Path | None) -> Any:
    """An image, or a list of them, whose path starts at `folder`."""
    if isinstance(value, list | tuple):
        return [located(each, where, folder) for each in value]
    held = isinstance(value, Mapping) and value.get("bytes") is None
    name = value.get("path") if held else value
    if not isinstance(name, str) or name.startswith("data:") or "://" in name[:40]:
        return value
    if folder is None and held:  # in the cache of `datasets`
        return value
    if folder is None:
        raise UserError(f"{where}: its image is the path {name[:200]!r} and not the file; download the data set")
    return folder / Path(name).expanduser()
