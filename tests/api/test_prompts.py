"""Texts, chats and lists of them are distinguished, and tokens that come one at a time give the text of all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from grpo.api.prompts import Asked, as_batch, pieces
from grpo.config.schema import Model
from grpo.errors import UserError
from grpo.images import read_image
from tests.helpers.pictures import noise
from tests.helpers.tiny_run import SMOLLM2

CHAT = [{"role": "user", "content": "What is 1 + 1?"}]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from grpo.model.source import open_source

    return open_source(Model(name=SMOLLM2)).tokenizer()


def test_one_text_one_chat_and_batches_are_told_apart() -> None:
    def told(prompts: Any) -> tuple[list[Any], bool]:
        batch, single = as_batch(prompts)
        return [one.prompt for one in batch], single

    assert told("hi") == (["hi"], True)
    assert told(CHAT) == ([CHAT], True)
    assert told(["hi", CHAT]) == (["hi", CHAT], False)
    for nothing in ([], "", [""], 3, None, [CHAT[0] | {"role": None}]):
        with pytest.raises(UserError):
            as_batch(nothing)


def test_images_stand_in_a_chat_or_beside_it(tmp_path: Path) -> None:
    image = noise()
    image.save(tmp_path / "a.png")
    parts = [{"type": "image"}, {"type": "text", "text": "What is 1 + 1?"}]
    shown = [{"role": "user", "content": [{**parts[0], "image": image}, parts[1]]}]
    expected = Asked([{"role": "user", "content": parts}], (read_image(image, ""),))
    for prompts, images in ((shown, None), (CHAT, image), (CHAT, [image]), (CHAT, str(tmp_path / "a.png"))):
        assert as_batch(prompts, images) == ([expected], True)
    assert [one.images for one in as_batch([shown, CHAT])[0]] == [expected.images, ()]
    (small,) = as_batch(CHAT, image, max_pixels=100)[0][0].images
    assert small.width * small.height <= 100
    for prompts, images, said in (
        ("hi", image, "images= goes with one chat"),
        ([CHAT, CHAT], image, "images= goes with one chat"),
        (CHAT, "nowhere.png", "the prompt: its image nowhere.png cannot be read"),
        (shown, image, "the prompt: it has 1 image beside its messages, and these have 0 places"),
        ([CHAT, [{"role": "user", "content": [{"type": "image", "image": 3}]}]], None, "prompt 2: its image is of the"),
    ):
        with pytest.raises(UserError, match=said):
            as_batch(prompts, images)


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
