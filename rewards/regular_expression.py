"""`regular_expression`: a score for text that matches a pattern of your own."""

from __future__ import annotations

import re
from typing import Any, Literal

from grpo.rewards.extract import completion_text


class RegularExpression:
    r"""`score` where the pattern matches the completion's text, else 0.0.

    Args:
        pattern: as Python's `re` takes it. Flags go into it: `(?s)` lets the dot take line breaks, `(?i)` ignores case.
        how: "search" anywhere, "match" from the start, "fullmatch" the whole text.
        score: what a match is worth; negative to punish it.

    Raises ValueError for a pattern that does not compile or an unknown `how`.
    """

    def __init__(
        self, pattern: str, how: Literal["search", "match", "fullmatch"] = "search", score: float = 1.0
    ) -> None:
        if how not in ("search", "match", "fullmatch"):
            raise ValueError(f'how = {how!r} must be "search", "match" or "fullmatch"')
        try:
            self.matches = getattr(re.compile(pattern), how)
        except re.error as error:
            raise ValueError(f"pattern = {pattern!r} is not a regular expression: {error}") from None
        self.score = float(score)

    def __call__(self, completions: list, **kwargs: Any) -> list[float]:
        return [self.score if self.matches(completion_text(completion)) else 0.0 for completion in completions]
