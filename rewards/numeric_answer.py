r"""`numeric_answer`: 1.0 for the right number, however it is written ("$1,234.50" is "1234.5").

What counts as the answer is `extract.final_number`: the last number of the last `<answer>`, `\boxed`, or `####` line,
else of the text. Expressions with letters, roots or units are for `math_verify`.
"""

from __future__ import annotations

from typing import Any

from grpo.rewards.extract import completion_text, final_number, last_number, same_number


def numeric_answer(
    completions: list, answer: list[Any], tolerance: float = 1e-6, relative_tolerance: float = 0.0, **kwargs: Any
) -> list[float | None]:
    """1.0 where the completion's number is within the tolerance of the one in the column `answer`; else 0.0.

    Args:
        tolerance: largest difference, in the answer's units.
        relative_tolerance: largest difference as a share of the gold number; the wider of the two counts.

    None where the gold answer holds no number.
    """
    scores: list[float | None] = []
    for completion, gold_text in zip(completions, answer, strict=True):
        gold = last_number(str(gold_text))
        if gold is None:
            scores.append(None)
            continue
        number = final_number(completion_text(completion))
        scores.append(1.0 if same_number(number, gold, tolerance, relative_tolerance) else 0.0)
    return scores
