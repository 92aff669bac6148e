"""Tokens that are no text: what a tokenizer puts in front of one, and what ends a completion or fills it up.

A text may begin with the first kind already, as one does that a chat template rendered: it gets them once. The second
kind is cut out of completions before anybody reads them; every other special token is part of what the model said.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from grpo.messages import content_text

logger = logging.getLogger("grpo")

CLEANED_AFTER_ALL = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
PROBE = "a"
"""A text without special tokens."""


def leading_tokens(tokenizer: Any) -> list[int]:
    """The tokens that `tokenizer` puts in front of a text by itself, such as the one that begins a sequence."""
    whole, bare = list(tokenizer(PROBE)["input_ids"]), list(tokenizer(PROBE, add_special_tokens=False)["input_ids"])
    indices = (index for index in range(len(whole) - len(bare) + 1) if whole[index : index + len(bare)] == bare)
    return whole[: next(indices, 0)]


def start_with(texts: Sequence[str], front: Sequence[int], tokenizer: Any) -> list[bool]:
    """Whether each text says the tokens `front` itself, before anything but white space."""
    if not front:
        return [False] * len(texts)
    characters = 8 + sum(len(token) for token in tokenizer.convert_ids_to_tokens(list(front)))
    starts = tokenizer([text.lstrip()[:characters] for text in texts], add_special_tokens=False)["input_ids"]
    return [ids[: len(front)] == list(front) for ids in starts]


def encode_texts(texts: Sequence[str], tokenizer: Any, whose: str) -> list[list[int]]:
    """Token ids of each text, with the tokens that the tokenizer puts in front of it, once. `whose` is for a notice."""
    front = leading_tokens(tokenizer)
    have = start_with(texts, front, tokenizer)
    if any(have):
        logger.warning(
            "%s: %d of %d text prompts begin with %s already, so none is put in front of them",
            whose, sum(have), len(texts), shown(front, tokenizer),
        )  # fmt: skip
    ids = tokenizer(list(texts))["input_ids"]
    return [list(each)[len(front) if has else 0 :] for each, has in zip(ids, have, strict=True)]


def warn_of_rendered_chats(chats: Sequence[Sequence[dict[str, Any]]], tokenizer: Any, whose: str) -> None:
    """A notice about chats in which a turn begins with what begins a sequence: it was rendered before."""
    begin = getattr(tokenizer, "bos_token", None)
    turns = [content_text(turn["content"]).lstrip() for chat in chats for turn in chat if turn["role"] != "assistant"]
    if begin and (count := sum(turn.startswith(begin) for turn in turns)):
        logger.warning(
            "%s: %d of %d turns begin with %s, as if a chat template had rendered them; the model's template renders "
            "them once more, so give such prompts as text (of the task table: chat = false)",
            whose, count, len(turns), begin,
        )  # fmt: skip


def shown(ids: Sequence[int], tokenizer: Any) -> str:
    """Special tokens as they are written."""
    return "".join(tokenizer.convert_ids_to_tokens(list(ids)))


def completion_text(token_ids: Sequence[int], tokenizer: Any, stop_token_ids: Sequence[int], skip: bool) -> str:
    """A completion's token ids as the text that rewards and people see.

    Left out are the tokens that end a completion, that fill up a batch and that begin a sequence; with `skip` every
    special token is.
    """
    return tokenizer.decode(seen(token_ids, tokenizer, stop_token_ids), skip_special_tokens=skip)


def completion_texts(
    completions: Sequence[Sequence[int]], tokenizer: Any, stop_token_ids: Sequence[int], skip: bool
) -> list[str]:
    """`completion_text` of each of `completions`: side by side, where the tokenizer adds nothing to its decoder."""
    if len(completions) < 2 or not decodes_plainly(tokenizer):
        return [completion_text(each, tokenizer, stop_token_ids, skip) for each in completions]
    kept = [seen(each, tokenizer, stop_token_ids) for each in completions]
    return tokenizer.backend_tokenizer.decode_batch(kept, skip_special_tokens=skip)


def seen(token_ids: Sequence[int], tokenizer: Any, stop_token_ids: Sequence[int]) -> list[int]:
    """`token_ids` that are text, or special tokens that say something."""
    unseen = {*stop_token_ids, tokenizer.pad_token_id, tokenizer.bos_token_id}
    return [token for token in token_ids if token not in unseen]


def decodes_plainly(tokenizer: Any) -> bool:
    """Whether `tokenizer.decode` is that of the tokenizers package, and no white space is cleaned up after it."""
    from transformers import PreTrainedTokenizerFast as Fast

    kind = type(tokenizer)
    if not isinstance(tokenizer, Fast) or kind.decode is not Fast.decode or kind._decode is not Fast._decode:
        return False
    if not tokenizer.clean_up_tokenization_spaces:
        return True
    return type(tokenizer.backend_tokenizer.model).__name__ == "BPE" and not getattr(
        tokenizer, CLEANED_AFTER_ALL, False
    )
