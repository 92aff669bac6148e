"""Tool calls in what the model wrote, in the forms that families of models write them in.

Each call is read on its own: one that cannot be read is told of and the others still count. What stands inside
<think> ... </think> is thought and not called. Which form a chat template teaches is found in `continuation.py`.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Call = dict[str, Any]
"""{"name": str, "arguments": dict}."""
Types = Mapping[str, Mapping[str, Any]]
"""Tool -> argument -> its JSON type, for forms that write text and numbers alike."""

THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
IN_TOOL_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|(?=<tool_call>)|\Z)", re.DOTALL)
FUNCTION = re.compile(r"\s*<function=([^>\s]+)>(.*?)(?:</function>\s*|\Z)", re.DOTALL)
PARAMETER = re.compile(r"<parameter=([^>\s]+)>\n?(.*?)\n?(?:</parameter>|(?=<parameter=)|\Z)", re.DOTALL)
KEYED = re.compile(r"\s*([^<>{}\s]+)\s*((?:<arg_key>.*)?)\Z", re.DOTALL)
KEY_AND_VALUE = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)
NAMES = {"true": True, "false": False, "null": None, "none": None}


@dataclass(frozen=True)
class Form:
    """How calls are written: blocks in the text, each with the calls that `read` finds in its body.

    `read` raises ValueError, SyntaxError or RecursionError for what is no call.
    """

    block: re.Pattern[str]
    read: Callable[[str, Types], list[Call]]
    close: str
    """What a turn's last call ends with; what comes after it ends the turn."""
    around: re.Pattern[str] | None = None
    """What else of a turn is neither its calls nor what it says."""


def from_json(body: str, types: Types) -> list[Call]:
    """{"name": "look", "arguments": {"at": 1}}"""
    return [as_call(json.loads(body))]


def as_call(value: Any) -> Call:
    """`value` as a call. Raises ValueError for what is none."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError('a call is {"name": ..., "arguments": {...}}')
    arguments = value.get("arguments", value.get("parameters"))
    if arguments is not None and not isinstance(arguments, dict):
        raise ValueError(f"the arguments of {value['name']!r} are no object")
    return {"name": value["name"], "arguments": arguments or {}}


def from_tags(body: str, types: Types) -> list[Call]:
    """<function=look> <parameter=at> 1 </parameter> </function>, each on a line"""
    found = FUNCTION.fullmatch(body)
    if found is None:
        raise ValueError("a call is <function=NAME> ... </function>")
    kinds = types.get(found.group(1), {})
    pairs = PARAMETER.findall(found.group(2))
    return [{"name": found.group(1), "arguments": {key: typed(text, kinds.get(key)) for key, text in pairs}}]


def from_keys(body: str, types: Types) -> list[Call]:
    """look <arg_key>at</arg_key> <arg_value>1</arg_value>, each on a line"""
    found = KEYED.match(body)
    if found is None:
        raise ValueError("a call is a name, and <arg_key> and <arg_value> for each argument")
    kinds = types.get(found.group(1), {})
    pairs = KEY_AND_VALUE.findall(found.group(2))
    return [{"name": found.group(1), "arguments": {key.strip(): typed(text, kinds.get(key)) for key, text in pairs}}]


def typed(text: str, kind: Any) -> Any:
    """An argument that was written as plain text: text where the schema says so, else the JSON or Python that it is."""
    if kind == "string":
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return NAMES.get(text.strip().lower(), text)


def from_python(body: str, types: Types) -> list[Call]:
    """[look(at=1), look(at=2)]"""
    tree = ast.parse(body.strip(), mode="eval").body
    return [as_python_call(node) for node in (tree.elts if isinstance(tree, ast.List | ast.Tuple) else [tree])]


def as_python_call(node: ast.expr) -> Call:
    if not isinstance(node, ast.Call) or node.args or any(one.arg is None for one in node.keywords):
        raise ValueError("a call is NAME(ARGUMENT=VALUE, ...)")
    return {
        "name": ast.unparse(node.func),
        "arguments": {str(one.arg): literal(one.value) for one in node.keywords},
    }


def literal(node: ast.expr) -> Any:
    """A Python literal, in which JSON's names count too. Raises ValueError for anything else."""
    for inner in ast.walk(node):
        for field, value in ast.iter_fields(inner):
            if isinstance(value, ast.Name) and value.id in NAMES:
                setattr(inner, field, ast.Constant(NAMES[value.id]))
            elif isinstance(value, list):
                value[:] = [
                    ast.Constant(NAMES[one.id]) if isinstance(one, ast.Name) and one.id in NAMES else one
                    for one in value
                ]
    return NAMES[node.id] if isinstance(node, ast.Name) and node.id in NAMES else ast.literal_eval(node)


def from_json_texts(body: str, types: Types) -> list[Call]:
    """{"name": "look", "parameters": {"at": 1}}, or several with semicolons between; what follows is left alone."""
    found, decoder = [], json.JSONDecoder()
    while body.startswith("{"):
        value, end = decoder.raw_decode(body)
        found.append(as_call(value))
        body = body[end:].lstrip("; \n")
    return found


def from_channel(body: str, types: Types) -> list[Call]:
    """to=functions.look<|channel|>commentary json<|message|>{"at": 1}"""
    head, _, arguments = body.partition("<|message|>")
    name = re.match(r"to=functions\.([^\s<]+)", head)
    assert name is not None  # the block begins so
    return [as_call({"name": name.group(1), "arguments": json.loads(arguments)})]


