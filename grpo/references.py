"""From a reference in a configuration to a Python object: a built-in name, `package.module:function`,
`package.module.function` or `path/file.py:function`.

Loading runs the user's module. That happens in a reward's own process, so the trainer never imports it; and it puts
the file's folder and the working folder on `sys.path`, as running the file would.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from grpo.errors import UserError


def resolve(reference: str, kind: str, builtin: Mapping[str, str]) -> Any:
    """The object that `reference` names.

    Args:
        kind: what it is called in errors.
        builtin: bare names, each with the reference it stands for (or another name).

    Raises UserError naming what is missing: the built-in (with the nearest), the file, the module or the function;
    and, where the user's module fails to load, its file and line.
    """
    while reference in builtin:
        reference = builtin[reference]
    where, colon, name = reference.rpartition(":")
    if where.endswith(".py") and name:
        return _attribute(_load_file(Path(where), kind, reference), name, kind, reference)
    if reference.rstrip(":").endswith(".py"):
        raise UserError(f"{kind} {reference!r} does not say which function; write {reference.rstrip(':')}:FUNCTION")
    if not colon:
        where, dot, name = reference.rpartition(".")
        if not dot:
            near = difflib.get_close_matches(reference, builtin, n=1, cutoff=0.5)
            hint = f" did you mean {near[0]!r}?" if near else f" built in are {', '.join(builtin)};" if builtin else ""
            raise UserError(
                f"there is no {'built-in ' if builtin else ''}{kind} {reference!r};{hint} your own is "
                "package.module:function or path/file.py:function"
            )
    return _attribute(_load_module(where, kind, reference), name, kind, reference)


def location(error: BaseException, prefer: str | None = None) -> str:
    """Where `error` was raised, as "file.py:12": its last frame in the file `prefer`, or else outside this project."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = [(frame.f_code.co_filename, line, frame) for frame, line in traceback.walk_tb(error.__traceback__)]
    for wanted in (
        [entry for entry in frames if entry[0] == prefer],
        [entry for entry in frames if not entry[0].startswith("<frozen") and not is_ours(entry[2])],
        frames,
    ):
        if wanted:
            return f"{wanted[-1][0]}:{wanted[-1][1]}"
    return "an unknown place"


def is_ours(frame: FrameType) -> bool:
    """Whether a frame runs code of this project."""
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] == "grpo"


def described(error: BaseException) -> str:
    """`error` as "ValueError: its first line", cut to a readable length."""
    text = str(error).strip().partition("\n")[0]
    text = text if len(text) <= 300 else text[:300] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _load_file(path: Path, kind: str, reference: str) -> ModuleType:
    path = path.expanduser().absolute()
    if not path.is_file():
        raise UserError(f"{kind} {reference!r}: there is no file {path}; the path is relative to the working folder")
    _on_path(str(path.parent), first=True)
    name = _importable_name(path) or f"{kind}_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "a .py file always has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise _load_error(error, kind, reference, str(path)) from error
    return module


def _importable_name(path: Path) -> str | None:
    """A name by which `import` finds the file `path`, also in processes that the file's functions start.

    Such a process gets this one's `sys.path`, and imports the module of a function that it is sent. The file's own name
    will do unless another module is called so; else the name of its folder, which becomes a package, is put before it.
    """
    importlib.invalidate_caches()
    if _finds(path.stem, path):
        return path.stem
    outer, name = str(path.parent.parent), f"{path.parent.name}.{path.stem}"
    added = outer not in sys.path
    _on_path(outer, first=False)
    if _finds(name, path):
        return name
    if added:
        sys.path.remove(outer)
    return None


def _finds(name: str, path: Path) -> bool:
    """Whether `import name` would load the file `path`, and nothing else than a folder above it."""
    above, _, last = name.rpartition(".")
    try:
        if above and getattr(importlib.util.find_spec(above), "origin", "") is not None:
            return False
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return False
    origin = spec.origin if spec else None
    return last == path.stem and origin is not None and os.path.exists(origin) and os.path.samefile(origin, path)


def _load_module(name: str, kind: str, reference: str) -> ModuleType:
    _on_path(str(Path.cwd()), first=False)
    try:
        return importlib.import_module(name)
    except UserError:
        raise
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            raise UserError(
                f"{kind} {reference!r}: there is no module {error.name!r}; install it, start from its folder, or "
                "write path/file.py:function"
            ) from None
        raise _load_error(error, kind, reference) from error
    except (Exception, SystemExit) as error:
        raise _load_error(error, kind, reference) from error


def _load_error(error: BaseException, kind: str, reference: str, file: str | None = None) -> UserError:
    return UserError(f"{kind} {reference!r} failed to load at {location(error, file)}: {described(error)}; mend it")


def _attribute(module: ModuleType, name: str, kind: str, reference: str) -> Any:
    value: Any = module
    for part in name.split("."):
        if not hasattr(value, part):
            known = [entry for entry in dir(value) if not entry.startswith("_") and callable(getattr(value, entry))]
            near = difflib.get_close_matches(part, known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else "; define it there"
            raise UserError(f"{kind} {reference!r}: {getattr(module, '__file__', module)} has no {part!r}{hint}")
        value = getattr(value, part)
    return value


def _on_path(folder: str, first: bool) -> None:
    if folder not in sys.path:
        sys.path.insert(0 if first else len(sys.path), folder)
