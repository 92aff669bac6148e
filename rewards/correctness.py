"""`correctness`: 2.0 for exactly the gold answer. For numbers written differently see `numeric_answer`."""

from __future__ import annotations

from typing import Any

from grpo.rewards.extract import completion_text, xml_answer


def correctness(completions: list, answer: list[Any], **kwargs: Any) -> list[float | None]:
    """2.0 where the text of the last `<answer>` (without a tag, the whole text), stripped, equals the gold string
    in the column `answer`; else 0.0. Commas count: "1000" is not "1,000". None where the gold answer is None.
    """
    return [
        None if gold is None else 2.0 if xml_answer(completion_text(completion)) == str(gold) else 0.0
        for completion, gold in zip(completions, answer, strict=True)
    ]
