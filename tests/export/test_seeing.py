"""What is exported of a model that sees answers about images in transformers and peft as it did here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from grpo.config.schema import Lora, Model, config_toml, parse_config
from grpo.errors import UserError
from grpo.export.build import export
from grpo.images import Image
from grpo.model.adapter_config import read_adapter_config
from grpo.model.base_weights import BaseWeights
from grpo.model.image_tokens import ImageTokens
from grpo.model.source import open_source
from grpo.policy.adapter_files import AdapterFile
from grpo.policy.policy import Policy
from grpo.policy.vision_tower import VisionTower
from grpo.run.checkpoint import CONFIG
from tests.helpers.seeing import PLACEHOLDER, noise, prompt_ids, save_seeing

CPU = torch.device("cpu")
COMPLETION = [5, 77, 12, 9]


class Made(NamedTuple):
    run: Path
    prompt: list[int]
    images: tuple[Image, ...]
    ours: Tensor
    """Logprobs of COMPLETION here, in float32."""
    base: Tensor
    """The same without the adapter."""
    tokens: ImageTokens


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp(request.param)
    save_seeing(folder / "model", request.param)
    settings = Model(name=str(folder / "model"), load_in_4bit=False, dtype="float32", images=True)
    source = open_source(settings)
    tokens = ImageTokens(folder / "model", source.vision)
    tower = VisionTower(source, tokens, device=CPU, dtype=torch.float32)
    base = BaseWeights(source, settings, device=CPU, dtype=torch.float32)
    policy = Policy(base, Lora(r=4), base_name=settings.name, kernels="torch", tower=tower)
    images = (noise(24, 16, 0), noise(16, 16, 1))
    prompt = prompt_ids(5, images[0], 9, images[1], 33, tokens=tokens)
    scores = []
    for scale in (0.0, 0.1):
        with torch.no_grad():
            for layer in policy.adapter_layers().values():
                for weight in layer.lora_B.values():
                    weight.weight.normal_(generator=torch.Generator().manual_seed(1)).mul_(scale)
            scores.append(policy.score([prompt], [COMPLETION], temperature=1.0, images=[images]).logprobs.clone())
    run = folder / "run"
    policy.save_adapter(run / "adapter")
    model = {"name": settings.name, "load_in_4bit": False, "dtype": "float32", "images": True}
    (run / CONFIG).write_text(config_toml(parse_config({"model": model, "task": {"name": "shapes"}, "lora": {"r": 4}})))
    return Made(run, prompt, images, scores[1], scores[0], tokens)


def with_pixels(model: Any, made: Made) -> Tensor:
    """transformers' own logprobs of COMPLETION; media tokens are out of reach, as here."""
    seen = [made.tokens.pixels(image) for image in made.images]
    ids = torch.tensor([made.prompt + COMPLETION])
    with torch.no_grad():
        logits = model.eval()(
            input_ids=ids,
            pixel_values=torch.cat([pixels for pixels, _ in seen]).to(model.dtype),
            image_grid_thw=torch.tensor([grid for _, grid in seen]),
            mm_token_type_ids=(ids == PLACEHOLDER).int(),
        ).logits[0, len(made.prompt) - 1 : -1].float()  # fmt: skip
    logits[:, list(made.tokens.media_ids)] = -torch.inf
    return torch.log_softmax(logits, -1)[range(len(COMPLETION)), COMPLETION]


def test_an_adapter_is_the_same_in_peft_on_the_whole_model(made: Made, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    folder = export(made.run, to="adapter", out=tmp_path / "adapter", notice=lambda text: None)
    whole = AutoModelForImageTextToText.from_pretrained(made.run.parent / "model", dtype=torch.float32)
    model = PeftModel.from_pretrained(whole, folder)
    adapted = {name for name, module in model.named_modules() if name.endswith("lora_A")}
    assert adapted and not [name for name in adapted if "visual" in name]
    assert (made.ours - made.base).abs().max() > 0.1
    torch.testing.assert_close(with_pixels(model, made), made.ours, atol=1e-4, rtol=1e-4)
    # And it is read here under those names too.
    again = AdapterFile(read_adapter_config(folder))
    assert again.names == AdapterFile(read_adapter_config(made.run / "adapter")).names


def test_a_merged_model_has_its_tower_and_answers_as_base_and_adapter(made: Made, tmp_path: Path) -> None:
    from transformers import AutoImageProcessor, AutoModelForImageTextToText

    folder = export(made.run, to="merged-16bit", out=tmp_path / "merged", notice=lambda text: None)
    model, loading = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    found, effect = with_pixels(model, made), made.ours - made.base
    # The weights were rounded to bfloat16 once; the adapter's effect is there.
    assert float(((found - made.base) * effect).sum() / effect.square().sum()) == pytest.approx(1, abs=0.2)
    assert AutoImageProcessor.from_pretrained(folder, backend="pil").patch_size == made.tokens.processor.patch_size
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] in ("qwen2_5_vl", "qwen3_vl") and "vision_config" in config
    # It is a base that sees, here too.
    assert open_source(Model(name=str(folder), images=True)).tower


def test_4_bit_is_refused_and_leaves_nothing(made: Made, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a model that sees is not written in 4 bit; export merged-16bit"):
        export(made.run, to="merged-4bit", out=tmp_path / "packed", notice=lambda text: None)
    assert not (tmp_path / "packed").exists()
