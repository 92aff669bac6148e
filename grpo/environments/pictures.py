"""Images on the link between an episode's process and the trainer, where a message is JSON.

A program has images as PIL's in its row and puts such, bytes, paths or data URIs into its messages. Each goes over the
link once in an episode, as a PNG or its file's bytes, and is known by a key from then on. The trainer reads what comes
with the checks of every image (`grpo/images.py`): it may be anything. PIL is imported where there is an image alone.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo.images import Image
from grpo.messages import IMAGE_PARTS, held_image

Message = dict[str, Any]
SENT = "image of the row"
"""The key of an object that stands for an image in the JSON of a row."""


AS_PNG = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
"""PIL's modes that a PNG keeps as they are."""


class Unreadable(Exception):
    """Why a message's image cannot be sent or used, in a clause."""


# The trainer's side


def sent_row(row: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Image]]:
    """`row` as JSON with its images in their places, and these by their keys."""
    known: dict[str, Image] = {}

    def sent(value: Any) -> Any:
        if isinstance(value, Image):
            known[value.digest] = value
            return {SENT: base64.b64encode(value.data).decode()}
        if isinstance(value, Mapping):
            return {key: sent(each) for key, each in value.items()}
        return [sent(each) for each in value] if isinstance(value, list | tuple) else value

    return {name: sent(value) for name, value in row.items()}, known


def shown_prompt(messages: Sequence[Message], images: Sequence[Image]) -> list[Message]:
    """A prompt's `messages` with its `images` in the parts that are their places."""
    left = iter(images)
    return [
        {**each, "content": [{**part, "image": next(left)} if part["type"] == "image" else part for part in content]}
        if isinstance(content := each.get("content"), list)
        else each
        for each in messages
    ]


def with_images(messages: Sequence[Message], images: Iterable[Image]) -> list[Message]:
    """`messages` of an episode with its `images` in the parts that have their digests."""
    known = {image.digest: image for image in images}
    shown = [known[part["digest"]] for each in messages for part in parts_of(each) if part["type"] == "image"]
    return shown_prompt(messages, shown)


def parts_of(message: Message) -> list[Message]:
    """The parts of a message whose content is no text."""
    content = message.get("content")
    return content if isinstance(content, list) else []


def read_messages(
    messages: Sequence[Message], known: dict[str, Image], read: Callable[[Any], Image]
) -> tuple[list[Message], list[Image]]:
    """The conversation of an episode with a digest in each image's part, and the images in their order.

    `known` grows by those that came with it; `read` makes an image of a data URI, and may raise. Raises Unreadable for
    a part that is neither text nor an image that came before or comes now.
    """
    found: list[Image] = []

    def part_of(part: Any) -> Message:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        if isinstance(part, Mapping) and part.get("type") in IMAGE_PARTS:
            image = image_of(part, known, read)
            found.append(image)
            return {"type": "image", "digest": image.digest}
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise Unreadable(f"has a message with a part that is no text or image but {kind!r}; leave it out")
        return {"type": "text", "text": part["text"]}

    made = []
    for message in messages:
        if isinstance(content := message.get("content"), list):
            parts = [part_of(part) for part in content]
            seen = any(part["type"] == "image" for part in parts)
            message = {**message, "content": parts if seen else "".join(part["text"] for part in parts)}
        made.append(message)
    return made, found


def image_of(part: Mapping[str, Any], known: dict[str, Image], read: Callable[[Any], Image]) -> Image:
    """The image of a part that `sent_messages` made. Raises Unreadable."""
    key, value = part.get("key"), part.get("image")
    if not isinstance(key, str) or not (key in known or isinstance(value, str) and value.startswith("data:")):
        raise Unreadable("has an image in a message that was not sent; give it as a PIL image, bytes or a data URI")
    if key not in known:
        known[key] = read(value)
    return known[key]


# The episode's side


def received_row(row: Any, known: set[str]) -> Any:
    """`row` with PIL images where it was sent some, whose keys `known` gets; a file's bytes where PIL is missing."""
    if isinstance(row, list):
        return [received_row(each, known) for each in row]
    if not isinstance(row, dict):
        return row
    if row.keys() == {SENT}:
        return received_image(base64.b64decode(row[SENT]), known)
    return {name: received_row(value, known) for name, value in row.items()}


def received_image(data: bytes, known: set[str]) -> Any:
    try:
        from PIL import Image as pil
    except ModuleNotFoundError:
        return data
    picture = pil.open(io.BytesIO(data))
    known.add(digest(picture))
    return picture


def digest(picture: Any) -> str:
    """A PIL image's key, of all that it shows: of a plain one in RGB what `grpo.images.Image` calls its digest."""
    width, height = picture.size
    mode = "" if picture.mode == "RGB" else picture.mode
    key = hashlib.sha256(f"{mode}{width}x{height} ".encode() + picture.tobytes())
    colours, clear = picture.getpalette(None), picture.info.get("transparency")
    if colours is not None or clear is not None:
        key.update(repr((colours, clear)).encode())
    return key.hexdigest()


def sent_messages(messages: Sequence[Any], known: set[str]) -> list[Any]:
    """`messages` as JSON: every image as its key, and with its file where `known` has not that; `known` grows.

    Raises Unreadable for what is no image.
    """
    return [
        {**message, "content": [sent_part(part, known) for part in message["content"]]}
        if isinstance(message, Mapping) and isinstance(message.get("content"), list | tuple)
        else message
        for message in messages
    ]


def sent_part(part: Any, known: set[str]) -> Any:
    if not isinstance(part, Mapping) or part.get("type") not in IMAGE_PARTS:
        return part
    key, uri = packed(held_image(part))
    new = {} if key in known else {"image": uri()}
    known.add(key)
    return {"type": "image", "key": key, **new}


def packed(value: Any) -> tuple[str, Callable[[], str]]:
    """The key of an image, and what makes it a data URI. Raises Unreadable for what is none."""
    if isinstance(value, str) and value.startswith("data:"):
        uri = value
        return hashlib.sha256(uri.encode()).hexdigest(), lambda: uri
    if isinstance(value, str) and "://" in value[:40]:
        raise Unreadable("has a message with an image at a URL, and nothing is downloaded; give the image itself")
    if isinstance(value, str | Path):
        try:
            value = Path(value).expanduser().read_bytes()
        except (OSError, ValueError) as error:
            raise Unreadable(f"has a message with an image in a file that cannot be read ({error})") from None
    if isinstance(value, bytes | bytearray):
        data = bytes(value)
        return hashlib.sha256(data).hexdigest(), lambda: as_uri(data)
    if hasattr(value, "tobytes") and hasattr(value, "save") and hasattr(value, "mode"):
        from PIL import ImageOps

        if value.mode == "F" or value.mode.startswith("I") and value.mode not in AS_PNG:
            raise Unreadable(f"has a message with an image of PIL's mode {value.mode}, of no clear range; give 8 bits")
        picture = ImageOps.exif_transpose(value)
        return digest(picture), lambda: as_uri(png(picture))
    raise Unreadable(
        f"has a message with an image of the type {type(value).__name__}; give a PIL image, bytes, a path or a data URI"
    )


def png(picture: Any) -> bytes:
    """A PIL image as a file."""
    form = picture.mode if picture.mode in AS_PNG else "RGBA" if picture.has_transparency_data else "RGB"
    shown = picture if form == picture.mode else picture.convert(form)
    file = io.BytesIO()
    shown.save(file, "PNG", compress_level=1)
    return file.getvalue()


def as_uri(data: bytes) -> str:
    return "data:image;base64," + base64.b64encode(data).decode()
