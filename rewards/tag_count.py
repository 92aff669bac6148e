"""`tag_count`: the share of tags that occur exactly once, for any set of tags. Order and content are not looked at."""

from __future__ import annotations

from typing import Any

from grpo.rewards.extract import completion_text


def tag_count(completions: list, tags: list[str] | None = None, **kwargs: Any) -> list[float]:
    """The share, 0 to 1, of the opening and closing tags of `tags` that occur exactly once in the text.

    `tags` are names without brackets; default: `reasoning` and `answer`.
    """
    marks = [mark for tag in tags or ["reasoning", "answer"] for mark in (f"<{tag}>", f"</{tag}>")]
    texts = [completion_text(completion) for completion in completions]
    return [sum(text.count(mark) == 1 for mark in marks) / len(marks) for text in texts]
