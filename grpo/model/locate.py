"""Which file or folder `model.name` means on this machine, without touching the network or loading a library."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from grpo.errors import UserError

BASE_SAMPLE = "base_sample.json"
"""The file beside an adapter, and in a run folder, by which it knows its base (`fingerprint.py`)."""

INITIAL_ADAPTER = "initial_adapter.safetensors"
"""The file beside an adapter, and in a run folder, with what it started from in its base (`initial_adapter.py`)."""


def local_path(name: str) -> Path | None:
    """The file or folder called `name`; None for a hub id. Raises UserError for a path that does not exist."""
    if name.startswith("package:"):
        package, _, inside = name.removeprefix("package:").partition("/")
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise UserError(f"model.name = {name!r}: the Python package {package!r} is not installed; pip install it")
        path = Path(spec.submodule_search_locations[0]) / inside
        if not path.exists():
            raise UserError(f"model.name = {name!r}: the package has no file {inside!r}; look in {path.parent}")
        return path
    path = Path(name).expanduser()
    if path.exists():
        return path
    if path.suffix == ".gguf" or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"model.name = {name!r}: no such file or folder; pass a model folder, a .gguf file or a hub id")
    return None


def recorded_name(name: str) -> str:
    """`name` as it is to be recorded: a local path as an absolute one, "package:..." and a hub id as they are."""
    if name.startswith("package:"):
        return name
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() else name
