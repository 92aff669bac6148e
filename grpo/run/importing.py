"""Importing large packages without what takes much of it and is not needed: Python's search for garbage, which finds
hardly any, and packages that others import merely because they are installed."""

from __future__ import annotations

import atexit
import gc
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

UNUSED = ("bitsandbytes", "sklearn")
"""peft imports the first for layers of its own, and with it torch's compiler; transformers the second for assisted
generation. Neither is used here; whoever imports one of them has it."""


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


ASKED_LATER = ("is_bnb_available", "is_bnb_4bit_available")
"""What peft asks when it puts an adapter on a layer, and not when it is imported. It remembers the answer."""


def remember_answers() -> None:
    """Have peft ask now."""
    for name in ASKED_LATER:
        ask = getattr(sys.modules.get("peft.import_utils"), name, None)
        if ask is not None:
            ask()


@contextmanager
def lean() -> Iterator[None]:
    """Around a command's imports: `uncollected`, and for whoever asks for UNUSED they are not installed.

    For a process that is ours alone: peft and transformers remember the answer.
    """
    find, unused = importlib.util.find_spec, [name for name in UNUSED if name not in sys.modules]

    def find_spec(name: str, package: str | None = None) -> Any:
        return None if name in unused else find(name, package)

    sys.modules |= dict.fromkeys(unused)  # type: ignore[arg-type]  # None: importing it raises ImportError
    try:
        with uncollected(), patch.object(importlib.util, "find_spec", find_spec):
            yield
            remember_answers()
    finally:
        for name in unused:
            if sys.modules.get(name) is None:
                sys.modules.pop(name, None)
        unused.clear()  # whoever imported `find_spec` by its name keeps this one
