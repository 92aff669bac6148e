"""`length_penalty`: a soft punishment of completions near the length limit. Short ones are not rewarded."""

from __future__ import annotations

from typing import Any


class LengthPenalty:
    """Soft overlong punishment: DAPO (arXiv 2503.14476), equation 13.

    With L the completion's tokens: 0 while L <= max - cache; falls linearly to -1 at L = max; -1 beyond.

    Args:
        max_completion_length: max, in tokens; usually `rollout.max_completion_length`.
        soft_punish_cache: cache, in tokens: how long before the limit the punishment begins.

    Raises ValueError unless 0 < cache <= max.
    """

    def __init__(self, max_completion_length: int, soft_punish_cache: int) -> None:
        if not 0 < soft_punish_cache <= max_completion_length:
            raise ValueError(
                f"soft_punish_cache = {soft_punish_cache} must be above 0 and at most max_completion_length = "
                f"{max_completion_length}"
            )
        self.limit = max_completion_length
        self.cache = soft_punish_cache

    def __call__(self, completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [self.penalty(len(ids)) for ids in completion_ids]

    def penalty(self, length: int) -> float:
        """The punishment, -1 to 0, of a completion of `length` tokens."""
        return 0.0 - min(1.0, max(0, length - (self.limit - self.cache)) / self.cache)
