"""A Python function as a tool's JSON schema, as transformers' `get_json_schema` makes it; without importing that.

transformers brings torch, which no environment's process needs.
"""

from __future__ import annotations

import inspect
import json
import re
import types
from collections.abc import Callable
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from grpo.errors import UserError

PLAIN: dict[Any, dict[str, Any]] = {
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string"},
    bool: {"type": "boolean"},
    type(None): {"type": "null"},
    list: {"type": "array"},
    tuple: {"type": "array"},
    dict: {"type": "object"},
    Any: {},
}
CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.DOTALL | re.IGNORECASE)
SECTION = re.compile(r"^\s*(Args|Returns|Raises):\s*$")
ARGUMENT = re.compile(r"^\s*(\w+):\s*(.*)$")


def tool_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """The schema of `function` from its type hints and the Args of its docstring. Raises UserError for what lacks."""
    name = function.__name__
    about, described, returned = docstring_parts(inspect.getdoc(function) or "")
    if not about:
        raise UserError(f"tool {name!r} has no docstring; the model reads it, so say what the tool does")
    try:
        hints = get_type_hints(function)
    except NameError as error:
        raise UserError(f"tool {name!r}: its type hints cannot be read ({error}); mend them") from None
    parameters = inspect.signature(function).parameters
    properties: dict[str, Any] = {}
    for parameter in parameters.values():
        if parameter.name not in hints:
            raise UserError(f"tool {name!r}: its argument {parameter.name!r} has no type hint; give it one")
        if parameter.name not in described:
            raise UserError(
                f"tool {name!r}: its docstring does not describe the argument {parameter.name!r}; add it under Args:"
            )
        properties[parameter.name] = with_description(of_hint(hints[parameter.name], name), described[parameter.name])
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    if required := [each.name for each in parameters.values() if each.default is each.empty]:
        schema["required"] = required
    result: dict[str, Any] = {"name": name, "description": about, "parameters": schema}
    if "return" in hints:
        result["return"] = of_hint(hints["return"], name)
        if returned is not None:
            result["return"]["description"] = returned
    return {"type": "function", "function": result}


def with_description(schema: dict[str, Any], text: str) -> dict[str, Any]:
    """`schema` with its description; "(choices: [...])" at the end of that becomes an enum."""
    if found := CHOICES.search(text):
        schema["enum"] = [choice.strip() for choice in json.loads(found.group(1))]
        text = text[: found.start()].strip()
    return {**schema, "description": text}


def of_hint(hint: Any, tool: str) -> dict[str, Any]:
    """The schema of a type hint. Raises UserError naming `tool` for what JSON has not."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is None:
        return dict(PLAIN.get(hint, {"type": "object"}))
    if origin is Union or origin is types.UnionType:
        return of_union(arguments, tool)
    if origin is Literal:
        kinds = list(dict.fromkeys(PLAIN[type(value)]["type"] for value in arguments))
        return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": list(arguments)}
    if origin is list:
        return {"type": "array", "items": of_hint(arguments[0], tool)}
    if origin is tuple and len(arguments) > 1 and ... not in arguments:
        return {"type": "array", "prefixItems": [of_hint(each, tool) for each in arguments]}
    if origin is dict:
        return {"type": "object", "additionalProperties": of_hint(arguments[1], tool)}
    raise UserError(f"tool {tool!r}: the type hint {hint} has no JSON schema; use plain types, lists and dicts")


def of_union(arguments: tuple[Any, ...], tool: str) -> dict[str, Any]:
    """The schema of alternatives; None among them makes the others nullable."""
    kinds = [of_hint(each, tool) for each in arguments if each is not type(None)]
    if len(kinds) == 1:
        result = kinds[0]
    elif all(kind.keys() == {"type"} and isinstance(kind["type"], str) for kind in kinds):
        names = sorted({kind["type"] for kind in kinds})
        result = {"type": names[0] if len(names) == 1 else names}
    else:
        result = {"anyOf": kinds}
    return {**result, "nullable": True} if type(None) in arguments else result


def docstring_parts(text: str) -> tuple[str, dict[str, str], str | None]:
    """The description, each argument's description and that of the result, of a Google docstring."""
    parts: dict[str, list[str]] = {"": [], "Args": [], "Returns": [], "Raises": []}
    section = ""
    for line in text.splitlines():
        if heading := SECTION.match(line):
            section = heading.group(1)
        else:
            parts[section].append(line)
    described: dict[str, str] = {}
    name = ""
    for line in filter(str.strip, parts["Args"]):
        if found := ARGUMENT.match(line):
            name, described[found.group(1)] = found.group(1), found.group(2).strip()
        elif name:
            described[name] = f"{described[name]} {line.strip()}".strip()
    returned = "\n".join(parts["Returns"]).strip() or None
    return "\n".join(parts[""]).strip(), described, returned
