"""Run folders and checkpoints: taken by one process, whole or absent, and readable without running anything."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from grpo.config.schema import Config, parse_config
from grpo.errors import UserError
from grpo.monitor.run_log import RunLog
from grpo.run import checkpoint
from grpo.run.checkpoint import (
    check_resumable,
    create_run_folder,
    latest,
    open_run,
    save,
    saved_config,
    step_numbers,
    write_atomically,
)
from grpo.run.tensor_state import load_tensors, packed, save_tensors, unpacked
from tests.helpers.paths import ROOT


def config_for(folder: Path, **sections: dict[str, Any]) -> Config:
    values: dict[str, Any] = {"model": {"name": "m"}, "task": {"name": "t"}, "checkpoint": {"output_dir": str(folder)}}
    for section, keys in sections.items():
        values[section] = {**values.get(section, {}), **keys}
    return parse_config(values)


def writer(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "adapter").mkdir()
        (folder / "adapter" / "weights").write_text(text)
        (folder / "state").write_text(text * 1000)

    return write


def saved_text(run: Path) -> str | None:
    folder = latest(run, notice=lambda sentence: None)
    return None if folder is None else (folder / "adapter" / "weights").read_text()


def test_a_new_run_folder_holds_the_resolved_configuration(tmp_path: Path) -> None:
    config = config_for(tmp_path / "runs" / "a", train={"max_steps": 3})
    with open_run(config) as run:
        (run.path / "metrics.jsonl").write_text("{}\n")
        assert saved_config(run.path) == config


def test_an_existing_run_is_refused_with_both_remedies(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "metrics.jsonl").touch()
    before = sorted((tmp_path / "a").iterdir())
    with pytest.raises(UserError, match="a already exists; continue that run with --resume, or .* --output"):
        create_run_folder(tmp_path / "a", resume=False)
    assert sorted((tmp_path / "a").iterdir()) == before
    (tmp_path / "b").touch()
    with pytest.raises(UserError, match="b already exists"):
        create_run_folder(tmp_path / "b", resume=False)


def test_a_folder_with_somebodys_config_is_not_taken_for_an_unused_run(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("mine")
    with pytest.raises(UserError, match="already exists"):
        create_run_folder(tmp_path, resume=False)
    assert (tmp_path / "config.toml").read_text() == "mine"


def test_a_run_that_ended_before_its_first_step_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with pytest.raises(UserError, match="no such column"), open_run(config_for(path)):
        (path / "eval.jsonl").write_text('{"step": 0}\n')
        (path / "completions").mkdir()
        (path / "completions" / "eval-0.jsonl").write_text('{"step": 0}\n')
        raise UserError("no such column")
    assert not path.exists()


def test_a_run_killed_before_its_first_step_does_not_block_the_next(tmp_path: Path) -> None:
    path = tmp_path / "a"
    killed = f"""
import os, pathlib, signal
from grpo.run.checkpoint import create_run_folder
run = create_run_folder(pathlib.Path({str(path)!r}), resume=False)
(run.path / "eval.jsonl").write_text("old")
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", killed], cwd=ROOT).returncode == -signal.SIGKILL
    assert (path / "eval.jsonl").exists()
    with create_run_folder(path, resume=False):
        assert [entry.name for entry in path.iterdir()] == [".lock"]


def test_resuming_where_there_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no run to resume here"):
        open_run(config_for(tmp_path / "nowhere"), resume=True)
    assert not (tmp_path / "nowhere").exists()


def test_a_place_that_cannot_be_written_is_a_sentence() -> None:
    with pytest.raises(UserError, match="/proc/run: cannot be written .*--output"):
        create_run_folder(Path("/proc/run"), resume=False)


def test_a_file_in_the_way_of_the_parent_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written .*--output"):
        create_run_folder(tmp_path / "file" / "run", resume=False)


