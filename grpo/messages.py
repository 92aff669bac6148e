"""Chat messages whose content has parts: text, and places where an image stands.

A message's content is a text, or a list of {"type": "text", "text": ...} and {"type": "image"}. The images themselves
are apart, in the order of their places, because a message goes into logs and templates and an image does not. The forms
that data sets have are TRL's columns `image` and `images`, image parts that hold their image (Qwen's, transformers' and
OpenAI's), and the mark `<image>` in a text. Reading an image is `grpo/images.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from grpo.errors import UserError

Message = dict[str, Any]

COLUMNS = ("image", "images")
"""A row's one image, or its list of them."""
MARK = "<image>"
"""What stands for an image in the texts of verl's, LLaVA's and others' data sets."""
TEXT_PARTS = ("text", "input_text")
IMAGE_PARTS = ("image", "image_url", "input_image")
HELD = ("image", "image_url", "bytes", "path", "url")
"""The keys under which an image part may hold its image."""


def content_text(content: Any) -> str:
    """The text of a message's content, without its images."""
    return "".join(content_texts(content))


def shown_text(content: Any) -> str:
    """What a message says, with a word in the place of each image, for people to read."""
    if not isinstance(content, list):
        return content_text(content)
    return "".join("[image]" if has_images([{"content": [part]}]) else content_text([part]) for part in content)


def content_texts(content: Any) -> list[str]:
    """The texts of a message's content: several where images stand between them."""
    if isinstance(content, list):
        texts = [part["text"] if isinstance(part, Mapping) and is_text(part) else part for part in content]
        return [text for text in texts if isinstance(text, str)]
    return [] if content is None else [str(content)]


def says_nothing(content: Any) -> bool:
    """Whether a message's content has neither a visible character nor an image."""
    texts = not isinstance(content, list) or all(isinstance(part, str) or is_text(part) for part in content)
    return texts and not content_text(content).strip()


def is_text(part: Mapping[str, Any]) -> bool:
    return part.get("type", "text") in TEXT_PARTS and isinstance(part.get("text"), str)


def image_places(messages: Sequence[Mapping[str, Any]]) -> int:
    """How many images the messages have a place for."""
    contents = [message["content"] for message in messages if isinstance(message.get("content"), list)]
    return sum(part.get("type") == "image" for content in contents for part in content)


def has_images(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a message has a part that is an image, in whatever form."""
    contents = [message["content"] for message in messages if isinstance(message.get("content"), list)]
    return any(isinstance(part, Mapping) and part.get("type") in IMAGE_PARTS for each in contents for part in each)


def in_parts(messages: Sequence[Message]) -> list[Message]:
    """The messages with every content as a list, which some chat templates of models that see images ask for."""
    return [
        {**each, "content": [{"type": "text", "text": each["content"]}]}
        if isinstance(each.get("content"), str)
        else each
        for each in messages
    ]


def column_images(row: Mapping[str, Any], where: str) -> list[Any]:
    """The images in the row's columns, as they are there. Raises UserError for both columns and for no list."""
    one, several = (row.get(name) for name in COLUMNS)
    if one is not None and several is not None:
        raise UserError(f'{where}: it has the columns "image" and "images"; leave one of them out')
    if several is not None and not isinstance(several, list | tuple):
        kind = type(several).__name__
        raise UserError(f'{where}: its column "images" is a {kind}; make it a list, or call a single one "image"')
    return [one] if one is not None else list(several or ())


def with_places(messages: Sequence[Any], beside: Sequence[Any], where: str) -> tuple[list[Any], list[Any]]:
    """`messages` with a place for every image, and the images in the order of their places.

    `beside`: those that the row has in columns. They go where image parts without an image or marks stand; where there
    are neither, before the text of the first user's message, as TRL puts them. Messages without an image have their
    content as text. Raises UserError for other parts than text and images, and where places and images do not match.
    """
    pairs = [without_images(each, where) for each in messages]
    made, found = [each for each, _ in pairs], [image for _, images in pairs for image in images]
    if beside and not found:
        made, found = placed(made, len(beside))
    empty = sum(image is None for image in found)
    if empty != len(beside):
        places = f"{empty} place{'' if empty == 1 else 's'} for one"
        raise UserError(
            f"{where}: it has {len(beside)} image{'' if len(beside) == 1 else 's'} beside its messages, and these "
            f'have {places}; give each image a part {{"type": "image"}}, or none of them'
        )
    rest = iter(beside)
    return made, [next(rest) if image is None else image for image in found]


def without_images(message: Any, where: str) -> tuple[Any, list[Any]]:
    """The message with its images taken out, and these; None for a place without one."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, list) or not content:
        return message, []
    parts: list[Message] = []
    images: list[Any] = []
    for part in content:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        if not isinstance(part, Mapping):
            raise UserError(f"{where}: a part of a message's content is a {type(part).__name__}; make it a dict")
        part = {key: value for key, value in part.items() if value is not None}
        if is_text(part):
            parts.append({"type": "text", "text": part["text"]})
        elif part.get("type") in IMAGE_PARTS:
            parts.append({"type": "image"})
            images.append(held_image(part))
        else:
            kind = part.get("type", "something else")
            raise UserError(
                f"{where}: a part of a message's content is no text or image but {kind}; leave such rows out"
            )
    return {**message, "content": parts if images else content_text(parts)}, images


def held_image(part: Mapping[str, Any]) -> Any:
    """The image that an image part holds; None for one without."""
    if isinstance(encoded := part.get("base64"), str):
        return f"data:image;base64,{encoded}"
    value = next((part[key] for key in HELD if key in part), None)
    return value["url"] if isinstance(value, Mapping) and "url" in value else value


def placed(messages: list[Any], count: int) -> tuple[list[Any], list[Any]]:
    """The messages with places at their marks; without any mark, `count` before the first user's text."""
    asked = [index for index, each in enumerate(messages) if is_user_text(each)]
    if marks := sum(messages[index]["content"].count(MARK) for index in asked):
        return [at_marks(each) if index in asked else each for index, each in enumerate(messages)], [None] * marks
    if not asked:
        return messages, []
    first = messages[asked[0]]
    parts = [*({"type": "image"} for _ in range(count)), {"type": "text", "text": first["content"]}]
    made = {**first, "content": parts}
    return [made if index == asked[0] else each for index, each in enumerate(messages)], [None] * count


def is_user_text(message: Any) -> bool:
    return isinstance(message, Mapping) and message.get("role") == "user" and isinstance(message.get("content"), str)


def at_marks(message: Message) -> Message:
    """The message with a place at each mark in its text."""
    if MARK not in message["content"]:
        return message
    parts: list[Message] = []
    for index, text in enumerate(message["content"].split(MARK)):
        parts += [{"type": "image"}] if index else []
        parts += [{"type": "text", "text": text}] if text else []
    return {**message, "content": parts}
