"""vLLM's Transformers backend, for families that vLLM has no class of its own for, kept from changing transformers.

It rewrites transformers' class of the decoder so that torch.compile can take it, in place: the training graph is of the
same class and would run the rewritten form. Nothing is compiled here, so the rewriting is left out.
"""

from __future__ import annotations

from typing import Any

from vllm import ModelRegistry


def leave_classes_alone(architecture: str) -> None:
    """Prepare for a model that vLLM knows as `architecture`, before it is built."""
    known = ModelRegistry.models.get(architecture)
    if known is not None and not getattr(known, "module_name", "").endswith(".transformers"):
        return
    from vllm.model_executor.models.transformers.base import Base

    for name in ("_decorate_for_torch_compile", "_decorate_cls_for_torch_compile"):
        if hasattr(Base, name):
            setattr(Base, name, nothing)


def nothing(self: Any, *args: Any, **kwargs: Any) -> None:
    """In the place of what rewrites."""
