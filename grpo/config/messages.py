"""What a configuration field accepts, in words; and a pydantic error as one sentence that names the remedy.

The words serve the error messages and `docs/config.md` alike, so the two cannot disagree.
"""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from grpo.config.familiar_names import INSTEAD, RENAMED
from grpo.config.toml import NONE, Location, line_of, split_override, write_value
from grpo.errors import UserError

LONGEST_VALUE = 80
TOO_LARGE = "too_large"
"""The type of the error of a number that nothing computes with."""


def accepts(field: FieldInfo) -> str:
    """What `field` accepts: "an integer of at least 1", '"adamw" or "adamw_8bit"'."""
    words = _in_words(field.annotation, field.metadata)
    return f'{words}, or "{NONE}"' if admits_none_as_text(field) else words


def admits_none_as_text(field: FieldInfo) -> bool:
    """Whether `"none"` in a file stands for None here: where None is allowed, and neither text nor a path is."""
    kinds = get_args(field.annotation)
    return type(None) in kinds and not any(kind is str or Path in get_args(kind) for kind in kinds)


def _in_words(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [c for part in arguments[1:] for c in (part.metadata if isinstance(part, FieldInfo) else [part])]
        return _in_words(arguments[0], [*inner, *metadata])
    if origin in (Union, types.UnionType):
        return _one_of([choice for part in arguments for choice in _choices(part, metadata)])
    if origin is Literal or annotation is bool:
        return _one_of(_choices(annotation, metadata))
    if origin is tuple:
        return f"a list of {len(arguments)}, each {_in_words(arguments[0])}"
    if origin is list and _is_model(arguments[0]):
        return "one or more tables"
    if origin is list:
        least = next((c.min_length for c in metadata if isinstance(c, annotated_types.MinLen)), 0)
        return ("a list that is not empty" if least else "a list") + f", each {_in_words(arguments[0])}"
    if origin is dict and arguments[1] is not Any:
        return f"a table, each value {_in_words(arguments[1])}"
    if origin is dict or _is_model(annotation):
        return "a table"
    if annotation is int:
        return "an integer" + _bounds(metadata, step=1)
    if annotation is float:
        return "a number" + _bounds(metadata)
    return {str: "text in quotes", Path: "a path in quotes"}[annotation]


def _choices(annotation: Any, metadata: Sequence[Any]) -> list[str]:
    """The alternatives that one branch of a union offers."""
    if annotation is type(None):
        return []
    if annotation is bool:
        return ["true", "false"]
    if get_origin(annotation) is Literal:
        return [write_value(value) for value in get_args(annotation)]
    return [_in_words(annotation, metadata)]


def _one_of(options: list[str]) -> str:
    return options[0] if len(options) == 1 else f"{', '.join(options[:-1])} or {options[-1]}"


def _bounds(metadata: Sequence[Any], step: int = 0) -> str:
    """The limits in words. Integers (`step` 1) have no open ends: above 0 is at least 1."""
    low = high = ""
    for limit in metadata:
        match limit:
            case annotated_types.Ge(int() | float() as bound):
                low = f"at least {bound}"
            case annotated_types.Gt(int() | float() as bound):
                low = f"at least {bound + step}" if step else f"above {bound}"
            case annotated_types.Le(int() | float() as bound):
                high = f"at most {bound}"
            case annotated_types.Lt(int() | float() as bound):
                high = f"at most {bound - step}" if step else f"below {bound}"
    if low.startswith("at least ") and high.startswith("at most "):
        return f" from {low.removeprefix('at least ')} to {high.removeprefix('at most ')}"
    both = " and ".join(part for part in (low, high) if part)
    return f" of {both}" if both.startswith("at") else f" {both}" if both else ""


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The model of a field that holds a section or a list of sections; None for a plain field."""
    return next((part for part in (field.annotation, *get_args(field.annotation)) if _is_model(part)), None)


def explain(
    error: ValidationError,
    root: type[BaseModel],
    values: dict[str, Any],
    source: str,
    text: str = "",
    overrides: Sequence[str] = (),
) -> UserError:
    """The first problem that `root` found in `values`, as a UserError of one sentence that counts the others.

    `text` is the TOML that `source` holds, for the line; `overrides` are the `--set` arguments, which are named
    instead of the file where one of them set the offending key.
    """
    # A misspelt section is also a missing one; the misspelling is what helps.
    errors = sorted(error.errors(include_url=False), key=lambda each: each["type"] != "extra_forbidden")
    first = errors[0]
    path, section, field = _locate(first["loc"], root)
    key = ".".join(str(part) for part in _as_written(path, values))
    if first["type"] == "extra_forbidden":
        sentence = f"unknown key {key!r}; {_nearest(str(path[-1]), section, root)}"
    elif first["type"] == "missing" and path == first["loc"]:
        sentence = f"{key!r} is missing; it has no default"
    elif first["type"] == "value_error":
        sentence = f"[{key}] {first['ctx']['error']}" if key else str(first["ctx"]["error"])
    elif first["type"] == TOO_LARGE:
        sentence = f"{key} = {shown(_value_at(path, values))}: {first['msg']}"
    else:
        must = accepts(field) if field else "a table"
        sentence = f"{key} = {shown(_value_at(path, values))}: must be {must}"
    others = len({_locate(each["loc"], root)[0] for each in errors}) - 1
    more = f" (and {others} more problem{'s' if others > 1 else ''})" if others else ""
    where = _override(path, field, overrides) or _blamed(sentence, path, overrides) or source
    line = line_of(text, path) if where == source else None
    return UserError(f"{where}:{line}: {sentence}{more}" if line else f"{where}: {sentence}{more}")


def _locate(location: Location, root: type[BaseModel]) -> tuple[Location, type[BaseModel], FieldInfo | None]:
    """The part of a pydantic location that is a key of the configuration, the section it is in, and its field.

    What follows in the location (an entry of a list, the branch of a union) is dropped. The field is None for a key
    that does not exist.
    """
    section, inside, path = root, root, list[str | int]()
    field = None
    for part in location:
        path.append(part)
        if isinstance(part, int):
            continue
        section, field = inside, inside.model_fields.get(part)
        deeper = section_of(field) if field else None
        if deeper is None:
            break
        inside = deeper
    return tuple(path), section, field


def _as_written(path: Location, values: Any) -> Location:
    """`path` without the numbers that validation added: a single `[task]` is written without one."""
    written: list[str | int] = []
    for part in path:
        if isinstance(part, int) and isinstance(values, dict):
            continue
        written.append(part)
        try:
            values = values[part]
        except (KeyError, IndexError, TypeError):
            values = None
    return tuple(written)


def _value_at(path: Location, values: Any) -> Any:
    for part in _as_written(path, values):
        values = values[part]
    return values


def shown(value: Any) -> str:
    """`value` in TOML's notation where it has one, cut short."""
    try:
        text = write_value(value)
    except TypeError:
        text = repr(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def _nearest(key: str, section: type[BaseModel], root: type[BaseModel]) -> str:
    """The remedy for an unknown key: the section it belongs in, the nearest valid key, or all valid keys."""
    homes = {
        name: f"[{section_name}]"
        for section_name, field in root.model_fields.items()
        if (model := section_of(field)) and model is not section
        for name in model.model_fields
    }
    if key in homes:
        return f"it belongs in {homes[key]}"
    if key in RENAMED and RENAMED[key] in {*homes, *section.model_fields}:
        return f"here it is {RENAMED[key]!r}" + (f" of {homes[RENAMED[key]]}" if RENAMED[key] in homes else "")
    if key in INSTEAD:
        return INSTEAD[key]
    known = list(section.model_fields)
    if near := difflib.get_close_matches(key, known, n=1, cutoff=0.6):
        return f"did you mean {near[0]!r}?"
    if near := difflib.get_close_matches(key, homes, n=1, cutoff=0.8):
        return f"did you mean {near[0]!r} in {homes[near[0]]}?"
    return f"valid keys are {', '.join(known)}"


def _override(path: Location, field: FieldInfo | None, overrides: Sequence[str]) -> str:
    """The `--set` argument that set the key at `path` or, for a key that does not exist, something below it."""
    keys = [part for part in path if isinstance(part, str)]
    for override in overrides:
        named = [part for part in split_override(override)[0] if not part.isdecimal()]
        if named == keys[: len(named)] or (field is None and keys and named[: len(keys)] == keys):
            return f"--set {override}"
    return ""


def _blamed(sentence: str, path: Location, overrides: Sequence[str]) -> str:
    """The last `--set` argument below `path` whose key a rule between several keys names in `sentence`."""
    inside = [part for part in path if isinstance(part, str)]
    for override in reversed(overrides):
        keys = [part for part in split_override(override)[0] if not part.isdecimal()]
        if keys[: len(inside)] == inside and re.search(rf"\b{re.escape(keys[-1])}\b", sentence):
            return f"--set {override}"
    return ""
