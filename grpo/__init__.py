"""GRPO on one GPU: vLLM samples and a PyTorch graph trains over one copy of a (4-bit) base model.

The folders `kernels/`, `rewards/` and `tasks/` beside this one are part of this package: `grpo.kernels`,
`grpo.rewards`, `grpo.tasks`. A wheel maps them below `grpo/`; from a checkout the line below makes them
importable. They have no `__init__.py`, so that `import kernels` still finds Hugging Face's package of that name.
"""

from pathlib import Path

__version__ = "0.1.0"

_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "pyproject.toml").is_file() and (_checkout / "kernels").is_dir():
    __path__.append(str(_checkout))
