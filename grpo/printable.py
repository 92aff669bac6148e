"""Untrusted text, made safe to show on a terminal."""

from __future__ import annotations

import re

# C0 but for tab and newline, DEL and C1 move the cursor or start a terminal command; the bidirectional controls reorder
# what is shown; lone surrogates cannot be encoded.
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """`text` with characters that a terminal would act upon as `\\x1b`-like escapes; tabs and newlines stay."""
    return UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
