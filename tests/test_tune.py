"""python -m grpo.tune: what it accepts and refuses, and what it prints."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch

from grpo import tune
from grpo.kernels import cards, nf4_plans, nf4_tiles, nf4_tuner
from grpo.kernels.cards import KB, MB, Card
from grpo.kernels.nf4_tuner import Measured
from grpo.run import tiles
from tests.helpers.tiny_run import run_tables, save_tiny_chat_model, write_config

A10 = Card("NVIDIA A10", 86, 99 * KB, 72, 6 * MB)
T4 = Card("Tesla T4", 75, 64 * KB, 40, 4 * MB)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one sentence with which these arguments are refused."""
    assert tune.main(arguments) == 2
    out, error = capsys.readouterr()
    assert out.count("\n") <= 1 and error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    "text", ["", "4096", "4096x", "x4096", "4095x4096", "4096x4097", "0x64", "8x0", "-8x64", "8x64;"]
)
def test_a_shape_that_is_none_is_refused(capsys, text):
    assert f"--shapes {text}: give rows x columns" in refused(capsys, f"--shapes={text}")


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf"])
def test_a_time_that_is_none_is_refused(capsys, seconds):
    assert f"--seconds {seconds}: give a number" in refused(capsys, f"--seconds={seconds}")


def test_a_result_without_a_folder_is_refused_before_measuring(capsys, tmp_path):
    assert "there is no folder" in refused(capsys, "--out", str(tmp_path / "none" / "out.json"))


def test_a_configuration_gives_the_shapes_of_its_models_products(tmp_path):
    save_tiny_chat_model(tmp_path / "model")
    config = write_config(tmp_path / "run.toml", run_tables(tmp_path))
    shapes = tune.wanted_shapes(tune.parser().parse_args(["--config", str(config)]))
    assert len(shapes) == 4 and all(rows % 8 == 0 and columns % 64 == 0 for rows, columns in shapes)
    assert tune.wanted_shapes(tune.parser().parse_args([])) == list(tune.USUAL)
    assert tune.wanted_shapes(tune.parser().parse_args(["--shapes", "64x128, 8x64"])) == [(64, 128), (8, 64)]


def test_without_a_gpu_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert "cuda" in refused(capsys).lower()


@pytest.fixture
def card(monkeypatch, tmp_path):
    """Pretend a card; its measurements are those of the CPU's dequantised product, with made-up times."""

    def pretend(found: Card) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setattr(nf4_plans, "_added", {})
        monkeypatch.setattr(tune, "check_machine", lambda wanted, engine: None)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(cards, "card", lambda device: found)
        copies = nf4_tuner.random_copies
        monkeypatch.setattr(nf4_tuner, "random_copies", lambda card, shape, dtype: copies(card, shape, dtype, "cpu"))
        monkeypatch.setattr(
            nf4_tuner, "microseconds", lambda copies, call, milliseconds: call(copies[0]) is not None and 7.0
        )
        monkeypatch.setattr(tune, "bitsandbytes_copies", lambda weight, count: [])

    return pretend


def measured(shapes, card, dtype, seconds, *, thorough, say):
    found = {}
    for shape in shapes:
        plan = nf4_tiles.default_plan(card, shape)
        times = {(rows, plan.split, tile): 5.0 for rows, tile in plan.tiles}
        found[shape] = Measured(plan, times, {rows: 9.0 for rows, _ in plan.tiles} | {512: 9.0})
    return found


def test_it_prints_a_table_keeps_the_plans_and_ends_with_json(capsys, monkeypatch, tmp_path, card):
    card(A10)
    monkeypatch.setattr(nf4_tuner, "tune", measured)
    assert tune.main(["--shapes", "64x128", "--out", str(tmp_path / "out.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "NVIDIA A10: sm_86, 72 multiprocessors, 99 KB of shared memory, 6 MB of L2 cache"
    assert any(line.split() == ["64x128", "16", "5.0", "9.0", "7.0", "-"] for line in lines)
    assert any(line.split() == ["64x128", "512", "-", "9.0", "7.0", "-"] for line in lines)
    assert f"kept in {tiles.cache_file(A10)}" in lines
    assert json.loads(lines[-1])["card"]["name"] == "NVIDIA A10"
    assert json.loads((tmp_path / "out.json").read_text())["plans"].keys() == {"64x128"}
    nf4_plans._added.clear()
    tiles.load_measured(A10)
    assert nf4_plans.plan_for(A10, (64, 128)) == nf4_tiles.default_plan(A10, (64, 128))


def test_what_the_card_cannot_fuse_is_refused(capsys, card):
    card(T4)
    assert tune.main(["--dtype", "bfloat16"]) == 2
    assert "Tesla T4 (sm_75) has no fused 4-bit product in bfloat16" in capsys.readouterr().err


def test_too_little_time_is_refused(capsys, monkeypatch, card):
    card(A10)
    monkeypatch.setattr(nf4_tuner, "tune", lambda *arguments, **options: {})
    assert tune.main(["--seconds", "1"]) == 2
    assert "give a larger --seconds" in capsys.readouterr().err
