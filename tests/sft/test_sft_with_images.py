"""Imitating answers about images: the loss is transformers' own with pixels, packed or padded, and a run learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo.config.schema import Lora, Model
from grpo.errors import UserError
from grpo.model.base_weights import BaseWeights
from grpo.model.image_tokens import ImageTokens
from grpo.model.source import open_source
from grpo.policy.policy import Policy
from grpo.policy.vision_tower import VisionTower
from grpo.sft.__main__ import main
from grpo.sft.config import Sft
from grpo.sft.data import Example, load_examples
from grpo.sft.evaluation import held_out_loss
from grpo.sft.forms import chat_of
from tests.helpers.pictures import noise
from tests.helpers.seeing import save_seeing_chat
from tests.helpers.tiny_run import read_metrics

CPU = torch.device("cpu")
WIDE, TALL, SMALL = (noise(*size, seed=1) for size in ((40, 16), (16, 24), (16, 16)))
ROWS = [
    {"prompt": [{"role": "user", "content": "What is this?"}], "completion": "It is wide.", "image": WIDE},
    {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good morning"}]},
    {"prompt": "<image> or <image>?", "completion": "The first.", "images": [TALL, SMALL]},
    {"prompt": "And this?", "completion": "It is wide.", "image": WIDE},
]
ROWS[0]["completion"] = [{"role": "assistant", "content": "It is wide."}]


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Policy, Any]:
    """transformers' model, our graph over the same weights, and the tokenizer."""
    from transformers import AutoModelForImageTextToText

    folder = save_seeing_chat(tmp_path_factory.mktemp(request.param), request.param)
    settings = Model(name=str(folder), load_in_4bit=False, dtype="float32", images=True)
    source = open_source(settings)
    base = BaseWeights(source, settings, device=CPU, dtype=torch.float32)
    tower = VisionTower(source, ImageTokens(folder, source.vision), device=CPU, dtype=torch.float32)
    policy = Policy(base, Lora(r=2), kernels="torch", tower=tower)
    with torch.no_grad():
        for layer in policy.adapter_layers().values():
            for weight in layer.lora_B.values():
                weight.weight.zero_()  # the base alone is compared
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    return model, policy, source.tokenizer()


