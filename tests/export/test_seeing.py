"""Exports of an adapter on a model that takes images: whole models, and adapters that peft puts on one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

from grpo.config.schema import Lora, Model
from grpo.config.toml import write_toml
from grpo.errors import UserError
from grpo.export.build import export
from grpo.model.base_weights import BaseWeights
from grpo.model.image_tokens import ImageTokens
from grpo.model.source import open_source
from grpo.policy.policy import Policy
from grpo.policy.vision_tower import VisionTower
from tests.helpers.seeing import PLACEHOLDER, SEEING, noise, prompt_ids, save_seeing

COMPLETION = [8, 15, 99, 4, 20]


class Made:
    """A run's folder: a configuration, an adapter that was moved, its base; and its policy."""

    def __init__(self, folder: Path, family: str, **lora: Any):
        self.base, self.run, self.out = folder / "base", folder / "run", folder / "out"
        save_seeing(self.base, family)
        model = Model(name=str(self.base), load_in_4bit=False, dtype="float32", images=True)
        source = open_source(model)
        assert source.vision is not None
        self.tokens = ImageTokens(self.base, source.vision)
        base = BaseWeights(source, model, device=torch.device("cpu"), dtype=torch.float32)
        tower = VisionTower(source, self.tokens, device=base.device, dtype=base.dtype)
        self.policy = Policy(base, Lora(r=4, **lora), kernels="torch", tower=tower, base_name=str(self.base))
        generator = torch.Generator().manual_seed(1)
        for layer in self.policy.adapter_layers().values():
            weight = layer.lora_B["default"].weight
            weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
        self.policy.save_adapter(self.run / "adapter")
        tables = {
            "model": {"name": str(self.base), "load_in_4bit": False, "dtype": "float32", "images": True},
            "lora": {"r": 4, **lora},
            "task": {"name": "arithmetic"},
        }
        (self.run / "config.toml").write_text(write_toml(tables))
        self.image = noise(24, 16, 0)
        self.prompt = prompt_ids(5, self.image, 9, tokens=self.tokens)

    def logprobs(self) -> Tensor:
        with torch.no_grad():
            return self.policy.score([self.prompt], [COMPLETION], temperature=1.0, images=[[self.image]]).logprobs

    def theirs(self, model: Any) -> Tensor:
        pixels, grid = self.tokens.pixels(self.image)
        ids = torch.tensor([self.prompt + COMPLETION])
        with torch.no_grad():
            logits = model(
                input_ids=ids,
                pixel_values=pixels,
                image_grid_thw=torch.tensor([grid]),
                mm_token_type_ids=(ids == PLACEHOLDER).int(),
            ).logits[0, len(self.prompt) - 1 : -1]
        logits[:, list(self.tokens.media_ids)] = -torch.inf
        return torch.log_softmax(logits.float(), -1)[range(len(COMPLETION)), COMPLETION]


def loaded(folder: Path) -> Any:
    model, report = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    return model.eval()


@pytest.mark.parametrize("family", list(SEEING))
def test_a_merged_model_is_whole_and_sees_what_base_and_adapter_see(family: str, tmp_path: Path) -> None:
    made = Made(tmp_path, family)
    notices: list[str] = []
    export(made.run, "merged-16bit", made.out, notice=notices.append)
    found, wanted, unmoved = made.theirs(loaded(made.out)), made.logprobs(), made.theirs(loaded(made.base))
    assert float((found - wanted).norm()) < 0.1 * float((wanted - unmoved).norm()), "rounding to bfloat16 alone"
    before = load_file(made.base / "model.safetensors")
    after = load_file(made.out / "model.safetensors")
    assert before.keys() == after.keys()
    tower = [name for name in before if "visual" in name]
    assert tower and all(after[name].equal(before[name].bfloat16()) for name in tower)
    assert (made.out / "preprocessor_config.json").read_text() == (made.base / "preprocessor_config.json").read_text()
    assert any("read back and compared" in notice for notice in notices)


def test_a_model_in_4_bit_keeps_its_tower_in_16(tmp_path: Path) -> None:
    made = Made(tmp_path, "qwen2_5_vl")
    export(made.run, "merged-4bit", made.out, notice=print)
    config = json.loads((made.out / "config.json").read_text())
    assert "visual" in config["quantization_config"]["llm_int8_skip_modules"]
    names = load_file(made.out / "model.safetensors")
    assert not any("visual" in name and "quant" in name for name in names)
    assert any(name.endswith("layers.0.mlp.down_proj.weight.absmax") for name in names)
    again = open_source(Model(name=str(made.out), images=True))
    assert again.stored_as == "NF4" and again.tower


@pytest.mark.parametrize(
    "lora",
    [{}, {"target_modules": r"model\.layers\.1\..*(q|down)_proj"}, {"exclude_modules": ["o_proj"]}],
    ids=["names", "a pattern", "left out"],
)
def test_peft_puts_an_adapter_on_the_whole_model_and_gets_the_same_in_float32(lora: Any, tmp_path: Path) -> None:
    made = Made(tmp_path, "qwen2_5_vl", **lora)
    export(made.run, "adapter", made.out, notice=print)
    model = PeftModel.from_pretrained(loaded(made.base), made.out)
    adapted = {name for name, _ in model.named_parameters() if "lora_A" in name}
    assert len(adapted) == len(made.policy.adapter_layers()) and not any("visual" in name for name in adapted)
    torch.testing.assert_close(made.theirs(model), made.logprobs(), atol=1e-4, rtol=0)


def test_an_exported_adapter_is_one_to_go_on_from(tmp_path: Path) -> None:
    made = Made(tmp_path, "qwen2_5_vl")
    export(made.run, "adapter", made.out, notice=print)
    before = [parameter.detach().clone() for parameter in made.policy.parameters()]
    for parameter in made.policy.parameters():
        parameter.data.zero_()
    made.policy.load_adapter(made.out)
    assert all(torch.equal(*pair) for pair in zip(made.policy.parameters(), before, strict=True))


def test_an_adapter_on_the_tower_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'visual.blocks.0.attn.qkv', which is in the vision tower"):
        Made(tmp_path, "qwen2_5_vl", target_modules=["q_proj", "visual.blocks.0.attn.qkv"])
