"""`python -m grpo.serve` for a model that sees: what OpenAI's clients send of images. The model is tiny and random."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import pytest

import grpo
from tests.helpers.seeing import noise, save_seeing_chat
from tests.test_serve import answered

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = save_seeing_chat(tmp_path_factory.mktemp("serve") / "model")
    with grpo.load(
        folder, load_in_4bit=False, dtype="float32", device="cpu", max_seq_length=300, images=True, max_pixels=4096
    ) as found:
        yield found


def asked(*images: Any, **more: Any) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": image, "detail": "auto"}} for image in images]
    content = [{"type": "text", "text": "What is it?"}, *parts]
    return {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 10, **more}


def uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def test_images_of_openais_clients_are_seen_as_everywhere(policy: Any) -> None:
    one, other = noise(32, 24, 0), noise(32, 24, 1)
    wanted = [
        policy.generate(
            [{"role": "user", "content": [{"type": "text", "text": "What is it?"},
                                          *({"type": "image", "image": each.pil()} for each in shown)]}],
            temperature=0.0, max_tokens=10,
        )
        for shown in ((one,), (other,), (one, other), ())
    ]  # fmt: skip
    found = answered(
        policy, asked(uri(one.data)), asked(uri(other.data)), asked(uri(one.data), uri(other.data)), asked()
    )
    assert [answer["choices"][0]["message"]["content"] for answer in found] == wanted
    assert len(set(wanted)) == 4
    counts = [answer["usage"]["prompt_tokens"] for answer in found]
    assert counts[0] == counts[1] < counts[2] and counts[0] - counts[3] == counts[2] - counts[0]


def test_images_that_cannot_be_used_are_refused(policy: Any) -> None:
    large = noise(64, 64, 2)
    tokens = {"token_ids": [5, policy.session.base.vision.image_token_id], "sampling_params": {"max_tokens": 3}}
    found = answered(
        policy,
        asked("https://example.org/a.png"),
        asked("/etc/hostname"),
        asked("file:///etc/hostname"),
        asked(uri(b"no image")),
        asked("data:image/png;base64,@@@"),
        asked(*[uri(large.data)] * 5),
        tokens,
        {"messages": [{"role": "user", "content": "<|image_pad|>"}]},
        {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
    )
    for sentence in found[:3]:
        assert "nothing is downloaded, and no file is opened" in sentence
    assert "cannot be read; it must be a whole file" in found[3] and "data URI that is not" in found[4]
    assert "leave no room for an answer" in found[5]
    assert "token that stands for an image, and no image" in found[6]
    assert "the rendered prompt has 1 placeholders" in found[7]
    assert "a part of type 'input_audio'; text and images are read" in found[8]
