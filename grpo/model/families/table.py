"""Every family with an entry, out of the files of this folder."""

from __future__ import annotations

from functools import cache
from importlib import import_module

from grpo.model.families.family import Family

FILES = ("plain", "gemma", "qwen", "phi3", "ministral3", "granite", "cohere", "position_free", "experts", "hybrid")
"""The modules of this package, each with FAMILIES: model_type -> Family."""


def family_of(model_type: str) -> Family:
    """The entry of a family; one of defaults where it has none."""
    return _families().get(model_type, Family())


def listed() -> tuple[str, ...]:
    """Every family with an entry, but for those that are refused: those that tests compare."""
    return tuple(name for name, family in _families().items() if not family.unserved)


@cache
def _families() -> dict[str, Family]:
    found: dict[str, Family] = {}
    for name in FILES:
        found |= import_module(f"grpo.model.families.{name}").FAMILIES
    return found
