"""Tokens that a tokenizer makes and the model's embedding has no row for.

A token added to a tokenizer without resizing the model reads what lies behind the embedding. Nothing is wrong with a
tokenizer that could make such tokens (several models' can), only with a text in which one is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from grpo.errors import UserError
from grpo.model.decoder_config import DecoderConfig


def check_tokens(texts: Iterable[tuple[str, Sequence[int]]], tokenizer: Any, config: DecoderConfig) -> None:
    """Raise UserError for the first of `texts`, (what to call it, token ids), with a token that has no row.

    config: transformers', of the model.
    """
    rows = config.get_text_config().vocab_size
    for where, token_ids in texts:
        if token_ids and max(token_ids) >= rows:
            token = next(token for token in token_ids if token >= rows)
            raise UserError(f"{where}: {no_row(token, tokenizer, rows)}, or leave it out of the text")


def no_row(token: int, tokenizer: Any, rows: int) -> str:
    """What is wrong with `token`, and the first half of what to do."""
    return (
        f"the token {tokenizer.convert_ids_to_tokens(token)!r} has the number {token}, and the model's embedding has "
        f"{rows} rows; resize the model as the tokenizer was (transformers' resize_token_embeddings)"
    )
