"""Conversations that show images: in the prompt, in users' messages, in what tools return; tokens stay exact.

The model is tiny and random, vLLM is real.
"""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import trl
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from grpo.config.schema import parse_config
from grpo.environments.continuation import CALL, TOOL, Continuer, Unprovable
from grpo.environments.pictures import Unreadable, read_messages, received_row, sent_messages, sent_row
from grpo.environments.pool import Ended, Lost
from grpo.environments.program import BadResult, Turn
from grpo.environments.ways_in import WAYS_IN, content_of
from grpo.errors import UserError
from grpo.generate import main as generate
from grpo.images import Image, read_image
from grpo.report.data import read_run
from grpo.train import main
from tests.helpers.paths import ROOT
from tests.helpers.pictures import file_of
from tests.helpers.seeing import noise, save_seeing_chat
from tests.helpers.tiny_run import read_metrics, run_tables, write_config

FILE = ROOT / "tests" / "helpers" / "pictures_to_show.py"
SIZES = {"max_prompt_length": 200, "max_completion_length": 220}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seen")
    save_seeing_chat(folder / "model")
    return folder


def tables(home: Path, name: str, environment: dict[str, Any], **changes: Any) -> dict[str, Any]:
    settings = {"max_turn_tokens": 10, "latency_steps": 3, **environment}
    found = run_tables(
        home,
        model={"images": True},
        task={"name": "grpo.tasks.shapes:load", "options": {"side": 32, "rows": 6, "held_out": 2}},
        environment=settings,
        **{"rollout": SIZES, **changes},
    )
    found.pop("rewards")
    found["checkpoint"]["output_dir"] = str(home / name)
    return found


def start(home: Path, name: str, environment: dict[str, Any], *arguments: str, **changes: Any) -> int:
    return main([str(write_config(home / f"{name}.toml", tables(home, name, environment, **changes))), *arguments])


@pytest.mark.vllm
def test_a_run_trains_on_what_it_is_shown_between_turns_and_goes_on_bit_for_bit(home: Path) -> None:
    program = {"program": f"{FILE}:shows"}
    assert start(home, "straight", program, train={"max_steps": 3}) == 0
    metrics = read_metrics(home / "straight")
    assert [entry["environment/turns"] for entry in metrics] == [3.0] * 3
    assert all(entry["mismatch_logp_max"] < 1e-4 and entry["grad_norm"] > 0 for entry in metrics)
    # Of each prompt's picture and the two that its program draws, those of a group's members alike are encoded once.
    assert all(3 <= entry["images_encoded"] for entry in metrics[:2])
    (file,) = (home / "straight" / "completions").glob("step-1.jsonl")
    groups = [json.loads(line) for line in file.read_text().splitlines()]
    turns = [turn for group in groups for sample in group["samples"] for turn in sample["turns"]]
    named = {name for turn in turns for name in turn.get("images", ())}
    assert named and all(PIL.Image.open(file.parent / "images" / name).size == (32, 32) for name in named)
    assert [bool(turn.get("images")) for turn in turns[:5]] == [False, True, False, True, False]
    assert named <= set(read_run(home / "straight").images)
    slow = {**program, "options": {"delay": 0.05}}
    assert start(home, "resumed", slow, train={"max_steps": 2}, checkpoint={"save_steps": 2}) == 0
    assert start(home, "resumed", slow, "--resume", train={"max_steps": 3}, checkpoint={"save_steps": 2}) == 0
    one, other = (load_file(home / name / "adapter" / "adapter_model.safetensors") for name in ("straight", "resumed"))
    assert one.keys() == other.keys() and all(tensor.equal(other[name]) for name, tensor in one.items())


