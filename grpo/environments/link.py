"""Messages between the trainer and an environment's process: JSON, each with its length in 8 bytes before it.

What comes out of an environment's process may be anything, so it is never unpickled and its length is limited.
"""

from __future__ import annotations

import json
import socket
from typing import Any

HEADER = 8
LARGEST = 64 << 20
"""Bytes of the longest message that is read."""


class Garbage(Exception):
    """What came is no message."""


def packed(message: dict[str, Any]) -> bytes:
    """`message` as it goes over a link; halves of characters, which no tokenizer takes, become question marks."""
    body = json.dumps(message, ensure_ascii=False).encode(errors="replace")
    return len(body).to_bytes(HEADER, "big") + body


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
