"""Between people and token ids: prompts and chats in, text out, piece by piece if wanted.

For the Python API and `grpo.generate`. Training never comes here: its prompts are made once, in `data.py`, and its
completions stay token ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from grpo.errors import UserError
from grpo.tasks.cells import checked_prompt
from grpo.tokenizing import Messages, tokenize

Prompts = str | Messages | Sequence[str | Messages]
"""A text, a chat (a list of messages), or a list of these."""


def as_batch(prompts: Any) -> tuple[list[str | Messages], bool]:
    """`prompts` as a list, and whether it was a single one. Raises UserError for what is neither text nor chat."""
    single = isinstance(prompts, str) or (
        isinstance(prompts, Sequence) and len(prompts) > 0 and isinstance(prompts[0], Mapping)
    )
    batch = [prompts] if single else prompts
    if not isinstance(batch, Sequence) or not batch:
        raise UserError("nothing to generate from; pass a text, a list of messages, or a list of these")
    labels = ["the prompt"] if single else [f"prompt {number}" for number in range(1, len(batch) + 1)]
    return [checked_prompt(one, where) for one, where in zip(batch, labels, strict=True)], single


def token_ids(prompts: Sequence[str | Messages], tokenizer: Any, chat_template_kwargs: Mapping[str, Any]) -> list[Any]:
    """The token ids of each prompt: a text as it stands, a chat through the chat template."""
    return tokenize(prompts, tokenizer, chat_template_kwargs, "the input")


def pieces(tokens: Iterable[Sequence[int]], decode: Callable[[list[int]], str]) -> Iterator[str]:
    """The text of `tokens`, which come a few at a time, in pieces that together are the whole text.

    A piece is held back while it ends within a character: several tokens can make up one. Only the last tokens are
    decoded again, together with those before them, because a token's text depends on what it follows.
    """
    ids: list[int] = []
    start = end = 0  # ids[:end] are shown; from `start` on they are decoded again
    for new in tokens:
        ids += new
        shown, now = decode(ids[start:end]), decode(ids[start:])
        if len(now) > len(shown) and not now.endswith("\ufffd"):
            yield now[len(shown) :]
            start, end = end, len(ids)
    if rest := decode(ids[start:])[len(decode(ids[start:end])) :]:
        yield rest
