"""`math_verify`: 1.0 for a mathematically equal answer, by the math-verify package (LaTeX, fractions, sets, ...).

An optional install. Its timeouts use `signal.alarm`, which works here because a reward has the main thread of its own
process.
"""

from __future__ import annotations

import re
from typing import Any

from grpo.errors import UserError
from grpo.rewards.extract import completion_text, xml_answer
from grpo.rewards.notation import without_emphasis

try:
    from math_verify import parse, verify
except ImportError as error:
    raise UserError(
        f'the reward "math_verify" needs the math-verify package ({error}); run pip install math-verify, or use '
        '"numeric_answer" for plain numbers'
    ) from None

PROSE_OR_MARKED = re.compile(r"(?<!\\)\b[A-Za-z]{3,}|\$|\\boxed|\\\[|\\\(")


def math_verify(
    completions: list, answer: list[Any], parsing_timeout: int = 5, timeout_seconds: int = 5, **kwargs: Any
) -> list[float | None]:
    """1.0 where the completion's answer equals the gold one in the column `answer`; else 0.0.

    The text of the last `<answer>` is parsed, without a tag the whole text. None where the gold answer cannot be
    parsed. Both timeouts are math-verify's, in whole seconds per completion.
    """
    scores: list[float | None] = []
    for completion, gold_text in zip(completions, answer, strict=True):
        gold = parse(as_math(str(gold_text)), parsing_timeout=parsing_timeout)
        if not gold:
            scores.append(None)
            continue
        answer_parsed = parse(as_math(xml_answer(completion_text(completion))), parsing_timeout=parsing_timeout)
        scores.append(float(verify(gold, answer_parsed, timeout_seconds=timeout_seconds)))
    return scores


def as_math(text: str) -> str:
    """`text` without Markdown's emphasis, between dollar signs if it is a bare formula: math-verify reads only numbers
    outside of them."""
    text = without_emphasis(text)
    return text if PROSE_OR_MARKED.search(text) else f"${text}$"
