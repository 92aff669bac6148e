"""`repetition_penalty`: a punishment for repeating the same run of tokens. Paraphrase is not seen."""

from __future__ import annotations

from typing import Any


class RepetitionPenalty:
    """Share of n-grams that repeat an earlier one, times `max_penalty`: arXiv 2502.03373, appendix C.2.

    n-grams are taken over the completion's token ids. 0.0 without repetition, and for fewer than `ngram_size` tokens.

    Args:
        ngram_size: tokens in an n-gram.
        max_penalty: the limit for a completion that only repeats itself; not above 0.

    Raises ValueError for an `ngram_size` below 1 or a `max_penalty` above 0.
    """

    def __init__(self, ngram_size: int = 3, max_penalty: float = -1.0) -> None:
        if ngram_size < 1 or max_penalty > 0:
            raise ValueError(f"ngram_size = {ngram_size} must be at least 1 and max_penalty = {max_penalty} at most 0")
        self.ngram_size = ngram_size
        self.max_penalty = max_penalty

    def __call__(self, completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        return [0.0 + self.repeated_share(ids) * self.max_penalty for ids in completion_ids]

    def repeated_share(self, ids: list[int]) -> float:
        """The share, 0 to below 1, of the n-grams of `ids` that occurred before."""
        count = len(ids) - self.ngram_size + 1
        if count < 1:
            return 0.0
        different = {tuple(ids[start : start + self.ngram_size]) for start in range(count)}
        return 1 - len(different) / count
