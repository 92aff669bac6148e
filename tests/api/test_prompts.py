"""Texts, chats and lists of them are distinguished, and tokens that come one at a time give the text of all of them."""

from __future__ import annotations

from typing import Any

import pytest

from grpo.api.prompts import as_batch, pieces
from grpo.config.schema import Model
from grpo.errors import UserError
from tests.helpers.tiny_run import SMOLLM2

CHAT = [{"role": "user", "content": "What is 1 + 1?"}]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from grpo.model.source import open_source

    return open_source(Model(name=SMOLLM2)).tokenizer()


def test_one_text_one_chat_and_batches_are_told_apart() -> None:
    assert as_batch("hi") == (["hi"], True)
    assert as_batch(CHAT) == ([CHAT], True)
    assert as_batch(["hi", CHAT]) == (["hi", CHAT], False)
    for nothing in ([], "", [""], 3, None, [CHAT[0] | {"role": None}]):
        with pytest.raises(UserError):
            as_batch(nothing)


@pytest.mark.parametrize(
    "text", ["plain words", "naïve Größe", "日本語 🙂🙃 tail", "ends in 🙂", " leading space", "a\n\nb  c"]
)
def test_pieces_together_are_the_text_and_no_piece_ends_within_a_character(text: str, tokenizer: Any) -> None:
    ids = tokenizer(text)["input_ids"]
    assert len(ids) > 1
    found = list(pieces([[token] for token in ids], tokenizer.decode))
    assert "".join(found) == tokenizer.decode(ids) == text
    assert not any("\ufffd" in piece for piece in found)


def test_bytes_that_are_no_character_are_shown_at_the_end(tokenizer: Any) -> None:
    ids = tokenizer("🙂")["input_ids"][:-1]
    assert "".join(pieces([[token] for token in ids], tokenizer.decode)) == tokenizer.decode(ids)
