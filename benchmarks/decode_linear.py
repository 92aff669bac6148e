"""A linear layer of a decoding step as sampling launches it: x A^T, then the 4-bit product with B, by the split of K.

Cold weights in CUDA graphs, one layer after another, each kernel launched before the one in front of it has ended and,
`apart`, after it. For every number of rows the best tile of each split; what a split costs in all rows decides which
one a shape gets (`--table` writes it: see nf4_tuner.choose). Every tile is checked before it is timed.

    python -m benchmarks.decode_linear --shapes 5120x3072,3072x3072,16384x3072,3072x8192 --out decode_linear.json
    python -m benchmarks.decode_linear --table kernels/nf4_table.json --budget 60
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.common.processes import write_result
from benchmarks.nf4_gemm import MODELS, put
from grpo.kernels import cards, nf4_gemm, nf4_plans, nf4_tiles, nf4_tuner
from grpo.kernels.cards import Card
from grpo.kernels.lora_factors import LowRank
from grpo.kernels.lora_shrink import lora_shrink
from grpo.kernels.nf4_compile import Product, Shrink, compile_all
from grpo.kernels.nf4_tiles import Plan, Tile

ROWS = (16, 32, 64, 128, 256)
FEWEST, MOST = 1.2, 4.0
"""Programs of 64 rows of W that a split makes, for each multiprocessor."""
TRIED = {
    128: [Tile(64, 128, 4, 3, 1), Tile(64, 128, 4, 3, 2), Tile(128, 128, 8, 2, 2), Tile(128, 128, 8, 3, 2)],
    256: [Tile(128, 256, 8, 3, 2), Tile(64, 128, 4, 3, 2), Tile(128, 128, 8, 2, 2)],
}
"""Every tile of W reads all of x from the L2 cache, which is what takes the time with many rows: few, large tiles read
less, if there are enough of them."""
WIDE = {128: [Tile(256, 128, 8, 3, 1), Tile(256, 128, 8, 2, 2)]}
"""For a W with many rows."""
RANKS = 32
Choice = tuple[int, int, Tile]
"""Rows, split, tile."""


def choices_of(card: Card, shape: tuple[int, int], rows: tuple[int, ...], only: tuple[int, ...]) -> list[Choice]:
    """What is timed: the table's tile for each number of rows and those of TRIED, by splits that fill the card."""
    programs = -(-shape[0] // 64) / card.multiprocessors
    splits = [split for split in only if FEWEST <= programs * split <= MOST or split == 1 <= programs]
    choices = []
    for count in rows:
        plan = nf4_plans.plan_for(card, shape)
        known = plan.tile(count) if plan else None
        tiles = [*([known] if known else []), *TRIED.get(count, ()), *(WIDE.get(count, ()) if programs >= 1 else ())]
        choices += [
            (count, split, tile)
            for split in splits
            for tile in dict.fromkeys(tiles)
            if nf4_tiles.serves(tile, card) and nf4_tiles.fits(tile, split, count, shape[0])
        ]  # fmt: skip
    return choices


def layer(
    x: Tensor, a: Tensor, b: Tensor, on: Tensor, out: Tensor, tile: Tile, split: int, early: bool, copy: Any
) -> None:
    x_lora_a = lora_shrink(x, a, on, overlapped=early)
    nf4_gemm.launch_fused(x, *copy, None, out, tile, split, LowRank(x_lora_a, b, early))


def dense_layer(x: Tensor, a: Tensor, b: Tensor, on: Tensor, out: Tensor, copy: Any) -> None:
    nf4_gemm.dequantized_linear(x, *copy, None, out, LowRank(lora_shrink(x, a, on), b))


def examine(card: Card, shape: tuple[int, int], choices: list[Choice], ready: set[Any], apart: bool) -> dict[str, Any]:
    """Microseconds of a layer: {"early": {choice: us}, "apart": ..., "dense": {rows: us}, "wrong": [...]}."""
    copies = nf4_tuner.random_copies(card, shape, torch.bfloat16)
    found: dict[str, Any] = {"early": {}, "apart": {}, "dense": {}, "wrong": []}
    a, b = (
        torch.randn(size, dtype=torch.bfloat16, device="cuda") * 0.02 for size in ((RANKS, shape[1]), (shape[0], RANKS))
    )
    on = torch.ones((), dtype=torch.bfloat16, device="cuda")
    for rows in dict.fromkeys(rows for rows, _, _ in choices):
        x = torch.randn(rows, shape[1], dtype=torch.bfloat16, device="cuda")
        out, expected = (torch.empty(rows, shape[0], dtype=torch.bfloat16, device="cuda") for _ in range(2))
        dense = partial(dense_layer, x, a, b, on)
        dense(expected, copies[0])
        found["dense"][rows] = nf4_tuner.microseconds(copies, partial(dense, out), milliseconds=4.0)
        for choice in (each for each in choices if each[0] == rows):
            _, split, tile = choice
            if Product(tile, split, RANKS, pending=True) not in ready:
                continue
            for name, early in (("early", True), ("apart", False))[: 2 if apart else 1]:
                call = partial(layer, x, a, b, on, out, tile, split, early)
                with patch.object(cards, "OVERLAPPED_LAUNCHES", early):
                    try:
                        right = all(nf4_tuner.close(nf4_tuner.called(call, copies[0], out), expected) for _ in range(3))
                        if right:
                            found[name][choice] = nf4_tuner.microseconds(copies, call, milliseconds=3.0)
                        else:
                            found["wrong"].append((name, *choice))
                    except RuntimeError:  # no room on the card
                        found["wrong"].append((name, *choice))
                if name not in found or choice not in found[name]:
                    break
    return found


def completed(plan: Plan, before: Plan | None, shape: tuple[int, int]) -> Plan:
    """`plan` with the tiles of the one before for fewer rows than were timed: tiles change no bit."""
    last = max((rows for rows, _ in plan.tiles), default=0)
    tiles = {rows: tile for rows, tile in (before.tiles if before else ()) if rows < last}
    fitting = {rows: tile for rows, tile in tiles.items() if nf4_tiles.fits(tile, plan.split, rows, shape[0])}
    return Plan(plan.split, tuple(sorted((fitting | dict(plan.tiles)).items(), key=lambda item: item[0])))


def named(times: dict[Choice, float]) -> dict[str, float]:
    return {
        f"{rows}/{split}/{t.n}x{t.m}x{t.warps}x{t.stages}x{t.dots}": round(us, 2)
        for (rows, split, t), us in times.items()
    }


def best(times: dict[Choice, float]) -> dict[str, dict[int, float]]:
    """Rows -> split -> the best time."""
    found: dict[str, dict[int, float]] = {}
    for (rows, split, _), us in times.items():
        at = found.setdefault(str(rows), {})
        at[split] = round(min(at.get(split, us), us), 2)
    return found


def numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    shapes = [
        (sum(parts), columns) for model in ("Llama-3.2-3B", "Llama-3.1-8B") for parts, columns in MODELS[model].values()
    ]
    parser.add_argument(
        "--shapes", type=lambda text: [tuple(map(int, one.split("x"))) for one in text.split(",")], default=shapes
    )
    parser.add_argument("--rows", type=numbers, default=ROWS)
    parser.add_argument("--splits", type=numbers, default=nf4_tiles.SPLITS)
    parser.add_argument("--apart", action="store_true", help="time kernels that wait for the one in front of them too")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds for compiling")
    parser.add_argument("--table", type=Path, help="write the plans that are found into this file")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    card = cards.card(torch.device("cuda", 0))
    ways = (True, False) if options.apart else (True,)
    wanted = {shape: choices_of(card, shape, options.rows, options.splits) for shape in options.shapes}
    jobs = list(dict.fromkeys(
        Product(tile, split, RANKS, pending=early)
        for choices in wanted.values() for _, split, tile in choices for early in ways
    ))  # fmt: skip
    shrinks = [Shrink(RANKS, columns, early) for _, columns in wanted for early in ways]
    ready = compile_all([*shrinks, *jobs], card.architecture, torch.bfloat16, time.monotonic() + options.budget)
    print(f"{len(ready)} of {len(jobs) + len(shrinks)} compiled", flush=True)
    result: dict[str, Any] = {"benchmark": "decode_linear", "shapes": {}}
    used: Counter[tuple[int, Tile]] = Counter()
    for shape, choices in wanted.items():
        found = examine(card, shape, choices, ready, options.apart)
        plan = completed(nf4_tuner.choose(found["early"], found["dense"], used), nf4_plans.plan_for(card, shape), shape)
        entry = {"early": named(found["early"]), "apart": named(found["apart"]), "dense": found["dense"]}
        entry |= {"wrong": [str(each) for each in found["wrong"]], "plan": nf4_plans.written_plans({shape: plan})}
        result["shapes"][f"{shape[0]}x{shape[1]}"] = entry
        dense_us = {rows: round(us, 1) for rows, us in found["dense"].items()}
        for name, times in (("early", best(found["early"])), ("apart", best(found["apart"])), ("dense", dense_us)):
            print(shape, name, json.dumps(times), "split", plan.split, flush=True)
        write_result(options.out, result)
        if options.table:
            put(options.table, card, {shape: plan})
    print(
        json.dumps(
            {
                "benchmark": "decode_linear",
                "splits": {k: list(v["plan"].values())[0]["split"] for k, v in result["shapes"].items()},
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
