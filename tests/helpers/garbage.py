"""Python's search for garbage in the tests' process, which closes hundreds of engines and sessions, each with a search.

With torch, transformers and vLLM loaded a search takes a good part of a second and finds little, so what is there
between two test files is left out of all that follow. vLLM freezes and unfreezes everything, which would undo that:
here it does neither, so what a test makes is always found. A test of what is held uses `as_in_a_run`.
"""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager

FREEZE, UNFREEZE = gc.freeze, gc.unfreeze

atexit.register(UNFREEZE)  # extension modules report what the last search does not find as leaks


def keep_modules() -> None:
    """Leave all that is there now, and no garbage, out of every search from now on."""
    gc.collect()
    FREEZE()
    gc.freeze = gc.unfreeze = lambda: None  # type: ignore[assignment]


@contextmanager
def as_in_a_run() -> Iterator[None]:
    """Within it freezing is Python's own again."""
    gc.freeze, gc.unfreeze = FREEZE, UNFREEZE
    try:
        yield
    finally:
        UNFREEZE()
        keep_modules()
