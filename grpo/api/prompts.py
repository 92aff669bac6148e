"""Between people and token ids: prompts, chats and images in, text out, piece by piece if wanted.

For the Python API and `grpo.generate`. Training never comes here: its prompts are made once, in `data.py`, and its
completions stay token ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from grpo.errors import UserError
from grpo.images import MAX_PIXELS, Image, read_image
from grpo.messages import with_places
from grpo.tasks.cells import checked_prompt
from grpo.tokenizing import ImageTokens, Messages, tokenize

Prompts = str | Messages | Sequence[str | Messages]
"""A text, a chat (a list of messages), or a list of these."""


@dataclass(frozen=True)
class Asked:
    """A prompt with the images that its messages have places for."""

    prompt: str | Messages
    images: tuple[Image, ...] = ()
    where: str = "the prompt"


def as_batch(prompts: Any, images: Any = None, max_pixels: int = MAX_PIXELS) -> tuple[list[Asked], bool]:
    """`prompts` as a list, and whether it was a single one.

    `images`: an image, or a list of them, beside a single chat; those of several are in their messages. Raises
    UserError for what is neither text nor chat, and for images that cannot be used.
    """
    single = isinstance(prompts, str) or (
        isinstance(prompts, Sequence) and len(prompts) > 0 and isinstance(prompts[0], Mapping)
    )
    batch = [prompts] if single else prompts
    if not isinstance(batch, Sequence) or not batch:
        raise UserError("nothing to generate from; pass a text, a list of messages, or a list of these")
    beside = [] if images is None else list(images) if isinstance(images, list | tuple) else [images]
    if beside and (not single or isinstance(prompts, str)):
        raise UserError(
            'images= goes with one chat, [{"role": "user", "content": "..."}]; in several, give each its own as parts '
            '{"type": "image", "image": ...}'
        )
    labels = ["the prompt"] if single else [f"prompt {number}" for number in range(1, len(batch) + 1)]
    return [asked(one, beside, where, max_pixels) for one, where in zip(batch, labels, strict=True)], single


def asked(prompt: Any, beside: Sequence[Any], where: str, max_pixels: int) -> Asked:
    """One prompt. Raises UserError, which begins with `where`."""
    prompt = checked_prompt(prompt, where)
    if isinstance(prompt, str):
        return Asked(prompt, (), where)
    messages, found = with_places(prompt, beside, where)
    return Asked(messages, tuple(read_image(value, where, max_pixels=max_pixels) for value in found), where)


def token_ids(
    batch: Sequence[Asked],
    tokenizer: Any,
    chat_template_kwargs: Mapping[str, Any],
    image_tokens: ImageTokens | None = None,
) -> list[list[int]]:
    """The token ids of each prompt: a text as it stands, a chat through the chat template."""
    return tokenize(
        [one.prompt for one in batch],
        tokenizer,
        chat_template_kwargs,
        "the input",
        images=[one.images for one in batch],
        where=[one.where for one in batch],
        image_tokens=image_tokens,
    )


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
