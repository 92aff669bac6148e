"""Tools and a reward as users of TRL write them: nothing here knows this project."""

from __future__ import annotations

from typing import Any


def add(a: int, b: int) -> int:
    """
    Adds two numbers.

    Args:
        a: The first number.
        b: The second number.

    Returns:
        The sum.
    """
    return a + b


def right(completions: list[Any], answer: list[str], **kwargs: Any) -> list[float]:
    """1 where the last message has the answer, and a little for short ones."""
    texts = [completion[-1]["content"] for completion in completions]
    return [float(gold in text) + 0.001 * (len(text) % 7) for text, gold in zip(texts, answer, strict=True)]


ROWS = [{"prompt": [{"role": "user", "content": f"What is {a} + 3?"}], "answer": str(a + 3)} for a in (2, 4)]
