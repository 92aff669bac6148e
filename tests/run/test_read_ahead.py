"""grpo/run/read_ahead.py: files of weights are asked for, where they are and have room, and nothing fails otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo.config.schema import Model, parse_config
from grpo.run import read_ahead
from grpo.train import start_ahead


def test_the_files_with_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("model-1.safetensors", "model-2.safetensors", "config.json", "notes.gguf.txt"):
        (tmp_path / name).write_bytes(b"x" * 5000)
    asked: list[list[str]] = []
    monkeypatch.setattr(read_ahead, "ask_for", lambda files: asked.append([file.name for file in files]))
    thread = read_ahead.read_ahead(Model(name=str(tmp_path)))
    assert thread is not None
    thread.join()
    assert asked == [["model-1.safetensors", "model-2.safetensors"]]


def test_a_file_that_has_gone_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"x" * 5000)
    assert read_ahead.weight_files(Model(name=str(tmp_path / "model.gguf"))) == [tmp_path / "model.gguf"]
    read_ahead.ask_for([tmp_path / "gone.safetensors", tmp_path / "model.gguf"])


def test_a_model_that_is_elsewhere_is_left() -> None:
    assert read_ahead.read_ahead(Model(name="nobody/has-this")) is None


def test_a_model_that_is_nowhere_is_refused_by_the_run_alone(tmp_path: Path) -> None:
    values = {"model": {"name": "./not-here"}, "task": {"name": "arithmetic"}}
    start_ahead(parse_config(values | {"checkpoint": {"output_dir": str(tmp_path)}}), alone=True)


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), KeyError("rope"), OSError(28, "no space")])
def test_whatever_fails_ahead_is_left_to_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*arguments: object) -> bool:
        raise error

    values = {"model": {"name": "nobody/has-this"}, "task": {"name": "arithmetic"}}
    config = parse_config(values | {"checkpoint": {"output_dir": str(tmp_path)}})
    for name in ("read_ahead", "begin"):
        with monkeypatch.context() as patched:
            patched.setattr(f"grpo.train.{name}", fail)
            start_ahead(config, alone=True)


def test_one_of_several_processes_starts_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr("grpo.train.begin", lambda config, own_decoding: asked.append(config) or False)
    values = {"model": {"name": "nobody/has-this"}, "task": {"name": "arithmetic"}}
    config = parse_config(values | {"checkpoint": {"output_dir": str(tmp_path)}})
    start_ahead(config, alone=False)
    assert asked == []
    start_ahead(config, alone=True)
    assert asked == [config]


def test_files_without_room_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_bytes(b"x" * 5000)
    monkeypatch.setattr(read_ahead, "free_memory", lambda: 9000)
    assert read_ahead.read_ahead(Model(name=str(tmp_path))) is None
    monkeypatch.setattr(read_ahead, "free_memory", lambda: 11000)
    thread = read_ahead.read_ahead(Model(name=str(tmp_path)))
    assert thread is not None
    thread.join()
