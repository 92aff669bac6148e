"""Programs for the tests that show images between turns: good ones, and one for every way in which one can go wrong."""

from __future__ import annotations

import asyncio
import random
from typing import Any

from PIL import Image as pil


def drawn(seed: int, side: int = 32) -> pil.Image:
    generator = random.Random(seed)
    return pil.frombytes("RGB", (side, side), generator.randbytes(3 * side * side))


def shown(image: Any, text: str = "And this?") -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}


async def shows(row: dict, sample: Any, delay: float = 0.0) -> float:
    """Two pictures more, of which the second depends on what was said; rewarded by letters."""
    messages, found, total = list(row["prompt"]), 0, 0
    for number in range(3):
        turn = await sample(messages)
        total += max(len(turn.text), 1)
        found += sum(character.isalpha() for character in turn.text)
        await asyncio.sleep(random.SystemRandom().random() * delay)
        messages = [*messages, turn.message, shown(drawn(number if number == 0 else len(turn.text)))]
    return found / total


async def forgets(row: dict, sample: Any) -> float:
    await sample([shown(drawn(1))])
    return len((await sample([shown(drawn(2))])).text) / 10


async def shows_once(row: dict, sample: Any, image: Any, text: str = "And this?") -> float:
    turn = await sample(row["prompt"])
    await sample([*row["prompt"], turn.message, shown(image, text)])
    return 1.0


async def no_image(row: dict, sample: Any) -> float:
    return await shows_once(row, sample, b"no image")


async def at_a_url(row: dict, sample: Any) -> float:
    return await shows_once(row, sample, "https://example.org/a.png")


async def of_a_number(row: dict, sample: Any) -> float:
    return await shows_once(row, sample, 3)


async def too_large(row: dict, sample: Any) -> float:
    return await shows_once(row, sample, drawn(1, 64))


async def writes_a_placeholder(row: dict, sample: Any) -> float:
    turn = await sample(row["prompt"])
    await sample([*row["prompt"], turn.message, {"role": "user", "content": "<|image_pad|>"}])
    return 1.0


async def no_part(row: dict, sample: Any) -> float:
    turn = await sample(row["prompt"])
    await sample([*row["prompt"], turn.message, {"role": "user", "content": [{"type": "audio", "audio": "x"}]}])
    return 1.0


async def asks_for_a_placeholder(row: dict, sample: Any) -> float:
    """As an agent does that asks with token ids."""
    turn = sample.now(row["prompt"])
    sample.now([], prompt_ids=[*turn.prompt_ids, *turn.completion_ids, 49153, 49152])
    return 1.0


def look(at: int) -> list:
    """Look at a place.

    Args:
        at: which place
    """
    return [{"type": "image", "image": drawn(at)}, {"type": "text", "text": "so"}]


class Room:
    """An environment in TRL's form that opens with a picture."""

    def reset(self, prompt: Any, answer: int) -> list:
        return [{"type": "image", "image": drawn(answer)}, {"type": "text", "text": f"{answer} doors"}]

    def look(self, at: int) -> list:
        """Look at a place.

        Args:
            at: which place
        """
        return [{"type": "image", "image": drawn(at)}]

    def get_reward(self) -> float:
        return 1.0
