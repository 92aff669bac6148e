r"""`numeric_answer`: 1.0 for the right number, however it is written ("$1,234.50" is "1234.5").

What counts as the answer is `extract.final_number`: the number that the last `<answer>`, `\boxed` or `####` line
states, else the last one of the text. Expressions, lists and numerals in other bases are for `math_verify`.
"""

from __future__ import annotations

from typing import Any

from grpo.rewards.extract import completion_text, final_number, marked_answer, same_number
from grpo.rewards.number import gold_number


def numeric_answer(
    completions: list, answer: list[Any], tolerance: float = 1e-6, relative_tolerance: float = 0.0, **kwargs: Any
) -> list[float | None]:
    """1.0 where the completion's number is within the tolerance of the one in the column `answer`; else 0.0.

    Args:
        tolerance: largest difference, in the answer's units.
        relative_tolerance: largest difference as a share of the gold number; the wider of the two counts.

    None where the gold answer is not a number, as an expression or a list is not.
    """
    scores: list[float | None] = []
    for completion, gold_text in zip(completions, answer, strict=True):
        marked = marked_answer(str(gold_text))
        gold = gold_number(str(gold_text) if marked is None else marked)
        if gold is None:
            scores.append(None)
            continue
        number = final_number(completion_text(completion))
        scores.append(1.0 if same_number(number, gold, tolerance, relative_tolerance) else 0.0)
    return scores
