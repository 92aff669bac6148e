"""TOML in and out: reading a file, `--set` overrides, writing a configuration, and the line on which a key stands.

The standard library reads TOML and does not write it; the writer here covers what a configuration holds (tables of
text, numbers, booleans, dates, lists and inline tables) and nothing else. What the keys mean is `grpo.config`'s.
"""

from __future__ import annotations

import datetime
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo.errors import UserError

BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
HEADER = re.compile(r"\s*(\[\[?)\s*([^\[\]]+?)\s*\]\]?\s*(?:#.*)?$")
ASSIGNMENT = re.compile(r"""\s*([A-Za-z0-9_."' -]+?)\s*=""")
NONE = "none"  # how a file says "no value" where leaving the key out would mean its default

Location = tuple[str | int, ...]


def read_toml(path: Path) -> tuple[dict[str, Any], str]:
    """The values in the TOML file `path`, and its text. Raises UserError naming the file and, for syntax, the line."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file; pass the path of a .toml file") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; pass the path of a .toml file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as text ({error}); pass the path of a .toml file") from None
    try:
        return tomllib.loads(text), text
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from None


def split_override(override: str) -> tuple[list[str], Any]:
    """`section.key=value` as the parts of the key and the value: TOML, or the bare text where it is not TOML."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"--set {override}: write it as section.key=value, for example train.learning_rate=1e-5")
    try:
        values = tomllib.loads(f"value = {text}")
    except (tomllib.TOMLDecodeError, RecursionError):
        return parts, text
    return parts, values["value"] if len(values) == 1 else text


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one `section.key=value` in place.

    A list entry is named by its number: `rewards.0.weight=2`; without a number the first is meant.
    Raises UserError for a malformed override and for a path that leads through a plain value.
    """
    parts, value = split_override(override)
    table: Any = values
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(table, list):
            index = int(part) if part.isdecimal() else 0
            if index >= len(table):
                raise UserError(f"--set {override}: there is no entry {index} in a list of {len(table)}")
            if part.isdecimal() and last:
                table[index] = value
                return
            table = table[index]
            if part.isdecimal():
                continue
        if not isinstance(table, dict):
            raise UserError(f"--set {override}: {parts[depth - 1]!r} is a value, not a section")
        if last:
            table[part] = value
        elif part not in table and parts[depth + 1].isdecimal():
            raise UserError(f"--set {override}: the file has no {part!r} whose entry could be set")
        else:
            table = table.setdefault(part, {})


def write_toml(tables: Mapping[str, Any]) -> str:
    """TOML text of named tables: a mapping becomes `[name]`, a sequence of mappings one `[[name]]` each.

    Keys whose value is None are left out. Reading the text again gives equal values.
    """
    blocks = []
    for name, table in tables.items():
        if isinstance(table, Mapping):
            blocks.append(_block(f"[{name}]", table))
        else:
            blocks.extend(_block(f"[[{name}]]", entry) for entry in table)
    return "\n".join(blocks)


def _block(header: str, table: Mapping[str, Any]) -> str:
    lines = [f"{_key(key)} = {write_value(value)}" for key, value in table.items() if value is not None]
    return "\n".join([header, *lines, ""])


def write_value(value: Any) -> str:
    """One value in TOML's notation. Raises TypeError for what TOML cannot say."""
    match value:
        case bool():
            return "true" if value else "false"
        case int():
            return str(value)
        case float():
            return repr(value)
        case str() | Path():
            # JSON's escapes are TOML's, but for DEL, which TOML wants escaped and JSON leaves alone.
            return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
        case datetime.date() | datetime.time():
            return value.isoformat()
        case Mapping():
            inside = ", ".join(f"{_key(key)} = {write_value(entry)}" for key, entry in value.items())
            return f"{{ {inside} }}" if inside else "{}"
        case Sequence():
            return f"[{', '.join(write_value(entry) for entry in value)}]"
    raise TypeError(f"TOML has no form for {value!r}")


def _key(key: str) -> str:
    return key if BARE_KEY.fullmatch(key) else write_value(key)


def line_of(text: str, location: Location) -> int | None:
    """The line, from 1, on which the key at `location` stands in TOML `text`; None where that is not known.

    `location` is a path of keys; a number in it counts the entries of a `[[table]]`. The text is taken by the line,
    so that keys inside a multi-line inline table are not found: the line is a help in a message, no more.
    """
    table: list[str] = []
    entry: dict[str, int] = {}
    quote = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if quote:
            quote = "" if quote in line else quote
            continue
        if header := HEADER.match(line):
            table = _parts(header[2])
            name = ".".join(table)
            entry[name] = entry.get(name, -1) + 1
            if location == tuple(table):
                return number
        elif assignment := ASSIGNMENT.match(line):
            path: list[str | int] = [*table, *_parts(assignment[1])]
            index = entry.get(".".join(table), 0)
            if location in (tuple(path), (*table, index, *path[len(table) :])):
                return number
            quote = next((mark for mark in ('"""', "'''") if line.count(mark) == 1), "")
    return None


def _parts(dotted: str) -> list[str]:
    return [part.strip().strip("\"'") for part in dotted.split(".")]
