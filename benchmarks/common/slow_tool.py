"""An environment whose answers take a given time; it knows nothing of the trainer, as it runs in its own process."""

from __future__ import annotations

import asyncio
from typing import Any

PROMPT = [{"role": "user", "content": "Tell me something, and go on when I ask you to."}]


async def play(row: dict[str, Any], sample: Any) -> float:
    """A turn of each of the row's lengths, with its delay between them."""
    messages = list(row["prompt"])
    for number, length in enumerate(row["lengths"]):
        if number:
            await asyncio.sleep(row["delay"])
        turn = await sample(messages, max_tokens=length)
        messages = [*messages, turn.message, {"role": "user", "content": "Go on."}]
    return 0.0
