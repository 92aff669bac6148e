"""Images in prompts: vLLM, without a tower, and the training graph give the logprobs of transformers with pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo.config.schema import Lora, Model
from grpo.images import Image
from grpo.model.base_weights import BaseWeights
from grpo.model.image_tokens import ImageTokens, places
from grpo.model.source import open_source
from grpo.policy.policy import Policy
from grpo.policy.vision_tower import VisionTower
from grpo.rollout.engine import Engine
from grpo.rollout.types import EngineSettings, Request, SamplingSettings
from tests.helpers.seeing import PLACEHOLDER, SEEING, VIDEO, noise, prompt_ids, save_seeing

CPU = torch.device("cpu")
TOKENS = 24
ACCURACY = {"qwen3_5": 3e-4}
"""Of logprobs, where it is not 1e-4: gated DeltaNet is summed in chunks of another size by transformers."""

Prompt = tuple[list[int], tuple[Image, ...]]


def load(folder: Path, **keys: Any) -> Policy:
    model = Model(name=str(folder), **{"load_in_4bit": False, "dtype": "float32", "images": True, **keys})
    source = open_source(model)
    base = BaseWeights(source, model, device=CPU, dtype=torch.float32)
    tokens = ImageTokens(folder, source.vision)
    tower = VisionTower(source, tokens, device=CPU, dtype=torch.float32)
    return Policy(base, Lora(r=2), kernels="torch", tower=tower)


def example_prompts(tokens: ImageTokens) -> list[Prompt]:
    """Several images a prompt, of several sizes, and text alone between; two whose ids are the same, and longer than
    what vLLM keeps of a prompt in one block."""
    one, other, large, as_large = noise(24, 16, 0), noise(16, 40, 1), noise(64, 48, 2), noise(64, 48, 3)
    shown: list[tuple[Any, ...]] = [
        (5, large, 9, 33),
        (8, 64, 90, 11, 12),
        (5, as_large, 9, 33),
        (7, one, other, 21, one, 99),
        (other, 4),
    ]
    return [
        (prompt_ids(*parts, tokens=tokens), tuple(part for part in parts if isinstance(part, Image))) for parts in shown
    ]


def with_pixels(model: Any, prompt: Prompt, completion: list[int], tokens: ImageTokens, temperature: float) -> Tensor:
    """transformers' own logprobs of `completion`, from pixels, where media tokens are out of reach."""
    ids, images = prompt
    given: dict[str, Any] = {}
    whole = torch.tensor([ids + completion])
    if images:
        seen = [tokens.pixels(image) for image in images]
        given = {
            "pixel_values": torch.cat([pixels for pixels, _ in seen]),
            "image_grid_thw": torch.tensor([grid for _, grid in seen]),
            "mm_token_type_ids": (whole == PLACEHOLDER).int(),
        }
    with torch.no_grad():
        logits = model(input_ids=whole, **given).logits[0, len(ids) - 1 : -1].float()
    logits[:, [PLACEHOLDER, VIDEO]] = -torch.inf
    return torch.log_softmax(logits / temperature, -1)[range(len(completion)), completion]


@pytest.fixture(scope="module", params=list(SEEING))
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Policy]:
    folder = tmp_path_factory.mktemp(request.param)
    model = save_seeing(folder, request.param)
    return model, load(folder)


def assert_alike(model: Any, ours: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(ours, wanted, atol=ACCURACY.get(model.config.model_type, 1e-4), rtol=0)


def test_the_training_graph_gives_the_logprobs_of_transformers_with_pixels(loaded: tuple[Any, Policy]) -> None:
    model, policy = loaded
    assert policy.tower is not None
    tokens = policy.tower.image_tokens
    prompts = example_prompts(tokens)
    generator = torch.Generator().manual_seed(3)
    completions = [torch.randint(3, 150, (8,), generator=generator).tolist() for _ in range(2 * len(prompts))]
    rows = [prompt for prompt in prompts for _ in range(2)]
    for tree in (False, True):
        with torch.no_grad():
            scored = policy.score(
                [ids for ids, _ in rows], completions, temperature=0.9, images=[images for _, images in rows], tree=tree
            )
        wanted = [with_pixels(model, *pair, tokens, 0.9) for pair in zip(rows, completions, strict=True)]
        assert_alike(model, scored.logprobs, torch.cat(wanted))


def test_vllm_samples_with_the_same_logprobs_and_has_no_tower(loaded: tuple[Any, Policy]) -> None:
    model, policy = loaded
    assert policy.tower is not None
    tokens = policy.tower.image_tokens
    prompts = example_prompts(tokens)
    rows = [prompt for prompt in prompts for _ in range(2)]
    engine = Engine(policy.base, policy, EngineSettings(max_seq_length=128, max_num_seqs=8))
    sampling = SamplingSettings(temperature=0.9, max_tokens=TOKENS)
    try:
        before, done = policy.tower.encoded, []
        for seed in (0, 1):  # the second time on keys and values that vLLM kept, where it keeps any
            requests = [Request(n, ids, seed=n + 100 * seed, images=images) for n, (ids, images) in enumerate(rows)]
            done += sorted(engine.generate(requests, sampling), key=lambda completion: completion.request_id)
        assert policy.tower.encoded - before <= 4
        served = engine.vllm_model()
        ours = {tensor.data_ptr() for tensor in policy.base.tensors.values()}
        ours |= {segment.weight.data_ptr() for linear in policy.base.linears.values() for segment in linear.segments}
        ours |= {linear.bias.data_ptr() for linear in policy.base.linears.values() if linear.bias is not None}
        assert all(parameter.data_ptr() in ours for parameter in served.parameters()), "no tower"
    finally:
        engine.close()
    for completion, prompt in zip(done, rows + rows, strict=True):
        assert not {PLACEHOLDER, VIDEO} & set(completion.token_ids)
        wanted = with_pixels(model, prompt, completion.token_ids, tokens, 0.9)
        assert_alike(model, torch.tensor(completion.logprobs), wanted)


def test_places_of_images_are_those_of_their_placeholders() -> None:
    ids = [5, PLACEHOLDER, PLACEHOLDER, PLACEHOLDER, 7, PLACEHOLDER]
    assert places(ids, PLACEHOLDER, [2, 1, 1]) == [1, 3, 5]
    for sizes in ([2, 1], [3], [4, 1], [3, 1, 1]):
        with pytest.raises(ValueError, match="placeholders"):
            places(ids, PLACEHOLDER, sizes)
