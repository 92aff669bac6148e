"""Functions by value, for other processes, with the names of the files that they come from.

cloudpickle from 3.1.3 on forgets those names, and an error in somebody's function would no longer say where it is.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from types import CodeType
from typing import Any

import cloudpickle  # type: ignore[import-untyped]


class Pickler(cloudpickle.CloudPickler):
    """cloudpickle's, for code that keeps its file's name."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, CodeType):
            make, parts = cloudpickle.CloudPickler.dispatch_table[CodeType](obj)
            return named_code, (make, parts, obj.co_filename)
        return super().reducer_override(obj)


def named_code(make: Callable[..., CodeType], parts: tuple[Any, ...], filename: str) -> CodeType:
    """The code object that `make` gives of `parts`, from the file `filename`."""
    return make(*parts).replace(co_filename=filename)


def dumps(content: Any) -> bytes:
    """`content` pickled, functions that cannot be imported by value; `pickle.loads` reads it."""
    with io.BytesIO() as file:
        Pickler(file).dump(content)
        return file.getvalue()