def from_fence(body: str, types: Types) -> list[Call]:
    """look, and in the next lines its arguments between ```json and ```"""
    found = re.fullmatch(r"\s*(\S+)\s*```(?:json)?\s*(.*?)\s*(?:```\s*)?", body, re.DOTALL)
    if found is None:
        raise ValueError("a call is a name and a JSON object between ```json and ```")
    return [as_call({"name": found.group(1), "arguments": json.loads(found.group(2))})]


def from_gemma(body: str, types: Types) -> list[Call]:
    """call:look{at:1,word:<|"|>cat<|"|>}"""
    found = re.fullmatch(r"\s*call:([^\s{]+)(\{.*\})\s*", body, re.DOTALL)
    if found is None:
        raise ValueError("a call is call:NAME{KEY:VALUE,...}")
    return [as_call({"name": found.group(1), "arguments": json.loads(as_json(found.group(2)))})]


def as_json(text: str) -> str:
    """Gemma's way of writing an object, as JSON: texts stand between <|"|>, and keys alone."""
    parts = text.split('<|"|>')
    if len(parts) % 2 == 0:
        raise ValueError('a text between <|"|> does not end')
    for index, part in enumerate(parts):
        parts[index] = json.dumps(part) if index % 2 else re.sub(r"([{,]\s*)([^\s{}\[\],:]+)\s*:", r'\1"\2":', part)
    return "".join(parts)


FORMS = {
    "hermes": Form(IN_TOOL_CALL, from_json, "</tool_call>"),
    "qwen3_coder": Form(IN_TOOL_CALL, from_tags, "</tool_call>"),
    "glm45": Form(IN_TOOL_CALL, from_keys, "</tool_call>"),
    "lfm2": Form(
        re.compile(r"<\|tool_call_start\|>(.*?)(?:<\|tool_call_end\|>|\Z)", re.DOTALL),
        from_python,
        "<|tool_call_end|>",
    ),
    "llama3_json": Form(
        re.compile(r"\A\s*(?:<\|python_tag\|>)?\s*(\{\s*\"(?:name|type)\".*)\Z", re.DOTALL), from_json_texts, "}"
    ),
    "gemma4": Form(
        re.compile(r"<\|tool_call>(.*?)(?:<tool_call\|>|(?=<\|tool_call>)|\Z)", re.DOTALL), from_gemma, "<tool_call|>"
    ),
    "openai": Form(
        re.compile(r"(to=functions\.[^\s<]+[^{]*?<\|message\|>.*?)(?:<\|call\|>|<\|end\|>|\Z)", re.DOTALL),
        from_channel,
        "}",
        re.compile(
            r"<\|channel\|>(?:analysis|commentary)(?:<\|message\|>.*?(?:<\|end\|>|\Z)|\s)"
            r"|<\|start\|>assistant\s*|<\|channel\|>final\s*<\|message\|>|<\|(?:end|return|call)\|>",
            re.DOTALL,
        ),
    ),
    "deepseek_v3": Form(
        re.compile(
            r"<｜tool▁call▁begin｜>function<｜tool▁sep｜>(.*?)(?:<｜tool▁call▁end｜>|(?=<｜tool▁call▁begin｜>)|\Z)",
            re.DOTALL,
        ),
        from_fence,
        "<｜tool▁calls▁end｜>",
        re.compile(r"<｜tool▁calls▁(?:begin|end)｜>"),
    ),
}
"""By the names that vLLM's `--tool-call-parser` has for them."""
HERMES = FORMS["hermes"]


def without_thought(text: str, thinks: bool = False) -> str:
    """`text` without thoughts; it begins inside of one where the prompt ended with <think>, as `thinks` says."""
    return THOUGHT.sub("", f"<think>{text}" if thinks else text)


def read_calls(
    text: str, form: Form = HERMES, tools: Sequence[Mapping[str, Any]] | None = None, *, thinks: bool = False
) -> tuple[list[Call], list[str]]:
    """Calls in the order they stand in, and why each of the others cannot be read."""
    calls: list[Call] = []
    malformed = []
    types = types_of(tools or ())
    for body in form.block.findall(without_thought(text, thinks)):
        try:
            calls += form.read(body, types)
        except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
            malformed.append(str(error))
    return calls, malformed


def types_of(tools: Sequence[Mapping[str, Any]]) -> Types:
    """The types of the tools' arguments; nothing of a schema that is in no usual form."""
    found: dict[str, Mapping[str, Any]] = {}
    for tool in tools:
        function = tool.get("function", tool)
        parameters = function.get("parameters") if isinstance(function, Mapping) else None
        properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
        if isinstance(properties, Mapping):
            found[str(function.get("name"))] = {
                key: schema.get("type") for key, schema in properties.items() if isinstance(schema, Mapping)
            }
    return found


def assistant_message(
    text: str,
    form: Form = HERMES,
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    thinks: bool = False,
    most: int | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """What was said as a chat message, and why calls in it could not be read. `most`: calls that a turn may have."""
    calls, malformed = read_calls(text, form, tools, thinks=thinks)
    if most is not None and len(calls) > most:
        malformed += [f"a turn of this model has at most {most} call"] * (len(calls) - most)
        calls = calls[:most]
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if form.around is not None:
        message["content"] = form.around.sub("", form.block.sub("", text)).strip()
    elif calls:
        message["content"] = form.block.sub("", text).strip()
    if calls:
        message["tool_calls"] = [{"type": "function", "function": call} for call in calls]
    return message, malformed
