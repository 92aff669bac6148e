"""kernels/nf4_tiles.py, nf4_plans.py and nf4_tuner.py: which tiles a card gets, and how they are measured."""

import json
import time
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo.kernels import lora_shrink, nf4, nf4_compile, nf4_gemm, nf4_plans, nf4_tiles, nf4_tuner
from grpo.kernels.cards import KB, MB, SHARED_MEMORY, Card
from grpo.kernels.nf4_compile import Product, Shrink
from grpo.kernels.nf4_tiles import Plan, Tile
from tests.helpers import card_launches
from tests.helpers.paths import ROOT

CARDS = (
    Card("Tesla T4", 75, 64 * KB, 40, 4 * MB),
    Card("NVIDIA A100-SXM4-80GB", 80, 163 * KB, 108, 40 * MB),
    Card("NVIDIA GeForce RTX 3090", 86, 99 * KB, 82, 6 * MB),
    Card("NVIDIA GeForce RTX 4090", 89, 99 * KB, 128, 72 * MB),
    Card("NVIDIA L4", 89, 99 * KB, 58, 48 * MB),
    Card("NVIDIA H100 PCIe", 90, 227 * KB, 114, 50 * MB),
    Card("NVIDIA GH200 480GB", 90, 227 * KB, 132, 60 * MB),
    Card("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 90, 227 * KB, 16, 6 * MB),
    Card("NVIDIA B200", 100, 227 * KB, 148, 126 * MB),
    Card("NVIDIA GeForce RTX 5090", 120, 99 * KB, 170, 96 * MB),
)
SHAPES = st.tuples(st.integers(1, 4096).map(lambda n: 8 * n), st.integers(1, 512).map(lambda n: 64 * n))
MEASURED = Card("NVIDIA H100 80GB HBM3", 90, 227 * KB, 132, 50 * MB)


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    monkeypatch.setattr(nf4_plans, "_added", {})


def test_every_plan_of_the_table_fits_kernel_and_workspace():
    table = nf4_plans.load_table()
    assert (MEASURED.name, 90) in table
    for plans in table.values():
        for (features, _), plan in plans.items():
            limits = [rows for rows, _ in plan.tiles]
            assert limits == sorted(limits) and len(plan.tiles) > 0
            for rows, tile in plan.tiles:
                assert tile.n % (16 * tile.warps) == 0 and tile.warps % 4 == 0, "wgmma wants whole warp groups of rows"
                assert nf4_tiles.fits(tile, plan.split, rows, features) and nf4_tiles.serves(tile, MEASURED)


def test_the_tile_depends_on_rows_and_the_split_does_not():
    small, large = Tile(64, 16, 4, 3, 1), Tile(128, 128, 8, 3, 1)
    plan = Plan(2, ((16, small), (128, large)))
    assert [plan.tile(rows) for rows in (1, 16, 17, 128, 129)] == [small, small, large, large, None]
    assert isinstance(plan.split, int)


def test_a_shape_that_was_not_measured_takes_the_plan_of_the_nearest():
    plans = nf4_plans.load_table()[MEASURED.name, 90]
    assert nf4_plans.plan_for(MEASURED, (28672, 4096)) == plans[28672, 4096]
    assert nf4_plans.plan_for(MEASURED, (30000, 4096)) == plans[28672, 4096]
    assert nf4_plans.plan_for(MEASURED, (4096, 14000)) == plans[4096, 14336]
    wider = nf4_plans.plan_for(MEASURED, (10240, 14336))  # partial sums of four splits and 512 rows would not fit
    assert wider.split == plans[4096, 14336].split and wider.tile(512) is None and wider.tile(128) is not None


@given(st.sampled_from(CARDS), SHAPES, st.integers(1, 64))
def test_any_card_from_turing_on_has_the_fused_product_at_once(card, shape, rows):
    plan = nf4_plans.plan_for(card, shape)
    tile = plan.tile(rows)
    assert (tile is not None and tile.m >= 8) or (rows > 16 and card.unit == "m16n8k8")
    for most, tile in plan.tiles:
        assert card.shared_memory == SHARED_MEMORY[card.architecture] and nf4_tiles.serves(tile, card)
        assert nf4_tiles.fits(tile, plan.split, most, shape[0])
    assert plan.split == 1 or plan.split * 2 <= shape[1] // 128


def test_the_rule_gives_the_splits_that_were_measured():
    plans = nf4_plans.load_table()[MEASURED.name, 90]
    same = [nf4_tiles.default_split(MEASURED, shape) == plan.split for shape, plan in plans.items()]
    assert sum(same) >= len(same) - 2, same


def test_the_rule_of_turing_ends_where_dequantising_was_faster():
    result = json.loads((ROOT / "benchmarks" / "results" / "nf4_as_sm75.json").read_text())
    card = Card(**result["other"]["card"])
    rows = {entry["rows"]: entry for entry in result["table"]}
    dense = rows[16]["other"]  # the plans that were measured end at 8 rows
    assert all(max(map(int, entry["tiles"])) == 8 for entry in result["other"]["plans"].values())
    assert rows[16]["rule"] < dense and rows[32]["rule"] > rows[32]["other"]
    splits = {}
    for text, entry in result["other"]["plans"].items():
        shape = tuple(map(int, text.split("x")))
        assert nf4_tiles.default_plan(card, shape).tiles[-1][0] == 16
        splits[shape] = entry["split"] == nf4_tiles.default_split(card, shape)
    assert sum(splits.values()) >= 3, splits


@given(st.sampled_from(CARDS), SHAPES)
def test_a_first_start_measures_a_handful(card, shape):
    choices = nf4_tiles.shortlist(card, shape)
    assert 0 < len(choices) <= 40 and len(set(choices)) == len(choices)
    plan = nf4_tiles.default_plan(card, shape)
    assert [(rows, plan.split, tile) for rows, tile in plan.tiles] == choices[: len(plan.tiles)], "the likeliest first"


@given(st.sampled_from(CARDS))
def test_a_dequantised_piece_follows_the_l2_cache(card):
    piece = nf4_tiles.piece_bytes(card)
    assert piece <= nf4_tiles.WORKSPACE_BYTES
    assert piece <= 0.64 * card.l2 or piece == nf4_tiles.SMALLEST_PIECE


def test_measured_plans_come_before_the_table_and_survive_their_json():
    plan = Plan(2, ((16, Tile(64, 16, 4, 4, 2)), (64, Tile(128, 64, 4, 3, 2))))
    written = json.loads(json.dumps(nf4_plans.written_plans({(4096, 4096): plan})))
    nf4_plans.add_plans(MEASURED, nf4_plans.read_plans(written))
    assert nf4_plans.plan_for(MEASURED, (4096, 4096)) == plan
    other = nf4_plans.load_table()[MEASURED.name, 90][28672, 4096]
    assert nf4_plans.plan_for(MEASURED, (28672, 4096)) == other


def test_the_best_split_is_taken_for_all_rows_and_stops_where_dequantising_wins():
    fast, slow = Tile(64, 16, 4, 4, 2), Tile(128, 16, 4, 4, 2)
    large = Tile(128, 64, 4, 3, 2)
    times = {
        (16, 1, fast): 20.0, (16, 2, fast): 10.0, (16, 2, slow): 12.0, (64, 1, large): 19.0, (64, 2, large): 20.0,
        (128, 1, large): 50.0, (128, 2, large): 50.0,
    }  # fmt: skip
    plan = nf4_tuner.choose(times, {16: 100.0, 64: 100.0, 128: 40.0}, Counter())
    assert plan == Plan(2, ((16, fast), (64, large)))


SMALL, MIDDLE, LARGE = Tile(64, 16, 4, 4, 2), Tile(64, 32, 4, 4, 2), Tile(64, 64, 4, 3, 2)
BY_RULE = Plan(4, ((16, Tile(128, 16, 4, 4, 2)), (32, Tile(128, 32, 4, 4, 2)), (64, Tile(128, 64, 4, 3, 2))))


def test_rows_that_were_not_timed_keep_the_tile_of_the_rule():
    times = {(16, 2, SMALL): 10.0, (32, 2, MIDDLE): 12.0}
    dense = {16: 30.0, 32: 30.0}
    plan = nf4_tuner.filled(nf4_tuner.choose(times, dense, Counter()), BY_RULE, times, dense, 4096)
    assert plan == Plan(2, ((16, SMALL), (32, MIDDLE), BY_RULE.tiles[2]))
    assert nf4_tuner.filled(plan, None, times, dense, 4096) == plan


@pytest.mark.parametrize("slow_at", [32, 64])
def test_rows_at_which_dequantising_was_faster_are_not_filled(slow_at):
    times = {(16, 2, SMALL): 10.0, (32, 2, MIDDLE): 12.0, (64, 1, LARGE): 50.0}
    dense = {16: 30.0, 32: 30.0, 64: 60.0} | {slow_at: 11.0}
    plan = nf4_tuner.filled(nf4_tuner.choose(times, dense, Counter()), BY_RULE, times, dense, 4096)
    assert plan.tiles == ((16, SMALL),) if slow_at == 32 else ((16, SMALL), (32, MIDDLE))


@given(st.sampled_from(CARDS), SHAPES, st.integers(0, 40))
def test_a_search_that_is_cut_short_has_timed_something_for_every_number_of_rows(card, shape, reached):
    choices = nf4_tiles.shortlist(card, shape)
    by_rows = [[one for one in choices if one[0] == rows] for rows in sorted({one[0] for one in choices})]
    timed = nf4_tiles.in_turns(by_rows)[:reached]
    assert {one[0] for one in timed} == {rows[0][0] for rows in by_rows[:reached]}
    times = {one: 10.0 for one in timed}
    if times:
        dense = {one[0]: 20.0 for one in timed}
        rule = nf4_tiles.default_plan(card, shape)
        plan = nf4_tuner.filled(nf4_tuner.choose(times, dense, Counter()), rule, times, dense, shape[0])
        most = max(rows for rows, tile in rule.tiles if nf4_tiles.fits(tile, plan.split, rows, shape[0]))
        assert plan.tile(most) is not None, "what is fused by rule is fused after measuring"
        said = nf4_tuner.described(nf4_tuner.Measured(plan, times, dense, []))
        assert all(f"{rows}: {'by rule' if rows not in dense else ''}" in said for rows, _ in plan.tiles)


def test_wrong_kernels_are_left_out_and_nothing_is_timed_past_the_deadline(monkeypatch):
    right, wrong = Tile(64, 16, 4, 4, 2), Tile(128, 16, 4, 4, 2)

    def launch(x, out, tile, split, copy):
        nf4_gemm.nf4_linear(x, *copy, out=out)
        if tile == wrong:
            out[0, 0] += 100 * out.abs().max()

    monkeypatch.setattr(nf4_tuner, "launch", launch)
    monkeypatch.setattr(nf4_tuner, "microseconds", lambda copies, call, milliseconds: 5.0)
    copies = nf4_tuner.random_copies(CARDS[0], (64, 128), torch.bfloat16, "cpu")[:1]
    choices = [(16, 1, right), (16, 1, wrong), (16, 2, right)]
    ready = {Product(right, 1), Product(wrong, 1)}
    found = nf4_tuner.time_shape(copies, (64, 128), choices, ready, time.monotonic() + 60)
    assert found == ({(16, 1, right): 5.0}, [(16, 1, wrong)])
    assert nf4_tuner.time_shape(copies, (64, 128), choices, ready, time.monotonic() - 1) == ({}, [])


@pytest.mark.slow
@pytest.mark.parametrize("ptx", [False, True])
def test_processes_compile_what_a_launch_then_finds(ptx, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    jobs = [Product(Tile(64, 16, 4, 4, 2), 2), Product(Tile(64, 32, 4, 3, 2), 1)]
    ready = nf4_compile.compile_all(jobs, 86, torch.float16, time.monotonic() + 120, ptx=ptx)
    assert ready == set(jobs)
    binaries = [file.read_bytes() for file in tmp_path.rglob("*.cubin")]
    assert len(binaries) == 2 and all(one.startswith(b"\x7fELF") != ptx for one in binaries)


@pytest.mark.slow
@pytest.mark.parametrize("card", [CARDS[2], CARDS[4]], ids=lambda card: card.name)
def test_what_is_compiled_in_the_background_is_what_a_decoding_step_launches(card, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    shape, rows, ranks = (960, 576), (1, 16, 24), 48
    plan = nf4_plans.plan_for(card, shape)
    jobs = [Shrink(ranks, shape[1])]
    jobs += [Product(plan.tile(each), plan.split, ranks, each % plan.tile(each).m != 0, True) for each in rows]
    thread = nf4_compile.compile_in_background(jobs, card.architecture, torch.bfloat16)
    thread.join()
    assert nf4_compile.compile_in_background(jobs, card.architecture, torch.bfloat16) is None, "it is remembered"
    compiled = set(tmp_path.rglob("*.cubin"))
    assert len(compiled) == len(set(jobs))
    with card_launches.pretended(card) as collected:
        packed, absmax = nf4.allocate(*shape, torch.bfloat16, "cpu")
        for each in rows:
            x, a = torch.empty(each, shape[1], dtype=torch.bfloat16), torch.empty(ranks, shape[1], dtype=torch.bfloat16)
            lora_shrink.lora_shrink(x, a, torch.empty((), dtype=torch.bfloat16))
            low_rank = card_launches.adapter(each, shape[0], ranks, torch.bfloat16)
            nf4_gemm.nf4_linear(x, packed, absmax, None, low_rank=low_rank)
    assert {"_gemm_kernel", "_shrink_kernel"} <= collected.names
    assert set(tmp_path.rglob("*.cubin")) == compiled, "no other kernel was compiled"
