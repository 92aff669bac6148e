r"""`xml_count`: partial credit for each of the four tags, less a little for text after the answer.

It gives a gradient where `strict_format` is still zero. Whether the blocks hold anything is not looked at.
"""

from __future__ import annotations

from typing import Any

from grpo.rewards.extract import completion_text

TAG = 0.125
PER_TRAILING_CHARACTER = 0.001


def xml_count(completions: list, **kwargs: Any) -> list[float]:
    """At most 0.5, and below 0 for long trailing text: see `count_xml`."""
    return [count_xml(completion_text(completion)) for completion in completions]


def count_xml(text: str) -> float:
    r"""0.125 for each of `<reasoning>\n`, `\n</reasoning>\n`, `\n<answer>\n`, `\n</answer>` that occurs exactly once.

    The third then loses 0.001 per character after the last `\n</answer>\n` (of the whole text, where there is none);
    the fourth loses 0.001 per character after the last `\n</answer>`, one line break allowed.
    """
    score = 0.0
    if text.count("<reasoning>\n") == 1:
        score += TAG
    if text.count("\n</reasoning>\n") == 1:
        score += TAG
    if text.count("\n<answer>\n") == 1:
        score += TAG
        score -= len(text.rpartition("\n</answer>\n")[2]) * PER_TRAILING_CHARACTER
    if text.count("\n</answer>") == 1:
        score += TAG
        score -= (len(text.rpartition("\n</answer>")[2]) - 1) * PER_TRAILING_CHARACTER
    return score
