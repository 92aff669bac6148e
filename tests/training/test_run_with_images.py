"""A whole run on images: rewards see them, the log and the report show them, and what comes after a run takes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grpo.evaluate import main as evaluate
from grpo.generate import main as generate
from grpo.report.data import read_run
from grpo.train import main as train
from tests.helpers.seeing import save_seeing_chat
from tests.helpers.tiny_run import read_metrics, run_tables, write_config

pytestmark = pytest.mark.vllm

REWARDS = '''
def light(completions, images, image, **kwargs):
    """Of letters, more in a light image: no two groups are rewarded alike without it."""
    assert all(seen == [one] and one.size == (32, 32) and one.mode == "RGB" for seen, one in zip(images, image))
    scales = [sum(one.resize((1, 1)).getpixel((0, 0))) / 765 for one in image]
    letters = [sum(c.isalpha() for c in completion[-1]["content"]) for completion in completions]
    return [scale * count for scale, count in zip(scales, letters)]
'''
SHAPES = {"kinds": ["count"], "grid": 2, "side": 32, "largest": 2, "rows": 12, "held_out": 4}


def tables(folder: Path, **changes: Any) -> dict[str, Any]:
    (folder / "scores.py").write_text(REWARDS)
    values = run_tables(
        folder,
        model={"images": True},
        task={"name": "grpo.tasks.shapes:load", "options": SHAPES},
        rewards=[{"function": f"{folder / 'scores.py'}:light"}],
        train={"learning_rate": 1e-2, "max_steps": 2},
        checkpoint={"output_dir": str(folder / "run"), "save_steps": 1},
        log={"samples_every": 1},
    )
    values["eval"] = {"every": 2, "limit": 4, "num_generations": 1, "pass_at": [1]}
    for section, keys in changes.items():
        values[section] = {**values[section], **keys}
    return values


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seeing")
    save_seeing_chat(folder / "model")
    assert train([str(write_config(folder / "run.toml", tables(folder)))]) == 0
    return folder


def test_a_run_trains_on_what_it_sees_and_keeps_it(folder: Path) -> None:
    metrics = read_metrics(folder / "run")
    assert [entry["step"] for entry in metrics] == [1, 2]
    assert all(entry["mismatch_kl"] < 1e-6 and entry["grad_norm"] > 0 for entry in metrics)
    found = read_run(folder / "run")
    shown = {name for group in found.groups for name in group["images"]}
    assert {group["kind"] for group in found.groups} == {"training", "held out"}
    assert shown == set(found.images) and len(shown) >= 6
    assert '"images":{"' in (folder / "run" / "report.html").read_text()


def test_a_run_is_evaluated_and_asked_with_images(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = folder / "samples.jsonl"
    assert evaluate([str(folder / "run"), "--samples", str(samples)]) == 0
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(rows) == 4 and all(len(row["images"]) == 1 and "image" not in row for row in rows)
    from grpo.images import Image
    from grpo.tasks.shapes import load

    row = load(**SHAPES).eval[0]
    assert isinstance(row["image"], Image) and row["image"].digest == rows[0]["images"][0]
    row["image"].pil().save(folder / "shown.png")
    capsys.readouterr()
    said = []
    for image in (["--image", str(folder / "shown.png")], []):
        question = row["prompt"][0]["content"][1]["text"]
        assert generate([str(folder / "run"), question, "--max-tokens", "12", *image]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] != said[1]


def test_what_generate_cannot_show_is_a_sentence(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, sentence in (
        (["--image", "nowhere.png"], "--image: its image nowhere.png cannot be read"),
        (["--image", str(folder / "run.toml")], "it must be a whole file of the kinds"),
    ):
        assert generate([str(folder / "run"), "what?", *arguments]) == 2
        assert sentence in capsys.readouterr().err
    (folder / "seen.png").write_bytes(b"")
    assert generate([str(folder / "run"), "what?", "--raw", "--image", str(folder / "seen.png")]) == 2
    assert "--image and --raw" in capsys.readouterr().err


def test_a_model_read_as_one_of_text_says_what_to_set(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(write_config(folder / "text.toml", tables(folder, checkpoint={"output_dir": str(folder / "text")})))
    assert train([config, "--set", "model.images=false"]) == 2
    assert "training row 1: it has images, and the model is read as one of text alone; set model.images = true" in (
        capsys.readouterr().err
    )


def test_a_run_goes_on_where_it_was_and_only_with_its_images(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(["--resume", str(folder / "run"), "--set", "train.max_steps=3"]) == 0
    assert [entry["step"] for entry in read_metrics(folder / "run")] == [1, 2, 3]
    other = "task.options={ kinds = ['count'], grid = 2, side = 32, largest = 2, rows = 12, held_out = 4, seed = 5 }"
    assert train(["--resume", str(folder / "run"), "--set", "train.max_steps=4", "--set", other]) == 2
    assert "the training prompts are not those of the checkpoint" in capsys.readouterr().err
