"""Every form in which data sets have images gives messages with places, and the images in their order."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.errors import UserError
from grpo.messages import column_images, content_text, image_places, in_parts, with_places

IMAGE: dict[str, Any] = {"type": "image"}


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def refusal(messages: list[Any], beside: list[Any]) -> str:
    with pytest.raises(UserError) as caught:
        with_places(messages, beside, "row 3")
    return str(caught.value).removeprefix("row 3: ")


def test_images_in_columns_stand_before_the_first_users_text_as_trl_puts_them() -> None:
    data_utils = pytest.importorskip("trl.data_utils")
    chat = [{"role": "system", "content": "be kind"}, user("what?"), {"role": "assistant", "content": "a"}, user("b?")]
    made, images = with_places(chat, ["A", "B"], "row 3")
    assert images == ["A", "B"] and made[1] == user([IMAGE, IMAGE, text("what?")])
    theirs = data_utils.prepare_multimodal_messages(chat, images=["A", "B"])
    assert in_parts(made) == [
        {**each, "content": [IMAGE if part["type"] == "image" else part for part in each["content"]]} for each in theirs
    ]


@pytest.mark.parametrize(
    ("part", "image"),
    [
        ({"type": "image", "image": "A"}, "A"),
        ({"type": "image", "image": None, "text": None, "path": "A"}, "A"),
        ({"type": "image", "base64": "QQ=="}, "data:image;base64,QQ=="),
        ({"type": "image_url", "image_url": {"url": "data:A"}}, "data:A"),
        ({"type": "input_image", "image_url": "data:A"}, "data:A"),
        ({"type": "image", "image": {"bytes": b"A", "path": None}}, {"bytes": b"A", "path": None}),
    ],
)
def test_parts_may_hold_their_image(part: dict[str, Any], image: Any) -> None:
    made, images = with_places([user([text("see "), part, "this"])], [], "row 3")
    assert made == [user([text("see "), IMAGE, text("this")])] and images == [image]


def test_parts_with_and_without_an_image_keep_their_order() -> None:
    chat = [user([{"type": "image", "image": "A"}, IMAGE]), {"role": "assistant", "content": "x"}, user([IMAGE])]
    made, images = with_places(chat, ["B", "C"], "row 3")
    assert images == ["A", "B", "C"] and image_places(made) == 3


def test_marks_in_a_text_are_places() -> None:
    made, images = with_places([user("<image>first, then <image> that"), user("<image>")], ["A", "B", "C"], "row 3")
    assert made == [user([IMAGE, text("first, then "), IMAGE, text(" that")]), user([IMAGE])]
    assert images == ["A", "B", "C"]
    assert with_places([user("an <image> tag")], [], "row 3") == ([user("an <image> tag")], [])


def test_text_in_parts_becomes_text() -> None:
    assert with_places([user([text("a"), {"type": "input_text", "text": "b"}])], [], "row 3") == ([user("ab")], [])
    assert content_text([IMAGE, text("a"), text("b")]) == "ab" and content_text("a") == "a" and content_text(None) == ""


def test_what_does_not_match_is_a_sentence() -> None:
    assert refusal([user([IMAGE])], []).startswith("it has 0 images beside its messages, and these have 1 place for")
    assert refusal([user([IMAGE])], ["A", "B"]).startswith("it has 2 images beside its messages")
    assert refusal([user("<image>")], ["A", "B"]).startswith("it has 2 images beside its messages, and these have 1")
    assert refusal([{"role": "system", "content": "a"}], ["A"]).startswith(
        "it has 1 image beside its messages, and these"
    )
    assert refusal([user([{"type": "video", "video": "v"}])], []) == (
        "a part of a message's content is no text or image but video; leave such rows out"
    )
    assert "is a int; make it a dict" in refusal([user([3])], [])
    for row, said in (
        ({"image": "A", "images": ["B"]}, 'it has the columns "image" and "images"'),
        ({"images": "A"}, 'its column "images" is a str; make it a list'),
    ):
        with pytest.raises(UserError, match=said):
            column_images(row, "row 3")
    assert column_images({"image": None, "images": None}, "row 3") == column_images({}, "row 3") == []
    assert column_images({"image": "A"}, "row 3") == ["A"] and column_images({"images": ("A",)}, "row 3") == ["A"]


PARTS = st.lists(st.one_of(st.just("hole"), st.just("held"), st.text(max_size=4)), max_size=5)


@given(st.lists(PARTS, max_size=4))
def test_as_many_places_as_images_in_their_order(contents: list[list[str]]) -> None:
    counted = iter(range(100))
    chat, expected, beside = [], [], []
    for parts in contents:
        made: list[Any] = []
        for part in parts:
            if part == "hole":
                expected.append(next(counted))
                beside.append(expected[-1])
                made.append(IMAGE)
            elif part == "held":
                expected.append(next(counted))
                made.append({"type": "image", "image": expected[-1]})
            else:
                made.append(text(part))
        chat.append(user(made))
    found, images = with_places(chat, beside, "row 3")
    assert images == expected and image_places(found) == len(expected)
    assert [content_text(each["content"]) for each in found] == [content_text(each["content"]) for each in chat]
    assert with_places(found, images, "row 3") == (found, images)
