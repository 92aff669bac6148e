"""From prompts to token ids: plain text with the tokenizer's special tokens, messages through the chat template.

A model that sees images has a prompt's images in its token ids, each as many times as it takes tokens. Rows, their
columns and their limits are `grpo/data.py`'s; how many tokens an image takes is the model's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from grpo.errors import UserError
from grpo.images import Image
from grpo.messages import in_parts
from grpo.references import described
from grpo.special_tokens import encode_texts, warn_of_rendered_chats

Messages = list[dict[str, Any]]


class ImageTokens(Protocol):
    """How a model that sees images has them in its tokens; see `grpo/model/image_tokens.py`."""

    def encode(self, text: str, images: Sequence[Image], tokenizer: Any) -> Sequence[int]:
        """The tokens of a rendered chat, each image's as many as it takes. Raises UserError, which names no place,
        where places and images do not match."""


def tokenize(
    prompts: Sequence[str | Messages],
    tokenizer: Any,
    chat_template_kwargs: Mapping[str, Any],
    whose: str,
    given: Sequence[list[int] | None] = (),
    *,
    images: Sequence[Sequence[Image]] = (),
    where: Sequence[str] = (),
    image_tokens: ImageTokens | None = None,
) -> list[list[int]]:
    """Token ids of each prompt: text with the tokenizer's special tokens, messages through the chat template.

    A text with images is a rendered chat, which has the special tokens already.
    `given`: those that are known already. A text that begins with those tokens already does not get them twice.
    Messages that end with an assistant's are continued; others get the template's opening of an answer. `images`: each
    prompt's, in the order of their places; `where`: what errors call each prompt. Raises UserError naming `whose`
    prompts a chat template lacks or refuses, the prompt whose images the model cannot take, and one without a token.
    """
    if any(not isinstance(prompt, str) for prompt in prompts) and getattr(tokenizer, "chat_template", None) is None:
        raise UserError(
            f"{whose} has chat prompts, but the model's tokenizer has no chat template; set model.chat_template to a "
            "Jinja file, or use plain-text prompts"
        )
    images, where = images or [()] * len(prompts), where or [whose] * len(prompts)
    if image_tokens is None:
        refuse_images(images, where)
    ids: dict[int, list[int]] = {number: tokens for number, tokens in enumerate(given) if tokens is not None}
    kinds: dict[str, list[int]] = {"text": [], "ask": [], "continue": []}
    for number, prompt in enumerate(prompts):
        if number in ids:
            continue
        kind = "text" if isinstance(prompt, str) else "continue" if prompt[-1]["role"] == "assistant" else "ask"
        kinds[kind].append(number)
    for kind, numbers in kinds.items():
        batch: list[Any] = [prompts[number] for number in numbers]
        seen, places = [images[number] for number in numbers], [where[number] for number in numbers]
        if not batch:
            continue
        if kind == "text":
            encoded = encode_texts(batch, tokenizer, whose)
            shown = see(image_tokens, batch, seen, places, tokenizer)
            encoded = [ids if has else plain for plain, ids, has in zip(encoded, shown, seen, strict=True)]
        else:
            ending = {"continue_final_message" if kind == "continue" else "add_generation_prompt": True}
            warn_of_rendered_chats(batch, tokenizer, whose)
            chats = [in_parts(chat) if has else chat for chat, has in zip(batch, seen, strict=True)]
            as_text = image_tokens is not None
            encoded = templated(chats, tokenizer, whose, tokenize=not as_text, **ending, **chat_template_kwargs)
            encoded = see(image_tokens, encoded, seen, places, tokenizer)
        ids.update(zip(numbers, map(list, encoded), strict=True))
    refuse_nothing(ids, where)
    return [ids[number] for number in range(len(prompts))]


def refuse_nothing(ids: Mapping[int, Sequence[int]], where: Sequence[str]) -> None:
    """Raise UserError for the first prompt without a token, which nothing can be sampled after."""
    for number, one in enumerate(where):
        if not ids[number]:
            raise UserError(
                f"{one}: the tokenizer makes no tokens of it; give it a text, or check that the tokenizer's files are "
                "this model's"
            )


def see(
    image_tokens: ImageTokens | None,
    rendered: list[Any],
    images: Sequence[Sequence[Image]],
    where: Sequence[str],
    tokenizer: Any,
) -> list[Any]:
    """The tokens of rendered texts with their images'; of a model of text alone, what was given.

    Raises UserError with the place of the first whose places and images do not match.
    """
    if image_tokens is None:
        return rendered
    encoded = []
    for text, seen, one in zip(rendered, images, where, strict=True):
        try:
            encoded.append(image_tokens.encode(text, seen, tokenizer))
        except UserError as error:
            raise UserError(f"{one}: {error}") from None
    return encoded


def templated(chats: list[Any], tokenizer: Any, whose: str, **how: Any) -> list[Any]:
    """Each chat through the chat template: as text, or with `tokenize` as token ids."""
    try:
        if not how["tokenize"]:
            return list(tokenizer.apply_chat_template(chats, **how))
        return list(tokenizer.apply_chat_template(chats, return_dict=True, **how)["input_ids"])
    except Exception as error:  # a template is a program, and not ours
        raise UserError(
            f"{whose}: the chat template refuses its prompts ({described(error)}); change system_prompt, "
            "rollout.chat_template_kwargs or model.chat_template"
        ) from None


def refuse_images(images: Sequence[Sequence[Image]], where: Sequence[str]) -> None:
    """Raise UserError for the first prompt with images."""
    for seen, one in zip(images, where, strict=True):
        if seen:
            raise UserError(
                f"{one}: it has images, and the model is read as one of text alone; set model.images = true if it sees "
                "images, or leave them out"
            )
