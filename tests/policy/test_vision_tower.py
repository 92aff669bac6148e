"""grpo/policy/vision_tower.py: what an image gives does not depend on others, and is kept by its pixels for a while."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from grpo.config.schema import Model
from grpo.memory.tower import TowerSizes
from grpo.model.image_tokens import ImageTokens
from grpo.model.source import open_source
from grpo.policy.vision_tower import VisionTower, whole
from tests.helpers.seeing import SEEING, noise, save_seeing


def tower_of(folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32, **keys: object) -> VisionTower:
    source = open_source(Model(name=str(folder), images=True))
    assert source.vision is not None
    tokens = ImageTokens(folder, source.vision)
    return VisionTower(source, tokens, device=torch.device(device), dtype=dtype, **keys)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", list(SEEING))
def test_an_image_gives_the_same_whatever_it_is_encoded_beside(family: str, tmp_path: Path) -> None:
    save_seeing(tmp_path, family)
    images = [noise(24, 16, 0), noise(16, 40, 1), noise(24, 16, 2)]
    together = tower_of(tmp_path).embed(images)
    for image, beside in zip(images, together, strict=True):
        (alone,) = tower_of(tmp_path).embed([image])
        assert alone.embeddings.equal(beside.embeddings) and alone.grid == beside.grid
    assert [len(each) for each in together] == [6, 10, 6]
    assert not together[0].embeddings.equal(together[2].embeddings)
    sizes = TowerSizes.of(open_source(Model(name=str(tmp_path), images=True)).vision.config.vision_config.to_dict())  # type: ignore[union-attr]
    assert together[0].embeddings.shape[1] == sizes.widths * sizes.out
    assert tower_of(tmp_path).nbytes() == pytest.approx(sizes.weight_bytes(4), rel=0.01)


def test_features_are_whole_whether_transformers_gives_them_in_pieces_or_not() -> None:
    features = torch.randn(6, 4)
    assert whole(features).equal(features) and whole(features.split([2, 4])).equal(features)


def test_equal_pixels_are_encoded_once_and_what_is_old_is_forgotten(tmp_path: Path) -> None:
    save_seeing(tmp_path, "qwen2_5_vl")
    images = [noise(24, 16, seed) for seed in range(4)]
    one = 6 * 128 * 4
    tower = tower_of(tmp_path, kept_bytes=3 * one)
    tower.embed([images[0], noise(24, 16, 0), images[1]])
    tower.embed([images[1], images[0]])
    assert tower.take_counts()["images_encoded"] == 2
    tower.embed([images[2]])
    tower.embed([images[3]])  # 1 was used before 0
    tower.embed([images[0]])
    assert tower.take_counts()["images_encoded"] == 2
    tower.embed([images[1]])
    assert tower.take_counts()["images_encoded"] == 1
    many = tower.embed(images)
    assert len(many) == 4, "more than are kept, in one call"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_tower_in_host_memory_gives_the_same_and_takes_nothing_between(tmp_path: Path) -> None:
    save_seeing(tmp_path, "qwen2_5_vl")
    image = noise(24, 16, 0)
    (resident,) = tower_of(tmp_path, "cuda", torch.bfloat16).embed([image])
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    tower = tower_of(tmp_path, "cuda", torch.bfloat16, offload=True)
    assert torch.cuda.memory_allocated() == before
    (moved,) = tower.embed([image])
    assert moved.embeddings.equal(resident.embeddings) and moved.embeddings.is_cuda
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before <= 2 * moved.embeddings.nbytes + 1024
