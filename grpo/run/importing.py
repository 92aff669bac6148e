"""Importing large packages without Python's search for garbage, which takes a fifth of it and finds hardly any."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Around imports: nothing is searched for cycles, nor what is there at the end until Python ends: modules stay."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # extension modules report what the last search does not find as leaks
        if collects:
            gc.enable()
