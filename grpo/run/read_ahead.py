"""Asking the system for a checkpoint's files while packages are still being imported: reading them from a disk takes as
long. What is in memory already costs nothing. Nothing here imports torch, or waits.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from grpo.config.schema import Model
from grpo.memory.shapes import cached_config
from grpo.model.locate import local_path
from grpo.run.room import free_memory

WEIGHTS = (".safetensors", ".gguf")
SHARE = 0.5
"""Of the memory that is free, in which the files must have room."""


def read_ahead(model: Model) -> threading.Thread | None:
    """Begin to read the weights of `model`; None where its files are not on this machine, or memory has no room."""
    files = weight_files(model)
    if not files or sum(file.stat().st_size for file in files) > SHARE * free_memory():
        return None
    thread = threading.Thread(target=ask_for, args=(files,), daemon=True, name="read-ahead")
    thread.start()
    return thread


def weight_files(model: Model) -> list[Path]:
    """The files of `model` with weights, as far as they are on this machine; the network is not asked."""
    path = local_path(model.name)
    if path is None and (config := cached_config(model.name, model.revision)) is not None:
        path = config.parent
    if path is None:
        return []
    found = [path] if path.is_file() else sorted(path.iterdir()) if path.is_dir() else []
    return [file for file in found if file.suffix in WEIGHTS and file.is_file()]


def ask_for(files: list[Path]) -> None:
    """Have the system read `files`."""
    for file in files:
        try:
            descriptor = os.open(file, os.O_RDONLY)
        except OSError:
            continue
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
        except OSError:
            pass  # a file system that takes no advice
        finally:
            os.close(descriptor)
