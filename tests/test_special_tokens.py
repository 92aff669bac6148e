"""Special tokens: put in front of a text once, and seen by rewards unless they end, fill up or begin a sequence."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, processors

from grpo.rewards.tag_count import tag_count
from grpo.special_tokens import completion_text, completion_texts, decodes_plainly, leading_tokens
from grpo.tokenizing import tokenize
from tests.helpers.vocabularies import TEXTS, byte_level, save_tokenizer, sentencepiece

MAKERS: dict[str, Callable[[], Any]] = {
    "byte-level": byte_level,
    "sentencepiece": lambda: sentencepiece(space_prefix=False),
    "sentencepiece with a space in front": lambda: sentencepiece(space_prefix=True),
}
RENDERED = "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"


@pytest.fixture(params=MAKERS)
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """One that begins texts with <bos>, and whose special tokens are the answer's tags too."""
    made = MAKERS[request.param]()
    made.add_special_tokens([AddedToken(tag, normalized=False, special=True) for tag in ("<answer>", "</answer>")])
    return save_tokenizer(made, tmp_path, bos=True, template=RENDERED)


def ids_of(tokenizer: Any, *prompts: Any) -> list[list[int]]:
    return tokenize(prompts, tokenizer, {}, "task 't'")


def test_a_rendered_chat_begins_once(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    chats = [[{"role": "user", "content": text}] for text in TEXTS if text]
    rendered = [tokenizer.apply_chat_template(chat, tokenize=False) for chat in chats]
    with caplog.at_level(logging.WARNING, logger="grpo"):
        assert ids_of(tokenizer, *rendered) == ids_of(tokenizer, *chats)
    assert [f"{len(chats)} of {len(chats)} text prompts begin with <bos> already" in m for m in caplog.messages] == [
        True
    ]


def test_a_text_is_begun_unless_it_begins_itself(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    begin = tokenizer.bos_token_id
    for text in ["one", "<bo", "bos", " one", "one <bos>", "<eos>one"]:
        assert ids_of(tokenizer, text) == [tokenizer(text)["input_ids"]] and ids_of(tokenizer, text)[0][0] == begin
    assert not caplog.messages
    for text in ["<bos>one", "<bos>", "<bos> one", "\n<bos>one"]:
        assert ids_of(tokenizer, text)[0].count(begin) == 1


def test_several_tokens_in_front_are_one_beginning(tmp_path: Path) -> None:
    made = byte_level()
    made.add_special_tokens(["[gMASK]", "<sop>"])
    tokenizer = save_tokenizer(made, tmp_path, bos=False)
    both = [("[gMASK]", made.token_to_id("[gMASK]")), ("<sop>", made.token_to_id("<sop>"))]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[gMASK] <sop> $A", special_tokens=both
    )
    front = [number for _, number in both]
    assert leading_tokens(tokenizer) == front
    assert ids_of(tokenizer, "[gMASK]<sop>one", "one")[0] == ids_of(tokenizer, "one")[0]
    assert ids_of(tokenizer, "<sop>one")[0][:3] == [*front, front[1]]


def test_a_turn_that_was_rendered_before_is_told(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    ids_of(tokenizer, [{"role": "user", "content": "<bos><|im_start|>one"}], [{"role": "user", "content": "two"}])
    assert "task 't': 1 of 2 turns begin with <bos>" in caplog.text and "chat = false" in caplog.text


@given(data=st.data())
def test_only_what_ends_fills_up_or_begins_is_left_out(data: st.DataObject) -> None:
    tokenizer = made_once()
    special = [token for token in tokenizer.all_special_ids] + tokenizer.convert_tokens_to_ids(
        ["<answer>", "</answer>", "<|im_start|>", "<|im_end|>"]
    )
    words = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("one", " 12", "é")]
    parts = data.draw(st.lists(st.sampled_from([*words, *([token] for token in special)]), max_size=8))
    stops = tokenizer.convert_tokens_to_ids(data.draw(st.sampled_from([["<eos>"], ["<eos>", "<|im_end|>"]])))
    ids = [token for part in parts for token in part]
    unseen = {*stops, tokenizer.pad_token_id, tokenizer.bos_token_id}
    written = "".join(tokenizer.decode(part) for part in parts if part[0] not in unseen)
    assert completion_text(ids, tokenizer, stops, skip=False) == written
    assert completion_text(ids, tokenizer, stops, skip=True) == tokenizer.decode(ids, skip_special_tokens=True)


@given(data=st.data())
def test_many_are_read_as_each_is(data: st.DataObject) -> None:
    tokenizer = made_once()
    assert decodes_plainly(tokenizer)
    ids = st.lists(st.integers(0, len(tokenizer) - 1), max_size=12)
    completions, skip = data.draw(st.lists(ids, max_size=5)), data.draw(st.booleans())
    stops = [tokenizer.eos_token_id]
    each = [completion_text(one, tokenizer, stops, skip) for one in completions]
    assert completion_texts(completions, tokenizer, stops, skip) == each


def test_a_tokenizer_with_more_to_it_reads_one_by_one(tokenizer: Any) -> None:
    class Own(type(tokenizer)):  # type: ignore[misc]
        def _decode(self, *arguments: Any, **options: Any) -> str:
            return super()._decode(*arguments, **options).upper()

    tokenizer.__class__ = Own
    assert not decodes_plainly(tokenizer)
    ids = tokenizer("one two", add_special_tokens=False)["input_ids"]
    assert completion_texts([ids, ids], tokenizer, [], False) == ["ONE TWO"] * 2
    assert not decodes_plainly(object())


made: list[Any] = []


def made_once() -> Any:
    if not made:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            raw = byte_level()
            raw.add_special_tokens(["<answer>", "</answer>"])
            made.append(save_tokenizer(raw, Path(folder), bos=True))
            made[0].add_special_tokens({"additional_special_tokens": ["<answer>", "</answer>"]})
    return made[0]


def test_a_format_of_special_tokens_scores(tokenizer: Any) -> None:
    ids = tokenizer("<answer>2</answer>")["input_ids"] + [tokenizer.eos_token_id]
    stops = [tokenizer.eos_token_id]
    seen, stripped = (completion_text(ids, tokenizer, stops, skip=skip) for skip in (False, True))
    assert seen.replace(" ", "") == "<answer>2</answer>" and "answer" not in stripped
    assert tag_count([seen, stripped], tags=["answer"]) == [1.0, 0.0]