@pytest.mark.vllm
def test_a_run_is_talked_to_with_an_image_in_its_environment(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(home, "talked", {"program": f"{FILE}:shows"}, train={"max_steps": 1}) == 0
    (home / "seen.png").write_bytes(noise(32, 32, 3).data)
    capsys.readouterr()
    said = ["look at it", "--environment", "--max-tokens", "150", "--temperature", "0"]
    assert generate([str(home / "talked"), *said, "--image", str(home / "seen.png")]) == 0
    shown = capsys.readouterr().out
    assert shown.count("[user] [image]And this?") == 2
    assert generate([str(home / "talked"), *said]) == 0
    assert capsys.readouterr().out != shown


class Played:
    """Episodes of one program at a time, played by a session's engine."""

    def __init__(self, home: Path):
        from grpo.session import open_session

        self.home = home
        self.session = open_session(parse_config(tables(home, "played", {"program": f"{FILE}:shows"})))

    def play(self, name: str, row: dict[str, Any] | None = None, **environment: Any) -> Any:
        from grpo.training.environment import make_player, start_environment

        config = parse_config(tables(self.home, "played", {"program": f"{FILE}:{name}", **environment}))
        self.session.config = config
        with start_environment(config) as pool:
            assert pool is not None
            player = make_player(self.session, pool)
            prompt = [{"role": "user", "content": "Look."}]
            (episode,) = player.play([(0, row or {"prompt": prompt}, 1)], self.session.sampling(1.0, 100))
            return episode


@pytest.fixture(scope="module")
def played(home: Path) -> Iterator[Played]:
    found = Played(home)
    yield found
    found.session.close()


@pytest.mark.vllm
def test_images_are_tokens_where_they_stood_and_logprobs_are_the_trainers(played: Played) -> None:
    episode = played.play("shows")
    assert isinstance(episode.result, Ended), episode.result
    (transcript,) = episode.transcripts
    vision, tokens = played.session.base.vision, played.session.image_tokens
    assert vision is not None and tokens is not None and len(transcript.images) == 2
    places = [place for place, token in enumerate(transcript.ids) if token == vision.image_token_id]
    assert len(places) == sum(tokens.tokens(image.width, image.height) for image in transcript.images)
    assert not any(
        own for token, own in zip(transcript.tokens, transcript.sampled, strict=True) if token in vision.never
    )
    found = played.session.policy.score(
        [transcript.prompt_ids], [transcript.tokens], temperature=1.0, sampled=transcript.sampled,
        images=[transcript.images],
    ).logprobs  # fmt: skip
    assert max(abs(a - b) for a, b in zip(found.tolist(), transcript.logprobs, strict=True)) < 1e-4
    other = [*transcript.images[:1], noise(transcript.images[1].width, transcript.images[1].height, 9)]
    changed = played.session.policy.score(
        [transcript.prompt_ids], [transcript.tokens], temperature=1.0, sampled=transcript.sampled, images=[other]
    ).logprobs  # fmt: skip
    first = sum(turn < 2 for turn, own in zip(transcript.turns, transcript.sampled, strict=False) if own)
    assert first and float((changed - found).detach().abs().max()) > 1e-3, "the last turn saw the second image"


@pytest.mark.vllm
def test_what_cannot_be_shown_is_a_sentence(played: Played) -> None:
    for name, sentence in (
        ("no_image", "the model cannot be shown: a message: its image cannot be read; it must be a whole file of"),
        ("at_a_url", "has a message with an image at a URL, and nothing is downloaded"),
        ("no_part", "has a message with a part that is no text or image but 'audio'"),
        (
            "too_large",
            "says more than environment.max_observation_tokens = 40 tokens in a turn; raise it or lower model",
        ),
        ("writes_a_placeholder", "the rendered prompt has 1 placeholders for images"),
        ("of_a_number", "has a message with an image of the type int"),
        ("asks_for_a_placeholder", "asks for a token that stands for an image, of which it gives none"),
    ):
        episode = played.play(name, max_observation_tokens=40)
        assert isinstance(episode.result, Lost) and sentence in episode.result.problem, (name, episode.result)


@pytest.mark.vllm
def test_a_history_that_is_rewritten_keeps_its_own_images(played: Played) -> None:
    episode = played.play("forgets")
    assert isinstance(episode.result, Ended), episode.result
    assert [len(one.images) for one in episode.transcripts] == [1, 1]
    assert episode.transcripts[0].images != episode.transcripts[1].images


# Tools and TRL's environments


class Said:
    """A policy that calls a tool once and then answers."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    async def __call__(self, messages: Any, tools: Any = None, max_tokens: Any = None) -> Turn:
        self.asked.append([*messages])
        call = {"type": "function", "function": {"name": "look", "arguments": {"at": 1}}}
        calls = {"tool_calls": [call]} if len(self.asked) == 1 else {}
        return Turn({"role": "assistant", "content": "", **calls}, "", "stop", False, [], [], [], [])


def asked_by(way: str, reference: Any, row: dict[str, Any]) -> list[Any]:
    sample: Any = Said()
    asyncio.run(WAYS_IN[way](reference, {}, {}).run(row, sample, {}))
    return sample.asked


def test_a_tool_may_return_an_image_as_trls_do() -> None:
    row = {"prompt": [{"role": "user", "content": "What?"}]}
    *_, (asked, _, seen) = asked_by("tools", [f"{FILE}:look"], row)
    assert seen["role"] == "tool" and [part["type"] for part in seen["content"]] == ["image", "text"]
    assert seen["content"][0]["image"].size == (32, 32) and asked == row["prompt"][0]


def test_an_environment_may_open_with_an_image_as_trls_do() -> None:
    row = {"prompt": [{"role": "user", "content": "What?"}], "answer": 3}
    (asked,), *_ = asked_by("factory", f"{FILE}:Room", row)
    assert [part["type"] for part in asked["content"]] == ["text", "image", "text"]
    assert asked["content"][0]["text"] == "What?" and asked["content"][2]["text"] == "3 doors"
    several = {"one": f"{FILE}:Room"}
    (asked,), *_ = asked_by("factory", several, {**row, "environment": "one"})  # which is not given to reset
    assert asked["content"][2]["text"] == "3 doors"


def test_other_parts_of_a_tools_answer_are_refused_and_texts_are_joined() -> None:
    assert content_of([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "look") == "ab"
    assert content_of([1, "x"], "look") == "[1, 'x']" and content_of([], "look") == "[]"
    with pytest.raises(BadResult, match="a block of type 'audio' from its tool 'look'; only text and images are shown"):
        content_of([{"type": "text", "text": "a"}, {"type": "audio", "audio": "..."}], "look")


# The link


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.integers(0, 3), max_size=3), min_size=1, max_size=5), st.integers(0, 3))
def test_an_image_goes_over_the_link_once_and_arrives_as_it_was(shown: list[list[int]], given: int) -> None:
    pictures = [noise(8 + 4 * seed, 12, seed) for seed in range(4)]
    sent, images = sent_row({"prompt": [], "images": tuple(pictures[:given]), "answer": 3})
    known: set[str] = set()
    row = received_row(sent, known)
    assert row["answer"] == 3 and [picture.size for picture in row["images"]] == [
        (each.width, each.height) for each in pictures[:given]
    ]
    bytes_sent: list[str] = []
    for turn in range(1, len(shown) + 1):
        messages = [
            {"role": "user", "content": [*({"type": "image", "image": pictures[i].pil()} for i in seen), "text"]}
            for seen in shown[:turn]
        ]
        wire = sent_messages(messages, known)
        parts = [part for message in wire for part in message["content"] if isinstance(part, dict)]
        bytes_sent += [part["image"] for part in parts if "image" in part]
        read, found = read_messages(wire, images, lambda value: read_image(value, "here"))
        assert found == [pictures[i] for seen in shown[:turn] for i in seen]
        assert [sum(part["type"] == "image" for part in each["content"]) if seen else 0
                for each, seen in zip(read, shown, strict=False)] == [len(seen) for seen in shown[:turn]]  # fmt: skip
    new = set(itertools.chain(*shown)) - set(range(given))
    assert len(bytes_sent) == len(new)


COLOURS = st.tuples(*[st.sampled_from((0, 90, 255))] * 3)


@st.composite
def pils(draw: st.DrawFn) -> PIL.Image.Image:
    """A PIL image of any mode with 8 or 16 bits, of few pixels and colours, so that two are alike but for one thing."""
    size = draw(st.sampled_from(((2, 1), (1, 2))))
    mode = draw(
        st.sampled_from(("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV", "I;16"))
    )
    count = 2 * {"1": 0, "L": 1, "P": 1, "LA": 2, "PA": 2, "I;16": 2, "RGB": 3, "YCbCr": 3, "HSV": 3}.get(mode, 4)
    if mode == "1":
        return PIL.Image.new(mode, size, draw(st.integers(0, 1)))
    numbers = st.sampled_from((0, 1) if mode in ("P", "PA") else (0, 200))
    picture = PIL.Image.frombytes(mode, size, bytes(draw(st.lists(numbers, min_size=count, max_size=count))))
    if mode in ("P", "PA"):
        picture.putpalette(bytes(itertools.chain(*draw(st.lists(COLOURS, min_size=2, max_size=2)))))
    if mode in ("P", "L") and draw(st.booleans()):
        picture.info["transparency"] = draw(st.sampled_from((0, 1, 200)))
    if mode == "RGB" and draw(st.booleans()):
        picture.info["transparency"] = draw(st.sampled_from(((0, 0, 0), (200, 200, 200))))
    return picture


@settings(deadline=None, max_examples=200)
@given(st.lists(pils(), min_size=2, max_size=4))
def test_two_images_that_differ_in_anything_both_arrive(pictures: list[PIL.Image.Image]) -> None:
    message = {"role": "user", "content": [{"type": "image", "image": picture} for picture in pictures]}
    _, found = read_messages(sent_messages([message], set()), {}, lambda value: read_image(value, "here"))
    assert found == [read_image(picture, "here") for picture in pictures]


@pytest.mark.parametrize("mode", ["I", "F", "I;16B"])
def test_an_image_of_no_clear_range_is_not_sent(mode: str) -> None:
    message = {"role": "user", "content": [{"type": "image", "image": PIL.Image.new(mode, (3, 2))}]}
    with pytest.raises(Unreadable, match=f"mode {mode}, of no clear range; give 8 bits"):
        sent_messages([message], set())


def test_every_form_of_an_image_arrives(tmp_path: Path) -> None:
    image = noise(20, 12, 1)
    file = tmp_path / "seen.png"
    file.write_bytes(image.data)
    uri = "data:image/png;base64," + base64.b64encode(image.data).decode()
    turned = image.pil().transpose(PIL.Image.Transpose.ROTATE_90)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    camera = PIL.Image.open(io.BytesIO(file_of(turned, "PNG", exif=exif)))
    parts = [
        {"type": "image", "image": image.pil()}, {"type": "image", "image": image.data},
        {"type": "image", "image": str(file)}, {"type": "image_url", "image_url": {"url": uri}},
        {"type": "image_url", "image_url": uri}, {"type": "input_image", "image_url": uri},
        {"type": "image", "image": camera}, {"type": "image", "base64": base64.b64encode(image.data).decode()},
    ]  # fmt: skip
    known: dict[str, Image] = {}
    for part in parts:
        wire = sent_messages([{"role": "user", "content": [part]}], set())
        _, found = read_messages(wire, known, lambda value: read_image(value, "here"))
        assert found == [image], part
    for part in ({"type": "image"}, {"type": "image", "image": 3}, {"type": "image", "image": "nowhere.png"}):
        with pytest.raises(Unreadable):
            sent_messages([{"role": "user", "content": [part]}], set())
    for part in ({"type": "image", "key": "other"}, {"type": "image", "image": uri}, {"type": "video"}, 3):
        with pytest.raises(Unreadable):
            read_messages([{"role": "user", "content": [part]}], {}, lambda value: read_image(value, "here"))


# Templates


class Tokens:
    """Of images: a placeholder becomes as many as the image is wide."""

    def __init__(self, placeholder: int):
        self.placeholder = placeholder

    def placeholders(self, token_ids: Any) -> int:
        return sum(token == self.placeholder for token in token_ids)

    def expand(self, token_ids: Any, images: Any) -> list[int]:
        if self.placeholders(token_ids) != len(images):
            raise UserError("the rendered prompt has another number of placeholders")
        left = iter(images)
        return [each for one in token_ids for each in ([one] * next(left).width if one == self.placeholder else [one])]


def seeing(template: str) -> Continuer:
    from transformers import AutoTokenizer

    from grpo.config.schema import Model
    from grpo.model.gguf_source import metadata_folder
    from grpo.model.source import locate
    from tests.helpers.tiny_run import SMOLLM2

    tokenizer = AutoTokenizer.from_pretrained(metadata_folder(locate(Model(name=SMOLLM2))))
    marks = ["<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<tool_call>", "</tool_call>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks}, replace_extra_special_tokens=False)
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja").read_text()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    return Continuer(tokenizer, [end], {}, image_tokens=Tokens(tokenizer.convert_tokens_to_ids("<|image_pad|>")))


@pytest.mark.parametrize("role", ["user", "tool"])
def test_qwens_templates_show_images_after_users_and_tools(role: str) -> None:
    found = seeing("qwen3_vl")
    found.prove(tools=True)
    assert found.doubt_of(f"{role} with an image") == ""
    first, second = noise(5, 6, 0), noise(7, 6, 1)
    said: dict[str, Any] = {"role": "assistant", "content": "Hm."}
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
    history = [asked, {**said, "tool_calls": [CALL]} if role == "tool" else said]
    new = [{"role": role, "content": [{"type": "text", "text": "Seen:"}, {"type": "image"}, {"type": "image"}]}]
    tools = [TOOL] if role == "tool" else None
    opening = found.opening(history[:1], tools, [first])
    assert found.image_tokens is not None and found.image_tokens.placeholders(opening) == 5
    ids = found.continuation(history, new, tools, found.tokens("x")[-1], [first, second])
    text = found.tokenizer.decode(ids)
    assert text.count("<|image_pad|>") == 12 and "Seen:" in text
    whole = found.render([*history, *new], tools, opens=True)
    assert whole.endswith(text.replace("<|image_pad|>" * 12, "").rsplit("<|vision_end|>", 1)[-1])


def test_a_template_that_leaves_a_tools_image_out_is_refused() -> None:
    found = seeing("qwen2_5")
    assert "with an image cannot follow" in refused(found)


def refused(found: Continuer) -> str:
    history = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    new = [{"role": "tool", "content": [{"type": "image"}]}]
    with pytest.raises(Unprovable) as caught:
        found.continuation(history, new, [TOOL], 5, [noise(5, 6, 0)])
    return str(caught.value)


def test_a_model_of_text_says_what_to_set() -> None:
    found = seeing("qwen3_vl")
    found.image_tokens = None
    with pytest.raises(UserError, match=r"set model\.images = true if it sees images"):
        found.opening([{"role": "user", "content": [{"type": "image"}]}], None, [noise(5, 6, 0)])
