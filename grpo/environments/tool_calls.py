"""Tool calls in what the model wrote: JSON between <tool_call> and </tool_call>, as Qwen's and Hermes' models write.

Each call is read on its own: one that cannot be read is told of and the others still count. What stands inside
<think> ... </think> is thought and not called.
"""

from __future__ import annotations

import json
import re
from typing import Any

CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|(?=<tool_call>)|\Z)", re.DOTALL)
THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)


def read_calls(text: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Calls as {"name", "arguments"} in the order they stand in, and why each of the others cannot be read."""
    calls, malformed = [], []
    for body in CALL.findall(THOUGHT.sub("", text)):
        try:
            calls.append(as_call(json.loads(body)))
        except (ValueError, RecursionError) as error:
            malformed.append(str(error))
    return calls, malformed


def as_call(value: Any) -> dict[str, Any]:
    """`value` as a call. Raises ValueError for what is none."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError('a call is {"name": ..., "arguments": {...}}')
    arguments = value.get("arguments", value.get("parameters"))
    if arguments is not None and not isinstance(arguments, dict):
        raise ValueError(f"the arguments of {value['name']!r} are no object")
    return {"name": value["name"], "arguments": arguments or {}}


def assistant_message(text: str) -> tuple[dict[str, Any], list[str]]:
    """What was said as a chat message, and why calls in it could not be read."""
    calls, malformed = read_calls(text)
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if calls:
        message["content"] = CALL.sub("", text).strip()
        message["tool_calls"] = [{"type": "function", "function": call} for call in calls]
    return message, malformed
