"""From a row to the messages of a conversation: the forms that data sets have, and templates over columns.

The forms are OpenAI's messages (parts of text, tool calls, functions, weights), ShareGPT's turns, prompts with
completions, and alpaca's columns. What a form does not have is refused with the row's place. Tokens and labels are
`encoding.py`'s.
"""

from __future__ import annotations

import json
import random
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from grpo.errors import UserError
from grpo.images import Image, ReadImage, read_image
from grpo.messages import COLUMNS, column_images, image_places, says_nothing, with_places
from grpo.sft.config import Sft
from grpo.tasks.cells import columns_of, filled, is_blank, parsed, reach
from grpo.tasks.common import Row

ALPACA = ("{instruction}[[\n\n{input}]]", "{output}")
ROLES = {"developer": "system", "function": "tool"}
"""OpenAI's newer and older names of roles, by those that chat templates know."""
SHARE_GPT = {
    **dict.fromkeys(("human", "user", "input", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bot", "model", "output", "bing", "bard"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation", "function_response", "ipython"), "tool"),
    "function_call": "assistant",
}
"""Roles in data with "conversations" of {"from", "value"}."""
BESIDE = ("tools", "functions", "system", "history")
"""Columns that say something beside a conversation."""
USED = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt": ("prompt", "completion"),
    "instruction": ("instruction", "input", "output"),
}
"""The columns of each form, by its first."""
Message = dict[str, Any]
Messages = list[Message]


@dataclass(frozen=True)
class Chat:
    """A conversation that ends with an answer, the tools that it shows, and its place in the data."""

    messages: Messages
    tools: list[Any] | None = None
    where: str = "the conversation"
    used: tuple[str, ...] = field(default=(), compare=False)
    """Columns that it was made of."""
    images: tuple[Image, ...] = ()
    """In the order of their places in the messages."""


def message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def chat_of(row: Row, settings: Sft, where: str, image: ReadImage = read_image) -> Chat:
    """The row as a conversation. Raises UserError where it is none, and for images that cannot be used."""
    messages, found = conversation(row, settings, where)
    images = tuple(image(value, where) for value in found)
    if images and not settings.chat:
        raise UserError(f"{where}: plain text has no place for its images; set sft.chat = true, or leave them out")
    if settings.prompt is not None and settings.completion is not None:
        used = (*columns_in(settings.prompt), *columns_in(settings.completion), *COLUMNS)
        return Chat(messages, None, where, used, images)
    used = next((columns for first, columns in USED.items() if row.get(first) is not None), ())
    return Chat(messages, tools_of(row, where), where, (*used, *BESIDE, *COLUMNS), images)


def conversation(row: Row, settings: Sft, where: str) -> tuple[Messages, list[Any]]:
    """The row as messages that end with an assistant's, and the images that they have places for."""
    if settings.prompt is not None and settings.completion is not None:
        question, answer = fill(settings.prompt, row, where), fill(settings.completion, row, where)
        turns = [message("user", question), message("assistant", answer)]
    else:
        turns = recognised(row, where)
    turns, images = with_places(turns, column_images(row, where), where)
    messages = [checked(turn, where) for turn in turns]
    if not messages or messages[-1]["role"] != "assistant" or not says(messages[-1]):
        raise UserError(f"{where}: it does not end with an answer of the assistant; give it one, or leave it out")
    if any(turn["role"] == "assistant" and isinstance(turn["content"], list) for turn in messages):
        raise UserError(f"{where}: an answer of the assistant has an image, and answers are text; leave the row out")
    return messages, images


def says(turn: Message) -> bool:
    return not says_nothing(turn["content"]) or bool(turn.get("tool_calls"))


def recognised(row: Row, where: str) -> list[Any]:
    """The messages of a row in one of the usual forms."""
    row = {name: listed(value) for name, value in row.items()}
    earlier = [*system_of(row, where), *history_of(row, where)]
    match row:
        case {"messages": list(messages)}:
            return [*earlier, *messages]
        case {"conversations": list(turns)}:
            return [*earlier, *(turn if is_message(turn) else share_gpt(turn, where) for turn in turns)]
        case {"prompt": list(prompt), "completion": list(completion)}:
            return [*earlier, *prompt, *completion]
        case {"prompt": str(prompt), "completion": str(completion)}:
            return [*earlier, message("user", prompt), message("assistant", completion)]
        case {"instruction": str(), "output": str()}:
            question, answer = (fill(template, row, where) for template in ALPACA)
            return [*earlier, message("user", question), message("assistant", answer)]
    raise UserError(
        f"{where}: none of the known forms (messages; conversations; prompt and completion; instruction, input and "
        f"output; input_ids and labels); the columns are {columns_of(row)}, so set sft.prompt and sft.completion"
    )


