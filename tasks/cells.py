"""What a row says: its columns by name, nested ones by a dotted name, and text made of them by a template.

A question and a gold answer are text or a number. What is missing, null, NaN, empty or of another kind there is refused
with the row's place, because Python would write it as "None", "nan" or "[1, 2]" and the model would be trained on that.
Where rows come from is `common.py`'s.
"""

from __future__ import annotations

import contextlib
import json
import math
import numbers
import string
from collections.abc import Mapping, Sequence
from typing import Any

from grpo.errors import UserError
from grpo.messages import says_nothing

GIVE_OR_LEAVE_OUT = "give the row one, or leave the row out"


def reach(row: Any, name: str) -> Any:
    """The value of the column `name`. Where no column is called so, its dots lead into nested ones.

    "reward_model.ground_truth" is the entry "ground_truth" of the column "reward_model", "answers.0" the first entry of
    a list; a column that holds JSON text is read for it. Raises KeyError where there is none.
    """
    if isinstance(row, Mapping):
        if name in row:
            return row[name]
        for dot in (index for index in reversed(range(len(name))) if name[index] == "."):
            with contextlib.suppress(KeyError):
                return reach(parsed(row[name[:dot]]), name[dot + 1 :])
    elif isinstance(row, list):
        first, _, rest = name.partition(".")
        if first.isdecimal() and int(first) < len(row):
            return reach(parsed(row[int(first)]), rest) if rest else row[int(first)]
    raise KeyError(name)


def parsed(value: Any) -> Any:
    """`value`, or what it means as JSON where it is the text of an object or a list."""
    if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def columns_of(row: Mapping[Any, Any]) -> str:
    """The names of the row's columns, for an error; of a nested one those of its entries."""
    names: list[str] = []
    for name, value in row.items():
        nested = parsed(value)
        names += [f"{name}.{entry}" for entry in nested] if isinstance(nested, Mapping) and nested else [str(name)]
    return ", ".join(names)


def require_columns(row: Mapping[str, Any], columns: Sequence[str], where: str) -> None:
    """Raise UserError when `row`, which is at `where`, lacks one of `columns`, or holds null there."""
    for column in columns:
        try:
            state = "is null" if reach(row, column) is None else ""
        except KeyError:
            state = "is missing"
        if state:
            raise UserError(f"{where}: column {column!r} {state}; the columns are {columns_of(row)}")


def is_blank(value: Any) -> bool:
    """Whether `value` is text without a visible character."""
    return isinstance(value, str) and not value.strip()


def cell_problem(value: Any) -> str | None:
    """Why `value` is neither text nor a number, as "is NaN"; None where it is one of them."""
    if value is None:
        return "is null"
    if isinstance(value, bool) or not isinstance(value, str | numbers.Number):
        return f"is {json.dumps(value) if isinstance(value, bool) else f'a {type(value).__name__}'}, no text or number"
    if isinstance(value, str):
        return None
    try:
        number = float(value)  # type: ignore[arg-type]
    except OverflowError:  # an integer of many digits
        return None
    except TypeError:
        return f"is a {type(value).__name__}, no text or number"
    return "is NaN" if math.isnan(number) else "is infinite" if math.isinf(number) else None


def text_of(value: Any, column: str, where: str) -> str:
    """`value`, the cell of `column` in the row at `where`, as text, which may be empty.

    Raises UserError where it is no text or number.
    """
    lack = cell_problem(value)
    if lack is None:
        return str(value)
    inside = ""
    if isinstance(value, list | Mapping) and value:
        inside = f", or name an entry of it, as {column}.{next(iter(value)) if isinstance(value, Mapping) else 0}"
    raise UserError(f"{where}: column {column!r} {lack}; {GIVE_OR_LEAVE_OUT}{inside}")


def gold_text(row: Mapping[str, Any], column: str, where: str) -> str:
    """The gold answer in `column`, as text. Raises UserError where it is missing, empty, or no text or number."""
    require_columns(row, [column], where)
    text = text_of(reach(row, column), column, where)
    if is_blank(text):
        raise UserError(f"{where}: column {column!r} is empty; {GIVE_OR_LEAVE_OUT}")
    return text


class Filling(string.Formatter):
    """`str.format` with a row's columns, for which it remembers what it has filled in."""

    def __init__(self, row: Mapping[str, Any], where: str):
        self.row, self.where = row, where
        self.filled: dict[str, str] = {}

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> tuple[Any, str]:
        try:
            value = reach(self.row, field_name)
        except KeyError:
            if field_name.isdecimal():
                raise IndexError("{} names no column") from None
            if "[" not in field_name:
                raise
            value = super().get_field(field_name, args, self.row)[0]
        self.filled[field_name] = text_of(value, field_name, self.where)
        return value, field_name


def filled(template: str, row: Mapping[str, Any], where: str, what: str = "the prompt") -> str:
    """`template` with the row's columns in it; a nested one is {column.entry} or {column[entry]}.

    Raises UserError, in which `what` is the template, where a column is missing or no text or number, or where it asks
    for columns and all of them are empty.
    """
    filling = Filling(row, where)
    try:
        text = filling.vformat(template, (), row)
    except KeyError as error:
        raise UserError(f"{where}: {what} asks for {error}; the columns are {columns_of(row)}") from None
    except (ValueError, IndexError, AttributeError, TypeError) as error:
        raise UserError(
            f"{where}: {what} {template!r} cannot be filled ({error}); write a literal {{ as {{{{"
        ) from None
    if filling.filled and all(map(is_blank, filling.filled.values())):
        names = " and ".join(map(repr, filling.filled))
        raise UserError(f"{where}: {what} asks for {names}, which is empty; {GIVE_OR_LEAVE_OUT}")
    return text


def checked_prompt(prompt: Any, where: str) -> str | list[dict[str, Any]]:
    """`prompt`. Raises UserError unless it is text or chat messages with a role and a content each."""
    if isinstance(prompt, str) and prompt:
        return prompt
    if isinstance(prompt, list) and prompt:
        if all(isinstance(m, dict) and isinstance(m.get("role"), str) and is_content(m.get("content")) for m in prompt):
            return prompt
    raise UserError(
        f'{where}: "prompt" must be text or a list of messages such as {{"role": "user", "content": "..."}}; '
        f"it is {str(prompt)[:60]!r}"
    )


def is_content(content: Any) -> bool:
    """Whether a message may say this: a text, or a list of parts."""
    return isinstance(content, str) or (isinstance(content, list) and all(isinstance(p, dict | str) for p in content))


def check_question(prompt: str | Sequence[Mapping[str, Any]], where: str) -> None:
    """Raise UserError where a prompt asks nothing: an empty text, or a user's turn that is empty."""
    if isinstance(prompt, str):
        empty = is_blank(prompt)
    else:
        empty = any(turn["role"] == "user" and says_nothing(turn["content"]) for turn in prompt)
    if empty:
        raise UserError(f"{where}: its question is empty; {GIVE_OR_LEAVE_OUT}")
