"""Whole runs on prompts with images: each is encoded once, the two graphs agree, and a run goes on bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from grpo.rollout.types import Segment
from grpo.train import main
from grpo.training.batch import TrainingGroup, TrainingSequence, pack
from grpo.training.dump import decoded, encoded
from grpo.training.update_check import Batch
from tests.helpers.seeing import noise, save_seeing_chat
from tests.helpers.tiny_run import read_metrics, run_tables, save_rewards, write_config

PROMPTS = 2


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seeing")
    save_seeing_chat(folder / "model")
    save_rewards(folder)
    return folder


def start(home: Path, name: str, *arguments: str, **changes: Any) -> int:
    tables = run_tables(
        home,
        model={"images": True, "load_in_4bit": True},
        task={"name": "grpo.tasks.shapes:load", "options": {"side": 48, "rows": 6, "held_out": 2}},
        **{"rollout": {"prompts_per_step": PROMPTS, "max_prompt_length": 160}, **changes},
    )
    tables["checkpoint"]["output_dir"] = str(home / name)
    return main([str(write_config(home / f"{name}.toml", tables)), *arguments])


@pytest.mark.vllm
@pytest.mark.slow
def test_a_run_on_images_encodes_each_once_and_goes_on_where_it_stopped(home: Path) -> None:
    assert start(home, "straight", train={"max_steps": 4}) == 0
    entries = read_metrics(home / "straight")
    # One more in the first step: the gate's. Six rows: from the fourth step on they are seen again.
    encoded_images = [entry["images_encoded"] for entry in entries]
    assert encoded_images[:3] == [PROMPTS + 1, PROMPTS, PROMPTS]
    assert all(entry["mismatch_kl"] < 1e-6 and entry["grad_norm"] > 0 for entry in entries)
    assert start(home, "resumed", train={"max_steps": 2}, checkpoint={"save_steps": 2}) == 0
    assert start(home, "resumed", "--resume", train={"max_steps": 4}, checkpoint={"save_steps": 2}) == 0
    one, other = (load_file(home / name / "adapter" / "adapter_model.safetensors") for name in ("straight", "resumed"))
    assert one.keys() == other.keys() and all(tensor.equal(other[name]) for name, tensor in one.items())


def test_sequences_keep_their_images_in_a_dump() -> None:
    images = (noise(24, 16, 0), noise(16, 40, 1))
    later = [Segment([5], [9, 7], [False, True], images=images[:1]), Segment([5], [7])]
    sequence = TrainingSequence([5, 6], [7], [-1.0] * 3, 1.0, False, images=images, rewritten=later)
    found = decoded(encoded(Batch([TrainingGroup.of([sequence])], {})))
    (again,) = found.groups[0].sequences
    assert [tuple(part.images) for part in again.segments] == [images, images[:1], ()]
    assert again.images == images and [image.data for image in again.images] == [image.data for image in images]


def test_prompts_of_equal_tokens_and_other_images_are_not_counted_as_shared() -> None:
    one, other = noise(24, 16, 0), noise(24, 16, 1)

    def sequence(*images: Any) -> TrainingSequence:
        return TrainingSequence([5] * 30, [7] * 11, [-1.0] * 11, 1.0, False, images=images)

    for tree in (False, True):
        shared = pack([sequence(one), sequence(one)], 52 + tree, tree=tree)
        apart = pack([sequence(one), sequence(other)], 52 + tree, tree=tree)
        assert [len(batch) for batch in shared] == [2] and [len(batch) for batch in apart] == [1, 1]
