"""grpo/policy/adapter_survival.py on prompts with images: the same computation in both precisions, whatever a head's
rows are taken in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from grpo.config.schema import Lora, Model
from grpo.model.base_weights import BaseWeights
from grpo.model.image_tokens import ImageTokens
from grpo.model.source import open_source
from grpo.policy import adapter_survival as survival
from grpo.policy.policy import Policy
from grpo.policy.vision_tower import VisionTower
from tests.helpers.seeing import noise, prompt_ids, save_seeing


@pytest.mark.parametrize("rows", [64, 8192], ids=["in parts", "at once"])
def test_float32_logprobs_are_those_of_a_float32_policy(
    rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(survival, "HEAD_ROWS", rows)
    save_seeing(tmp_path, "qwen3_vl")
    model = Model(name=str(tmp_path), load_in_4bit=False, dtype="float32", images=True)
    source = open_source(model)
    assert source.vision is not None
    base = BaseWeights(source, model, device=torch.device("cpu"), dtype=torch.float32)
    tower = VisionTower(source, ImageTokens(tmp_path, source.vision), device=base.device, dtype=base.dtype)
    policy = Policy(base, Lora(r=2), kernels="torch", tower=tower)
    image = noise(24, 16, 0)
    prompts, completions, images = [prompt_ids(5, image, 9, tokens=tower.image_tokens)], [[8, 15, 99]], [[image]]
    with torch.no_grad():
        found = survival.float32_logprobs(
            policy,
            survival.float32_graph(policy),
            prompts,
            completions,
            policy.image_rows(prompts, completions, images),
        )
        wanted = policy.score(prompts, completions, temperature=1.0, images=images).logprobs
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