def listed(value: Any) -> Any:
    """`value`, or the list of objects that it is as JSON text, as in a cell of a CSV file."""
    found = parsed(value)
    return found if isinstance(found, list) and found and all(isinstance(each, dict) for each in found) else value


def is_message(turn: Any) -> bool:
    return isinstance(turn, dict) and turn.get("role") is not None


def system_of(row: Row, where: str) -> Messages:
    """The column "system" as a message, where the row has one."""
    text = row.get("system")
    if text is None or text != text or is_blank(text):
        return []
    if not isinstance(text, str):
        raise UserError(f'{where}: the column "system" is a {type(text).__name__}; make it text, or leave it out')
    return [message("system", text)]


def history_of(row: Row, where: str) -> Messages:
    """Alpaca's column "history", pairs of a question and an answer, as messages."""
    pairs = parsed(row.get("history"))
    if not pairs or not isinstance(pairs, list):
        return []
    messages = []
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise UserError(f'{where}: an entry of "history" must be a question and an answer; correct it')
        messages += [message("user", pair[0]), message("assistant", pair[1])]
    return messages


# Messages


def checked(turn: Any, where: str) -> Message:
    """A message as chat templates take it: content as text, calls as `tool_calls`, nothing that is null.

    Keys that are not OpenAI's reach the template as they are. Raises UserError for what is no message of text.
    """
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
        raise UserError(f'{where}: its messages must have a "role" and a text as "content" each; correct it')
    found = {key: value for key, value in turn.items() if value is not None}
    found["role"] = ROLES.get(turn["role"], turn["role"])
    if call := found.pop("function_call", None):
        found["tool_calls"] = [{"type": "function", "function": call}]
    if "tool_calls" in found:
        found["tool_calls"] = [tool_call(call, where) for call in listed(found["tool_calls"])]
    if found.get("weight", 1) not in (0, 1):
        raise UserError(f"{where}: the weight {found['weight']!r} of a message must be 0 or 1; correct it")
    content = parsed(found["content"]) if isinstance(found.get("content"), list) else found.get("content")
    if content is None and found.get("tool_calls"):
        content = ""
    return {**found, "content": joined_parts(content, where)}


def joined_parts(content: Any, where: str) -> str | list[Any]:
    """A message's content as one text; where it has images, as it is. Raises UserError for a part that is none."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and image_places([{"content": content}]):
        return content
    if isinstance(content, list) and content:
        texts = [part.get("text") if isinstance(part, dict) else part for part in content]
        if all(isinstance(text, str) for text in texts):
            return "".join(map(str, texts))
        kind = next(
            part.get("type", "something") if isinstance(part, dict) else type(part).__name__
            for part, text in zip(content, texts, strict=True)
            if not isinstance(text, str)
        )
        raise UserError(f"{where}: a part of a message's content is no text but {kind}; leave such rows out")
    raise UserError(f'{where}: its messages must have a "role" and a text as "content" each; correct it')


def tool_call(call: Any, where: str) -> Message:
    """A call with its arguments as an object. Raises UserError where it has no name or other arguments."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(f'{where}: a tool call must have a "name" and "arguments"; correct it')
    arguments = parsed(function.get("arguments"))
    if arguments is None or arguments == "":
        arguments = {}
    if not isinstance(arguments, dict):
        raise UserError(f"{where}: the arguments of the call of {function['name']!r} are no JSON object; correct them")
    known = {"name": function["name"], "arguments": arguments}
    rest = {key: value for key, value in call.items() if key in ("id", "type") and value is not None}
    return {"type": "function", **rest, "function": known}


def share_gpt(turn: Any, where: str) -> Message:
    """A turn {"from", "value"} as a message."""
    kind = str(turn.get("from")).lower() if isinstance(turn, dict) else None
    role = SHARE_GPT.get(kind) if kind is not None else None
    if role is None:
        raise UserError(
            f'{where}: a turn must be {{"from": "human" or "gpt", "value": "..."}}; known are '
            f"{', '.join(SHARE_GPT)}, so correct it"
        )
    found = {"role": role, "content": turn.get("value")}
    if turn.get("weight") is not None:
        found["weight"] = turn["weight"]
    if kind == "function_call":
        calls = parsed(turn.get("value"))
        found |= {"content": "", "tool_calls": calls if isinstance(calls, list) else [calls]}
    return found


