"""Rows with images become prompts whose tokens have each image's, in every form that data sets have them in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grpo.api.inputs import as_task
from grpo.config.schema import parse_config
from grpo.data import Data, Prompt, PromptStream, load_data
from grpo.errors import UserError
from grpo.images import read_image
from grpo.tasks.common import Task
from grpo.tasks.image_paths import with_image_paths
from tests.helpers.pictures import PLACE, PatchTokens, file_of, noise

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> "
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    f"{{% if part.type == 'image' %}} {PLACE}{{% else %}} {{{{ part.text }}}}{{% endif %}}"
    "{% endfor %}{% endif %} </{{ m.role }}> {% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TAGS = [f"<{end}{role}>" for role in ("user", "system", "assistant") for end in ("", "/")]
WORDS = ["<unk>", PLACE, *TAGS, *"what is this and that kind".split()]
WIDE = noise(60, 20)  # three tokens
TALL = noise(20, 40, seed=1)  # two


def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=TEMPLATE)


def loaded(*rows: Any, sees: bool = True, held_out: Any = (), **tables: Any) -> Data:
    values = {"model": {"name": "m"}, "task": {"name": "t"}, "rewards": [{"function": "correctness"}], **tables}
    task = Task("t", list(rows), list(held_out), strict=lambda text, row: True, flexible=lambda text, row: True)
    return load_data(parse_config(values), tokenizer(), tasks=[task], image_tokens=PatchTokens() if sees else None)


def words(prompt: Prompt) -> str:
    return " ".join(WORDS[token] for token in prompt.token_ids)


def asked(content: Any = "what is this", **columns: Any) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": content}], **columns}


def refusal(*rows: Any, **how: Any) -> str:
    with pytest.raises(UserError) as caught:
        loaded(*rows, **how)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_prompt_has_the_tokens_of_its_images_in_their_places() -> None:
    parts = [{"type": "image", "image": WIDE}, {"type": "text", "text": "and"}, {"type": "image"}]
    data = loaded(asked(image=TALL, answer="1"), asked("what"), asked(parts, images=[TALL]))
    assert [words(prompt) for prompt in data.train] == [
        f"<user> {PLACE} {PLACE} what is this </user> <assistant>",
        "<user> what </user> <assistant>",
        f"<user> {PLACE} {PLACE} {PLACE} and {PLACE} {PLACE} </user> <assistant>",
    ]
    wide, tall = read_image(WIDE, ""), read_image(TALL, "")
    assert [prompt.images for prompt in data.train] == [(tall,), (), (wide, tall)]
    assert [prompt.columns for prompt in data.train] == [
        {"image": tall, "images": (tall,), "answer": "1"},
        {"image": None, "images": (), "answer": None},
        {"image": None, "images": (wide, tall), "answer": None},
    ]
    assert data.train[0].prompt == [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this"}]}
    ]


def test_a_chat_that_was_rendered_already_keeps_its_images() -> None:
    rendered = tokenizer().apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what"}]}],
        tokenize=False, add_generation_prompt=True,
    )  # fmt: skip
    data = loaded({"prompt": rendered, "image": TALL}, {"prompt": "this and that"})
    assert words(data.train[0]) == f"<user> {PLACE} {PLACE} what </user> <assistant>"
    assert [prompt.images for prompt in data.train] == [(read_image(TALL, ""),), ()]
    assert data.train[0].prompt == rendered and words(data.train[1]) == "this and that"


def test_data_without_images_have_no_such_column() -> None:
    assert loaded(asked(answer="1")).train[0].columns == {"answer": "1"}


def test_system_prompts_and_opened_answers_stand_beside_images() -> None:
    row = asked(image=TALL)
    row["prompt"].append({"role": "assistant", "content": "that is"})
    data = loaded(row, task={"name": "t", "system_prompt": "be kind"})
    assert words(data.train[0]) == (
        f"<system> <unk> kind </system> <user> {PLACE} {PLACE} what is this </user> <assistant> that is"
    )


def test_rows_of_datasets_and_parquet_and_json_lines_give_the_same(tmp_path: Path) -> None:
    rows = [asked(image=TALL, answer="1"), asked(image=None, answer="2"), asked(image=WIDE, answer="3")]
    expected = [prompt.token_ids for prompt in loaded(*rows).train]
    dataset = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    assert [prompt.token_ids for prompt in loaded(*as_task(dataset)[0].train).train] == expected
    (tmp_path / "parquet").mkdir()
    dataset.to_parquet(tmp_path / "parquet" / "train.parquet")
    (tmp_path / "folder" / "shown").mkdir(parents=True)
    WIDE.save(tmp_path / "folder" / "shown" / "wide.png")
    TALL.save(tmp_path / "folder" / "shown" / "tall.png")
    lines = [row | {"image": name} for row, name in zip(rows, ("shown/tall.png", None, "shown/wide.png"), strict=True)]
    (tmp_path / "folder" / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for folder in ("parquet", "folder"):
        options = {"path": str(tmp_path / folder), "prompt": "{prompt}"}
        config = parse_config({"model": {"name": "m"}, "task": {"name": "table", "options": options}})
        data = load_data(config, tokenizer(), image_tokens=PatchTokens())
        assert [prompt.token_ids for prompt in data.train] == expected
        assert [len(prompt.images) for prompt in data.train] == [1, 0, 1]


def test_a_table_finds_images_in_any_column_and_beside_its_file(tmp_path: Path) -> None:
    WIDE.save(tmp_path / "wide.png")
    row = {"file_name": "wide.png", "question": "<image> what is this", "answer": "that"}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    options = {"path": str(tmp_path), "images": "file_name"}
    config = parse_config({"model": {"name": "m"}, "task": {"name": "table", "options": options}})
    prompt = load_data(config, tokenizer(), image_tokens=PatchTokens()).train[0]
    assert words(prompt) == f"<user> {PLACE} {PLACE} {PLACE} what is this </user> <assistant>"
    assert prompt.columns["file_name"] == "wide.png"


def test_a_folder_of_images_as_datasets_takes_it(tmp_path: Path) -> None:
    (tmp_path / "shown").mkdir()
    TALL.save(tmp_path / "shown" / "tall.png")
    row = {"file_name": "shown/tall.png", "question": "what is this", "answer": "that"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    options = {"path": str(tmp_path), "train_split": "metadata", "eval_split": "", "images": "file_name"}
    config = parse_config({"model": {"name": "m"}, "task": {"name": "table", "options": options}})
    prompt = load_data(config, tokenizer(), image_tokens=PatchTokens()).train[0]
    assert words(prompt) == f"<user> {PLACE} {PLACE} what is this </user> <assistant>"


def test_parts_of_messages_may_name_files_beside_their_own(tmp_path: Path) -> None:
    WIDE.save(tmp_path / "wide.png")
    content = [{"type": "image", "image": "wide.png"}, {"type": "text", "text": "what"}]
    row = {"prompt": [{"role": "user", "content": content}], "answer": "that"}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    options = {"path": str(tmp_path), "prompt": "{prompt}"}
    config = parse_config({"model": {"name": "m"}, "task": {"name": "table", "options": options}})
    prompt = load_data(config, tokenizer(), image_tokens=PatchTokens()).train[0]
    assert words(prompt) == f"<user> {PLACE} {PLACE} {PLACE} what </user> <assistant>"


def test_what_cannot_be_used_is_named_with_its_row(tmp_path: Path) -> None:
    said = refusal(asked("what"), asked(image=TALL), sees=False)
    assert said == (
        "task 't', training row 2: it has images, and the model is read as one of text alone; set model.images = true "
        "if it sees images, or leave them out"
    )
    assert refusal(asked(PLACE)) == "task 't', training row 1: it has 0 images and 1 places for one"
    assert refusal({"prompt": PLACE}).startswith("task 't', training row 1: it has 0 images")
    assert "training row 2: it has 1 images and 2 places" in refusal(asked(), asked(PLACE, image=TALL))
    assert "row 2, image 2: its image nowhere.png cannot be read" in refusal(
        asked(), asked(images=[TALL, "nowhere.png"])
    )
    assert "row 1: its image is damaged" in refusal(asked(image=file_of(WIDE)[:-300]))
    playing = {"environment": {"program": "a.py:play", "max_turns": 2}}
    assert "an [environment] begins with messages" in refusal({"prompt": PLACE, "image": TALL}, **playing)
    assert len(loaded(asked(image=TALL), **playing).train[0].images) == 1
    assert "row 1: it has 1 images and 0 places" in refusal({"prompt": "what", "image": TALL})
    assert "its prompt is token numbers" in refusal({"prompt": [1, 2], "image": TALL})
    short = {"max_prompt_length": 5}
    said = refusal(asked("what", image=WIDE), rollout=short)
    assert said.endswith("the shortest has 7 tokens, so raise it or lower model.max_pixels")
    strict = {"name": "t", "overlong": "error"}
    said = refusal(asked("what", image=WIDE), asked("what"), rollout=short, task=strict)
    assert said.endswith('raise it, lower model.max_pixels, or set overlong = "drop"')


def test_the_stream_knows_its_images_again() -> None:
    def state(*images: Any) -> PromptStream:
        data = loaded(*(asked(image=image) for image in images))
        return PromptStream(data.train, data.settings, seed=1)

    first = state(TALL, WIDE)
    first.take(1)
    state(TALL, file_of(WIDE, "BMP")).load_state_dict(first.state_dict())
    with pytest.raises(UserError, match="not those of the checkpoint"):
        state(TALL, noise(60, 20, seed=5)).load_state_dict(first.state_dict())


def test_a_path_in_data_of_the_hub_is_no_file_of_this_machine() -> None:
    with pytest.raises(UserError, match="its image is the path '/etc/hostname' and not the file"):
        with_image_paths({"image": "/etc/hostname"}, "set train, row 1", None)
    cached = {"image": {"bytes": None, "path": "/cache/a.png"}}
    assert with_image_paths(cached, "set train, row 1", None) == cached
