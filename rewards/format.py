r"""`strict_format` and `soft_format`: 0.5 for `<reasoning>` followed by `<answer>`.

Both match from the start of the text, and without `re.DOTALL`: the dot takes no line break, so reasoning or an
answer of several lines scores 0.0. That is how the reference run on GSM8K scores and therefore the default;
`options = { multiline = true }` admits several lines. Partial credit is left to `xml_count` and `tag_count`.
"""

from __future__ import annotations

import re
from typing import Any

from grpo.rewards.extract import completion_text

STRICT = r"^<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\n$"
SOFT = r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>"


def strict_format(completions: list, multiline: bool = False, **kwargs: Any) -> list[float]:
    """0.5 where the whole text is the two blocks, each tag on a line of its own, with a final line break; else 0.0.

    One line of reasoning and one of answer, unless `multiline`: then any number of each.
    """
    return _matches(STRICT, completions, multiline)


def soft_format(completions: list, multiline: bool = False, **kwargs: Any) -> list[float]:
    """0.5 where the text starts with the two blocks, with any or no white space between them; else 0.0.

    A line break inside a block makes it 0.0, unless `multiline`.
    """
    return _matches(SOFT, completions, multiline)


def _matches(pattern: str, completions: list, multiline: bool) -> list[float]:
    flags = re.DOTALL if multiline else 0
    return [0.5 if re.match(pattern, completion_text(completion), flags) else 0.0 for completion in completions]