def tools_of(row: Row, where: str) -> list[Any] | None:
    """The column "tools", or OpenAI's older "functions", as chat templates take it: a list of schemas."""
    for column in ("tools", "functions"):
        schemas = parsed(row.get(column))
        if schemas is None or schemas != schemas or schemas in ("", []):
            continue
        if not isinstance(schemas, list) or not all(isinstance(schema, dict) for schema in schemas):
            raise UserError(f"{where}: the column {column!r} must be a list of JSON schemas of functions; correct it")
        return [schema if "function" in schema else {"type": "function", "function": schema} for schema in schemas]
    return None


# Templates over columns


def fill(template: str, row: Row, where: str) -> str:
    """`template` with the row's columns; a part in [[ ]] only where none of its columns is empty.

    Double brackets without a column in them are text.
    """

    def optional(part: re.Match[str]) -> str:
        columns = columns_in(part[1])
        if not columns:
            return part[0]
        return part[1] if all(is_there(row, name) for name in columns) else ""

    return filled(re.sub(r"\[\[(.*?)\]\]", optional, template, flags=re.DOTALL), row, where, "the template")


def columns_in(template: str) -> list[str]:
    """The columns that a template names. Braces that are none are left to `filled`."""
    try:
        return [name for _, name, _, _ in string.Formatter().parse(template) if name]
    except ValueError:
        return []


def is_there(row: Row, name: str) -> bool:
    """Whether the row has something in the column `name`: not null, NaN or blank text."""
    try:
        value = reach(row, name)
    except KeyError:
        if "[" not in name:
            return False
        try:
            value = string.Formatter().get_field(name, (), row)[0]
        except (LookupError, AttributeError, TypeError):
            return False
    return not is_blank(value) and not (value is None or value != value)


def check_optional_columns(settings: Sft, rows: Sequence[Row], kind: str) -> None:
    """Raise UserError for a column of an optional part that no row has, where a misspelt one would be left out in
    silence, and for optional parts that do not end or that lie within another."""
    for template in filter(None, (settings.prompt, settings.completion)):
        check_brackets(template)
        for part in re.findall(r"\[\[(.*?)\]\]", template, flags=re.DOTALL):
            for name in columns_in(part):
                if not any(has(row, name) for row in rows):
                    raise UserError(
                        f"no {kind}row has the column {name!r}, which the template asks for; the columns are "
                        f"{columns_of(rows[0])}"
                    )


def check_brackets(template: str) -> None:
    """Raise UserError where brackets with a column in them are no optional part, and would be shown as they are."""
    parts = re.findall(r"\[\[(.*?)\]\]", template, flags=re.DOTALL)
    if inner := next((part for part in parts if "[[" in part and columns_in(part)), None):
        raise UserError(f"the template has [[{inner[:60]}: an optional part within another; give each its own brackets")
    rest = re.sub(r"\[\[(.*?)\]\]", "", template, flags=re.DOTALL).partition("[[")[2]
    if columns_in(rest):
        raise UserError(f"the template has [[{rest[:60]}: an optional part without its end; add ]] to it")


def has(row: Mapping[str, Any], name: str) -> bool:
    """Whether the row has the column `name`, empty or not."""
    top = re.split(r"[.\[]", name, maxsplit=1)[0]
    return name in row or top in row


# Several rows


def joined(chats: Sequence[Chat], turns: int, seed: int) -> list[Chat]:
    """Conversations of `turns` rows each, drawn without replacement; a system prompt only where it comes first.

    The last one has fewer where the number of rows is not a multiple. Raises UserError where tools differ.
    """
    # Sorting by random() and not shuffle(): only the former's values are promised for later Pythons.
    generator = random.Random(f"{seed} turns")
    order = sorted(range(len(chats)), key=lambda _: generator.random())
    conversations = []
    for start in range(0, len(order), turns):
        first, *others = (chats[index] for index in order[start : start + turns])
        for other in others:
            if json.dumps(other.tools, sort_keys=True) != json.dumps(first.tools, sort_keys=True):
                raise UserError(
                    f"{other.where}: it has other tools than {first.where}, so that they cannot be one conversation; "
                    "set sft.conversation_extension = 1"
                )
        later = [turn for chat in others for turn in chat.messages if turn["role"] != "system"]
        where = " and ".join(chat.where for chat in (first, *others))
        images = tuple(image for chat in (first, *others) for image in chat.images)
        conversations.append(Chat([*first.messages, *later], first.tools, where, first.used, images))
    return conversations
