"""grpo/run/tiles.py: a GPU that no table names is measured once, and what was measured is found again."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from grpo.kernels import cards, nf4_plans, nf4_tiles, nf4_tuner
from grpo.kernels.cards import KB, MB, Card
from grpo.kernels.nf4_tuner import Measured
from grpo.run import tiles

UNKNOWN = Card("NVIDIA GeForce RTX 4090", 89, 99 * KB, 128, 72 * MB)
NAMED = Card("NVIDIA H100 80GB HBM3", 90, 227 * KB, 132, 50 * MB)
TURING = Card("Tesla T4", 75, 64 * KB, 40, 4 * MB)
SHAPES = [(2560, 2048), (2048, 2048), (2560, 2048)]
GPU = torch.device("cuda", 0)


class Start:
    """A first start on a card that is not there: what was measured, and what was said."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.card, self.free, self.measured, self.said = UNKNOWN, 8e9, [], []
        monkeypatch.setattr(cards, "card", lambda device: self.card)
        monkeypatch.setattr(nf4_tuner, "tune", self.tune)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (self.free, 24e9))
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())

    def tune(self, shapes, card, dtype, seconds, say):
        """Measurements in which the rule's plan was the best."""
        self.measured.append(list(shapes))
        return {shape: Measured(nf4_tiles.default_plan(card, shape), {}, {}) for shape in shapes}

    def __call__(self, dtype: torch.dtype = torch.bfloat16, shapes=SHAPES) -> None:
        nf4_plans._added.clear()
        tiles.prepare_tiles(GPU, shapes, dtype, self.said.append)


@pytest.fixture
def start(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(nf4_plans, "_added", {})
    return Start(monkeypatch)


def test_an_unknown_card_is_measured_once_and_found_again(start):
    start()
    assert start.measured == [[(2560, 2048), (2048, 2048)]]
    assert "measuring the 4-bit product on this NVIDIA GeForce RTX 4090, once, for at most 30 s" in start.said[0]
    assert str(tiles.cache_file(UNKNOWN)) in start.said[1]
    start()
    assert len(start.measured) == 1 and len(start.said) == 2, "an earlier start's file is taken without a word"
    expected = nf4_tiles.default_plan(UNKNOWN, (2560, 2048))
    assert nf4_plans.measured_shapes(UNKNOWN)[2560, 2048] == expected


def test_only_new_shapes_are_measured_and_the_file_keeps_both(start):
    start()
    start(shapes=[(2560, 2048), (22016, 2048)])
    assert start.measured[1] == [(22016, 2048)]
    kept = json.loads(tiles.cache_file(UNKNOWN).read_text())
    assert set(kept["shapes"]) == {"2560x2048", "2048x2048", "22016x2048"}


@pytest.mark.parametrize("changed", ["driver", "torch", "triton", "kernel", "multiprocessors"])
def test_another_driver_or_software_measures_again(start, monkeypatch, changed):
    start()
    if changed == "driver":
        monkeypatch.setattr(tiles, "driver_version", lambda: "999.99")
    elif changed == "kernel":
        monkeypatch.setattr(nf4_plans, "kernel_version", lambda: "another")
    elif changed == "multiprocessors":
        start.card = replace(UNKNOWN, multiprocessors=64)
    else:
        found = tiles.versions() | {changed: "9.9"}
        monkeypatch.setattr(tiles, "versions", lambda: found)
    start()
    assert len(start.measured) == 2


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"shapes": {}}', '{"measured_with": 1, "shapes": 2}', "\x00\xff"],
)
def test_a_file_that_cannot_be_read_measures_again_and_is_replaced(start, content):
    file = tiles.cache_file(UNKNOWN)
    file.parent.mkdir(parents=True)
    file.write_text(content)
    start()
    assert len(start.measured) == 1
    start()
    assert len(start.measured) == 1


def test_a_file_of_another_card_under_this_name_is_not_taken(start):
    start()
    file = tiles.cache_file(UNKNOWN)
    content = json.loads(file.read_text())
    content["measured_with"]["driver"] = "1.0"
    file.write_text(json.dumps(content))
    start()
    assert len(start.measured) == 2


def test_a_home_that_cannot_be_written_measures_each_time_and_says_so(start, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    start()
    assert "not kept" in start.said[-1]
    assert nf4_plans.measured_shapes(UNKNOWN), "this process has it"
    start()
    assert len(start.measured) == 2


def test_the_cache_is_in_the_home_folder_unless_set(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/nowhere")
    assert tiles.cache_folder() == Path("/nowhere/.cache/grpo/nf4_tiles")


def test_a_card_of_the_projects_table_is_not_measured(start):
    start.card = NAMED
    start()
    assert not start.measured and not start.said


def test_what_the_card_cannot_fuse_is_not_measured(start):
    start(torch.float32)
    start.card = TURING
    start(torch.bfloat16)
    assert not start.measured
    start(torch.float16)
    assert len(start.measured) == 1


def test_with_little_memory_left_the_rule_is_kept(start):
    start.free = 1e9
    start()
    assert not start.measured and "too little" in start.said[0]
    assert nf4_plans.plan_for(UNKNOWN, (2560, 2048)) == nf4_tiles.default_plan(UNKNOWN, (2560, 2048))