def encoded(policy: Policy, tokenizer: Any, rows: Any = ROWS, **keys: Any) -> list[Example]:
    assert policy.tower is not None
    stops = [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    return load_examples(
        Sft(path="x", **keys), rows, tokenizer, stops, 0, image_tokens=policy.tower.image_tokens
    ).examples


def with_pixels(model: Any, example: Example, tokens: ImageTokens) -> Tensor:
    """transformers' loss of one example, summed over its trained tokens."""
    ids, labels = torch.tensor([example.input_ids]), torch.tensor(example.labels)
    given: dict[str, Any] = {}
    if example.images:
        seen = [tokens.pixels(image) for image in example.images]
        given = {
            "pixel_values": torch.cat([pixels for pixels, _ in seen]),
            "image_grid_thw": torch.tensor([grid for _, grid in seen]),
            "mm_token_type_ids": (ids == tokens.vision.image_token_id).int(),
        }
    logits = model(input_ids=ids, **given).logits[0].float()
    return torch.nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")


def show(policy: Policy, examples: list[Example]) -> list[Example]:
    from grpo.sft.data import SftData
    from grpo.sft.trainer import mark_images

    data = SftData(examples=list(examples))
    mark_images(policy, data)
    return data.examples


def test_an_examples_labels_are_the_answer_and_no_token_of_an_image(loaded: tuple[Any, Policy, Any]) -> None:
    _, policy, tokenizer = loaded
    examples = encoded(policy, tokenizer)
    assert policy.tower is not None
    tokens = policy.tower.image_tokens
    sizes = [sum(tokens.tokens(image.width, image.height) for image in example.images) for example in examples]
    placeholder = tokens.vision.image_token_id
    assert [example.input_ids.count(placeholder) for example in examples] == sizes and sizes[0] > 0 == sizes[1]
    said = [tokenizer.decode([label for label in example.labels if label >= 0]) for example in examples]
    assert [text.removesuffix("<|im_end|>") for text in said] == [
        "It is wide.",
        "Good morning",
        "The first.",
        "It is wide.",
    ]
    assert [len(example.images) for example in examples] == [1, 0, 2, 1]


def test_the_loss_is_transformers_own_with_pixels(loaded: tuple[Any, Policy, Any]) -> None:
    model, policy, tokenizer = loaded
    examples = encoded(policy, tokenizer)
    assert policy.tower is not None
    with torch.no_grad():
        expected = [float(with_pixels(model, example, policy.tower.image_tokens)) for example in examples]
    marked = show(policy, examples)
    count = sum(label >= 0 for example in examples for label in example.labels[1:])
    for tokens in (1, 10_000):  # one example at a time, or all in one row
        found = held_out_loss(policy, marked, tokens)
        assert found["eval_tokens"] == count
        assert found["eval/loss"] == pytest.approx(sum(expected) / count, abs=2e-5)


def padded(examples: list[Example], policy: Policy) -> Tensor:
    """The loss in training of a batch with padding."""
    length = max(len(example.input_ids) for example in examples)
    ids, labels, mask = (torch.full((len(examples), length), fill) for fill in (0, -100, 0))
    for row, example in enumerate(examples):
        count = len(example.input_ids)
        ids[row, :count], mask[row, :count] = torch.tensor(example.input_ids), 1
        labels[row, :count] = torch.tensor(example.labels)
    policy.model.train()
    return policy.decoder(input_ids=ids, attention_mask=mask, labels=labels).loss


def test_padding_and_packing_give_one_loss_and_one_gradient(loaded: tuple[Any, Policy, Any]) -> None:
    model, policy, tokenizer = loaded
    examples = show(policy, encoded(policy, tokenizer))
    weights = [weight for weight in policy.model.parameters() if weight.requires_grad]

    def gradient(loss: Tensor) -> Tensor:
        return torch.cat([each.flatten() for each in torch.autograd.grad(loss, weights)])

    ids = torch.tensor([[token for example in examples for token in example.input_ids]])
    positions = torch.tensor([[place for example in examples for place in range(len(example.input_ids))]])
    labels = torch.tensor([[label for example in examples for label in (-100, *example.labels[1:])]])
    policy.model.train()
    packed = policy.decoder(input_ids=ids, position_ids=positions, labels=labels).loss
    by_padding = padded(examples, policy)
    assert float(packed.detach()) == pytest.approx(float(by_padding.detach()), abs=1e-6)
    first, second = gradient(packed), gradient(by_padding)
    assert first.norm() > 0 and (first - second).norm() < 1e-4 * first.norm()
    # In one of two that begin alike up to an image, the other image counts.
    pair = [examples[0], examples[3]]
    alone = [float(padded([each], policy).detach()) for each in pair]
    assert alone[0] != alone[1]


def test_images_differ_in_what_is_learned_from_them(loaded: tuple[Any, Policy, Any]) -> None:
    _, policy, tokenizer = loaded
    losses = []
    for image in (WIDE, noise(40, 16, seed=9)):
        losses.append(held_out_loss(policy, show(policy, encoded(policy, tokenizer, [{**ROWS[3], "image": image}])), 1))
    assert abs(losses[0]["eval/loss"] - losses[1]["eval/loss"]) > 1e-3


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "q", "completion": "a", "image": "nowhere.png"}, "row 1: its image nowhere.png cannot be read"),
        (
            {"messages": [{"role": "user", "content": [{"type": "video"}]}, {"role": "assistant", "content": "a"}]},
            "no text or image but video",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "q"},
                    {"role": "assistant", "content": [{"type": "image", "image": WIDE}]},
                ]
            },
            "an answer of the assistant has an image",
        ),
    ],
)
def test_what_cannot_be_used_is_named(row: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        chat_of(row, Sft(path="x"), "row 1")


def test_plain_text_and_models_of_text_take_no_images(loaded: tuple[Any, Policy, Any]) -> None:
    _, policy, tokenizer = loaded
    with pytest.raises(UserError, match="plain text has no place for its images"):
        encoded(policy, tokenizer, ROWS[3:], chat=False)
    with pytest.raises(UserError, match="read as one of text alone"):
        load_examples(Sft(path="x"), ROWS[3:], tokenizer, [2], 0)
    with pytest.raises(UserError, match="0 images"):
        encoded(policy, tokenizer, [{"prompt": "<|image_pad|>", "completion": "a"}])


def test_a_run_learns_from_images_beside_the_file(tmp_path: Path) -> None:
    """Two images, asked the same: only who sees them can tell which answer is whose."""
    folder = save_seeing_chat(tmp_path / "model")
    data = tmp_path / "data"
    data.mkdir()
    rows = []
    for name, colour in (("a", (255, 0, 0)), ("b", (0, 0, 255))):
        from PIL import Image as pil

        pil.new("RGB", (16, 16), colour).save(data / f"{name}.png")
        rows += [{"prompt": "Which?", "completion": name, "image": f"{name}.png"}] * 4
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tmp_path / "sft.toml"
    config.write_text(
        f"""
[model]
name = "{folder}"
images = true
load_in_4bit = false
dtype = "float32"
[lora]
r = 16
[sft]
path = "{data}"
max_length = 64
per_device_train_batch_size = 8
[train]
learning_rate = 2e-3
lr_scheduler_type = "constant"
warmup_ratio = 0.0
max_steps = 10
seed = 1
[checkpoint]
output_dir = "{tmp_path / "run"}"
save_steps = 5
"""
    )
    assert main([str(config)]) == 0
    losses = [entry["loss"] for entry in read_metrics(tmp_path / "run")]
    assert losses[0] > 1 and losses[-1] < 0.15, losses  # who does not see has ln 2 / 2 per token at best
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    assert main(["--resume", str(tmp_path / "run"), "--set", "train.max_steps=11"]) == 0
    assert [entry["step"] for entry in read_metrics(tmp_path / "run")] == list(range(1, 12))


def test_a_dry_run_plans_the_tower_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "sft.toml"
    config.write_text('[model]\nname = "Qwen/Qwen2.5-VL-3B-Instruct"\nimages = true\n[sft]\npath = "rows.jsonl"\n')
    assert main([str(config), "--dry-run", "--card", "T4"]) == 0
    seeing = capsys.readouterr().out
    assert "vision tower and images' embeddings" in seeing and "Fits the T4 with" in seeing
    assert main([str(config), "--dry-run", "--card", "T4", "--set", "model.images=false"]) == 0
    assert "tower" not in capsys.readouterr().out.split("# Memory")[1]
