"""`integer`: 0.5 for an answer made of digits, right or wrong."""

from __future__ import annotations

from typing import Any

from grpo.rewards.extract import completion_text, xml_answer


def integer(completions: list, **kwargs: Any) -> list[float]:
    """0.5 where the text of the last `<answer>` (without a tag, the whole text), stripped, satisfies `str.isdigit`;
    else 0.0. A sign, a comma, a decimal point or a unit make it 0.0.
    """
    return [0.5 if xml_answer(completion_text(completion)).isdigit() else 0.0 for completion in completions]
