"""Messages between the trainer and an environment's process: JSON, each with its length in 8 bytes before it.

What comes out of an environment's process may be anything, so it is never unpickled and its length is limited. Tokens
and logprobs go in to it as bytes in base64, which takes a tenth of the time that their digits do.
"""

from __future__ import annotations

import base64
import json
import socket
from array import array
from collections.abc import Sequence
from typing import Any

HEADER = 8
LARGEST = 64 << 20
"""Bytes of the longest message that is read."""


NUMBERS = {"prompt_ids": "i", "completion_ids": "i", "logprobs": "d"}
"""What of a turn is numbers, and how `array` calls them."""


class Garbage(Exception):
    """What came is no message."""


def packed(message: dict[str, Any]) -> bytes:
    """`message` as it goes over a link; halves of characters, which no tokenizer takes, become question marks."""
    body = json.dumps(message, ensure_ascii=False).encode(errors="replace")
    return len(body).to_bytes(HEADER, "big") + body


def as_text(name: str, numbers: Sequence[float]) -> str:
    """`numbers` of a turn as they go over a link."""
    return base64.b64encode(array(NUMBERS[name], numbers)).decode()


def with_numbers(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn as it came over a link, with its numbers as lists."""
    return turn | {
        name: array(kind, base64.b64decode(turn[name])).tolist()
        for name, kind in NUMBERS.items()
        if isinstance(turn[name], str)
    }


def send(link: socket.socket, message: dict[str, Any]) -> None:
    """Send one message. Raises OSError where the other side is gone."""
    link.sendall(packed(message))


def receive(link: socket.socket) -> dict[str, Any] | None:
    """The next message, or None where the other side is gone."""
    header = _exactly(link, HEADER)
    body = None if header is None else _exactly(link, int.from_bytes(header, "big"))
    return None if body is None else json.loads(body)


def _exactly(link: socket.socket, size: int) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        piece = link.recv(min(size - len(data), 1 << 20))
        if not piece:
            return None
        data += piece
    return bytes(data)


class Inbox:
    """Messages out of pieces of bytes, as a link that does not block gives them."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, piece: bytes) -> list[dict[str, Any]]:
        """The messages that `piece` completes. Raises Garbage for what is none."""
        self._data += piece
        messages = []
        while len(self._data) >= HEADER:
            size = int.from_bytes(self._data[:HEADER], "big")
            if size > LARGEST:
                raise Garbage(f"a message of {size} bytes")
            if len(self._data) < HEADER + size:
                break
            messages.append(_parsed(bytes(self._data[HEADER : HEADER + size])))
            del self._data[: HEADER + size]
        return messages


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        message = json.loads(body)
    except (ValueError, RecursionError):
        raise Garbage("bytes that are no JSON") from None
    if not isinstance(message, dict):
        raise Garbage(f"a {type(message).__name__}")
    return message
