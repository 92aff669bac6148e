"""GRPO on one GPU: vLLM samples and a PyTorch graph trains over one copy of a (4-bit) base model.

The folders `kernels/`, `rewards/` and `tasks/` beside this one are part of this package: `grpo.kernels`,
`grpo.rewards`, `grpo.tasks`. A wheel maps them below `grpo/`; from a checkout the line below makes them
importable. They have no `__init__.py`, so that `import kernels` still finds Hugging Face's package of that name.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo.version import __version__

if TYPE_CHECKING:
    from grpo.api.loaded_policy import LoadedPolicy, load
    from grpo.errors import UserError
    from grpo.tasks.common import Task

__all__ = ["LoadedPolicy", "Task", "UserError", "__version__", "load"]

_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file() and (_checkout / "kernels").is_dir():
    __path__.append(str(_checkout))

# Imported at their first use, so that `import grpo` stays cheap. No name here is that of a module.
_homes = {
    "load": "grpo.api.loaded_policy",
    "LoadedPolicy": "grpo.api.loaded_policy",
    "Task": "grpo.tasks.common",
    "UserError": "grpo.errors",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _homes:
        if not name.startswith("_"):
            importlib.import_module("grpo.config.familiar_names").refuse_class(name)
        raise AttributeError(f"module 'grpo' has no attribute {name!r}")
    return getattr(importlib.import_module(_homes[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_homes])