def test_a_second_process_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    path = tmp_path / "a"
    config = config_for(path)
    holding = f"""
import pathlib, sys
from grpo.run.checkpoint import create_run_folder
run = create_run_folder(pathlib.Path({str(path)!r}), resume=False)
(run.path / "metrics.jsonl").write_text("")
(run.path / "config.toml").write_text({checkpoint.config_toml(config)!r})
print("held", flush=True)
sys.stdin.read()
"""
    first = subprocess.Popen(
        [sys.executable, "-c", holding], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout is not None and first.stdout.readline() == "held\n"
    try:
        with pytest.raises(UserError, match=f"another process \\({first.pid}\\) is writing to this run folder"):
            open_run(config, resume=True)
    finally:
        first.kill()
        first.communicate()
    open_run(config, resume=True).close()


@pytest.mark.parametrize(
    ("section", "key", "value", "sentence"),
    [
        (
            "model",
            "name",
            "other",
            'model.name = "other" does not fit the run in .*, which has "m" and no sample.*; set it back',
        ),
        ("model", "load_in_4bit", False, "model.load_in_4bit = false does not fit .* has true"),
        ("model", "revision", "abc", 'model.revision = "abc" does not fit .* has "none"'),
        ("lora", "r", 8, "lora.r = 8 does not fit .* has 16; .*--output"),
        ("lora", "target_modules", ["q_proj"], 'lora.target_modules = \\["q_proj"\\] does not fit'),
        ("lora", "lora_alpha", 1, "lora.lora_alpha = 1.0 does not fit .* has 32.0"),
        ("task", "name", "u", 'task = \\[{ name = "u" }\\] does not fit'),
        ("train", "seed", 1, "train.seed = 1 does not fit .* has 0"),
    ],
)
def test_a_run_is_not_resumed_with_another_model_adapter_or_data(
    tmp_path: Path, section: str, key: str, value: Any, sentence: str
) -> None:
    with open_run(config_for(tmp_path / "a")) as run:
        (run.path / "metrics.jsonl").touch()
    before = (tmp_path / "a" / "config.toml").read_bytes()
    with pytest.raises(UserError, match=sentence):
        open_run(config_for(tmp_path / "a", **{section: {key: value}}), resume=True)
    assert (tmp_path / "a" / "config.toml").read_bytes() == before


def test_a_run_is_resumed_with_more_steps_another_rate_and_other_logging(tmp_path: Path) -> None:
    changed = config_for(
        tmp_path / "elsewhere",
        train={"max_steps": 500, "learning_rate": 1e-6, "tokens_per_micro_batch": 100},
        log={"samples_every": 3},
        eval={"every": 5},
        checkpoint={"save_steps": 7, "save_total_limit": 1},
        loss={"beta": 0.1},
        rollout={"prompts_per_step": 3},
        lora={"lora_dropout": 0.1},
    )
    check_resumable(config_for(tmp_path), changed)


def test_a_resumed_run_keeps_its_configuration_until_it_goes_on(tmp_path: Path) -> None:
    with open_run(config_for(tmp_path)) as run:
        (run.path / "metrics.jsonl").touch()
    file = tmp_path / "config.toml"
    before, changed = file.read_text(), config_for(tmp_path, train={"max_steps": 500})
    with open_run(changed, resume=True):
        assert file.read_text() == before, "what is refused from here on can be resumed as it was"
        with RunLog(tmp_path, changed, max_steps=500, console=Console(file=io.StringIO())) as log:
            log.resume(0)
    assert file.read_text() == checkpoint.config_toml(changed) != before


def test_latest_is_the_newest_checkpoint(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    for step in (2, 10, 9):
        save(tmp_path, step, writer(f"{step}"), keep=None)
        assert saved_text(tmp_path) == str(step)
    assert step_numbers(tmp_path) == [2, 9]  # 10 went when the run had gone back behind it


@pytest.mark.parametrize(("keep", "left"), [(1, [5]), (2, [4, 5]), (9, [1, 2, 3, 4, 5]), (None, [1, 2, 3, 4, 5])])
def test_only_the_newest_checkpoints_are_kept(tmp_path: Path, keep: int | None, left: list[int]) -> None:
    for step in range(1, 6):
        save(tmp_path, step, writer("x"), keep)
    assert step_numbers(tmp_path) == left
    assert {entry.name for entry in (tmp_path / "checkpoints").iterdir()} == {f"step-{step}" for step in left}


def damage_by_flipping_a_bit(folder: Path) -> None:
    data = bytearray((folder / "state").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "state").write_bytes(data)


def damage_by_truncating(folder: Path) -> None:
    os.truncate(folder / "state", 10)


def damage_by_removing_a_file(folder: Path) -> None:
    (folder / "adapter" / "weights").unlink()


def damage_by_removing_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def damage_by_emptying_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("")


def damage_by_nonsense_in_the_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("[1, 2]")


@pytest.mark.parametrize("damage", [value for name, value in list(globals().items()) if name.startswith("damage_")])
def test_a_damaged_checkpoint_is_passed_over_with_a_notice(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    save(tmp_path, 1, writer("one"), keep=None)
    newest = save(tmp_path, 2, writer("two"), keep=None)
    damage(newest)
    notices: list[str] = []
    found = latest(tmp_path, notices.append)
    assert found is not None and found.name == "step-1"
    assert len(notices) == 1 and "step-2 is passed over" in notices[0]
    # Saved again, it is whole again, and the older one is pruned only then.
    save(tmp_path, 2, writer("two again"), keep=1)
    assert saved_text(tmp_path) == "two again" and step_numbers(tmp_path) == [2]


def test_a_failed_write_leaves_the_checkpoints_before_it(tmp_path: Path) -> None:
    save(tmp_path, 1, writer("one"), keep=1)

    def full_disk(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="step-2: the checkpoint could not be written .*No space left.*--resume"):
        save(tmp_path, 2, full_disk, keep=1)

    def interrupted(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2, interrupted, keep=1)
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["step-1"]
    assert saved_text(tmp_path) == "one"


def test_a_process_killed_while_saving_loses_at_most_the_checkpoint_in_the_making(tmp_path: Path) -> None:
    saving = f"""
import pathlib
from grpo.run.checkpoint import save
def write(folder):
    for name in "abcdef":
        (folder / name).write_text(str(step) * 20000)
    (folder / "step").write_text(str(step))
step = 0
while True:
    step += 1
    save(pathlib.Path({str(tmp_path)!r}), step, write, keep=1)
    print(step, flush=True)
"""
    choose = random.Random(0)
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", saving], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for _ in range(3):
            done = int(process.stdout.readline())
        time.sleep(choose.uniform(0, 0.02))
        process.kill()
        rest = process.communicate()[0].split()
        done = int(rest[-1]) if rest else done
        found = latest(tmp_path, notice=pytest.fail)
        assert found is not None
        assert int((found / "step").read_text()) in (done, done + 1)


def test_the_manifest_lists_every_file_with_its_checksum(tmp_path: Path) -> None:
    folder = save(tmp_path, 3, writer("x"), keep=None)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["step"] == 3
    assert set(manifest["files"]) == {"adapter/weights", "state"}
    assert manifest["files"]["state"] == hashlib.sha256((folder / "state").read_bytes()).hexdigest()


def test_an_atomic_write_replaces_the_whole_file_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fails(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError):
        write_atomically(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


def test_nested_state_comes_back_with_its_types_and_bits(tmp_path: Path) -> None:
    shared = torch.randn(4, 6)
    parameter = torch.nn.Parameter(torch.randn(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    parameter.grad = torch.ones(3)
    optimizer.step()
    state = {
        "optimizer": optimizer.state_dict(),
        "views": [shared, shared[1:3], shared.t(), shared],
        "dtypes": [torch.tensor([1.5, float("nan")]).to(dtype) for dtype in (torch.bfloat16, torch.float16)],
        "generator": torch.Generator().manual_seed(3).get_state(),
        "python": random.Random(1).getstate(),
        "scalar": torch.tensor(2.0, dtype=torch.float64),
        "empty": [torch.empty(0, 5), {}, [], ()],
        "plain": {"none": None, "yes": True, "int": 2**100, "float": 0.1, "inf": float("-inf"), "text": '"\n\x00é'},
        7: {"7": "both kinds of key"},
    }
    save_tensors(tmp_path / "state.safetensors", state)
    assert_same(load_tensors(tmp_path / "state.safetensors"), state)
    assert_same(unpacked(packed(state)), state)
    optimizer.load_state_dict(load_tensors(tmp_path / "state.safetensors")["optimizer"])


def assert_same(found: Any, wanted: Any) -> None:
    if isinstance(wanted, torch.Tensor):
        assert found.dtype == wanted.dtype and found.shape == wanted.shape
        assert (
            found.contiguous().view(torch.uint8).equal(wanted.contiguous().view(torch.uint8))
            if wanted.ndim
            else (found.item() == wanted.item())
        )
        return
    assert type(found) is type(wanted)
    if isinstance(wanted, dict):
        assert list(found) == list(wanted)
        for key in wanted:
            assert_same(found[key], wanted[key])
    elif isinstance(wanted, list | tuple):
        assert len(found) == len(wanted)
        for pair in zip(found, wanted, strict=True):
            assert_same(*pair)
    else:
        assert found == wanted


@pytest.mark.parametrize(
    "value", [object(), {1.5: 2}, {1, 2}, b"bytes", {"f": print}], ids=lambda value: str(value)[:12]
)
def test_state_that_would_need_pickle_is_refused(tmp_path: Path, value: Any) -> None:
    with pytest.raises(TypeError, match="a checkpoint has no form for"):
        save_tensors(tmp_path / "state.safetensors", {"x": value})


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x04.", b"\x02\x00\x00\x00\x00\x00\x00\x00{}", b"PK\x03\x04" + b"\0" * 99]
)
def test_a_file_that_is_not_a_saved_state_is_a_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "state").write_bytes(content)
    with pytest.raises(UserError, match="state: not a saved state"):
        load_tensors(tmp_path / "state")
    with pytest.raises(UserError, match="nowhere: not a saved state"):
        load_tensors(tmp_path / "nowhere")
