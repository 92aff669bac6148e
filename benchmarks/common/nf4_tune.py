"""Searches the tiles and splits of the fused NF4 product and writes the table that kernels/nf4_gemm.py reads.

The split of K has to be one for all numbers of rows, so that a row's bits do not depend on its batch: every split is
timed with its best tile for each number of rows, and the split with the smallest geometric mean of times is taken.
Imported by nf4_gemm.py's --tune. Not here: timing itself, and anything about other systems.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import re
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from triton.runtime.errors import TritonError

from grpo.kernels import nf4_gemm
from grpo.kernels.nf4_gemm import Tile
from grpo.kernels.nf4_lookup import byte_tables
from grpo.run.versions import versions

CHECKS = 5
"""How often a kernel must be right before it is timed: a race may be won at first."""
ROWS = (16, 32, 64, 128, 256, 512)
"""Each stands for the numbers of rows down to the one before. The last ones are kept where dequantising loses."""
SPLITS = (1, 2, 4, 8)
SHARED_MEMORY = 227 << 10
MULTIPROCESSORS = 132
EXPLORED_SHAPES = 4
"""The first shapes are timed with every tile, the others with the best of those."""
KEPT_TILES = 8
SLACK = 1.02
"""A tile up to this much slower is taken if another shape has it already: every tile is a kernel to compile."""

Times = dict[tuple[int, int, Tile], float]
"""(rows, split, tile) -> microseconds, of one shape."""


def candidates(rows: int) -> list[Tile]:
    """Tiles worth timing for up to `rows` rows of x: those whose sums and stages fit."""
    heights = {16: (16,), 32: (32,), 64: (64,), 128: (128,)}.get(rows, (128, 256))
    found = []
    for m in heights:
        for n, warps in ((64, 4), (128, 4)) if m < 128 else ((64, 4), (128, 4), (128, 8), (256, 8)):
            for stages in (3, 4, 6) if m < 64 else (2, 3, 4):
                shared = stages * 256 * m + (stages - 1) * 68 * n
                if n * m <= warps * 32 * 128 and shared <= SHARED_MEMORY:
                    found += [Tile(n, m, warps, stages, dots) for dots in (1, 2)]
    return found


def splits(shape: tuple[int, int], rows: int, tile: Tile) -> list[int]:
    """Splits that keep the GPU busy without filling it many times over, and fit the workspace."""
    programs = math.ceil(shape[0] / tile.n) * math.ceil(rows / tile.m)
    few, many = MULTIPROCESSORS // 3, 8 * MULTIPROCESSORS
    return [
        split
        for split in SPLITS
        if programs * split >= few
        and (split == 1 or (programs * split <= many and split * 2 <= shape[1] // 128))
        and nf4_gemm.fits(tile, split, rows, shape[0])
    ]


def compile_kernel(tile_and_split: tuple[Tile, int]) -> tuple[Tile, int] | None:
    """Fill Triton's cache on disk, in a process of its own. None: this GPU has no room for the kernel."""
    tile, split = tile_and_split
    try:
        nf4_gemm._gemm_kernel.warmup(
            torch.bfloat16, torch.int32, torch.int32, torch.bfloat16, torch.bfloat16, torch.float32, torch.int32,
            torch.bfloat16, torch.bfloat16, 256, 4096, 4096, 32, 4096, 4096, *byte_tables(torch.bfloat16), tile.n,
            tile.m, split, tile.warps, tile.stages, tile.dots, False, False, False, 0, 16, False, grid=(1,),
            num_warps=tile.warps,
        )  # fmt: skip
    except (RuntimeError, TritonError):
        return None
    return tile_and_split


def compile_all(wanted: list[tuple[Tile, int]], deadline: float) -> set[tuple[Tile, int]]:
    """Compile on every core; returns what was ready by `deadline`. CUDA must not have started: workers are forked."""
    ready = set()
    with multiprocessing.get_context("fork").Pool(max(1, (os.cpu_count() or 2) - 1)) as pool:
        results = pool.imap_unordered(compile_kernel, wanted)
        try:
            for _ in wanted:
                ready.add(results.next(timeout=max(0.0, deadline - time.monotonic())))
        except multiprocessing.TimeoutError:
            pass
    return ready


def tune(shapes: list[tuple[int, int]], path: Path, deadline: float) -> None:
    """Time tiles for `shapes` of W until `deadline` (time.monotonic) at most, and write the plans to `path`."""
    from benchmarks.common import nf4_weights

    wanted = {
        (tile, split)
        for shape in shapes
        for rows in ROWS
        for tile in candidates(rows)
        for split in splits(shape, rows, tile)
    }
    started = time.monotonic()
    order = random.Random(0).sample(sorted(wanted, key=str), len(wanted))  # cut short, it still has some of everything
    ready = compile_all(order, started + 0.5 * (deadline - started))
    print(f"tune: {len(ready)} of {len(wanted)} kernels compiled in {time.monotonic() - started:.0f} s", flush=True)
    score: dict[tuple[int, Tile], list[float]] = defaultdict(list)
    used: Counter[tuple[int, Tile]] = Counter()
    plans = {}
    for index, shape in enumerate(shapes):
        explore = index < EXPLORED_SHAPES
        tiles = {rows: candidates(rows) if explore else best_tiles(score, rows) for rows in ROWS}
        weight = nf4_weights.packed_weight(nf4_weights.random_weight(*shape))
        times = time_shape(weight, shape, tiles, ready, deadline)
        for rows in ROWS:
            mine = {key: value for key, value in times.items() if key[0] == rows}
            for (_, _, tile), value in mine.items():
                score[rows, tile].append(value / min(mine.values()))
        if times:
            plans[shape] = choose(times, dense_times(weight, shape), shape, used)
        del weight
    write(path, plans)


def best_tiles(score: dict[tuple[int, Tile], list[float]], rows: int) -> list[Tile]:
    mine = {tile: times for (at, tile), times in score.items() if at == rows}
    means = {tile: statistics.fmean(sorted(times)[:EXPLORED_SHAPES]) for tile, times in mine.items()}
    return sorted(means, key=means.__getitem__)[:KEPT_TILES]


def time_shape(weight, shape, tiles: dict[int, list[Tile]], ready: set[tuple[Tile, int]], deadline: float) -> Times:
    from benchmarks.common import nf4_weights

    times: Times = {}
    for rows, choices in tiles.items():
        x = torch.randn(rows, shape[1], dtype=torch.bfloat16, device="cuda")
        out = torch.empty(rows, shape[0], dtype=torch.bfloat16, device="cuda")
        expected = torch.empty_like(out)
        launch_dense(x, expected, weight.copies[0])
        for tile in choices:
            for split in splits(shape, rows, tile):
                if (tile, split) not in ready or time.monotonic() > deadline:
                    continue
                call = partial(launch, x, out, tile, split)
                try:
                    if not all(close(called(call, weight.copies[0], out), expected) for _ in range(CHECKS)):
                        print(f"tune: {shape} {rows} {tile} split {split}: wrong, left out", flush=True)
                        continue
                    times[rows, split, tile] = nf4_weights.microseconds(weight.copies, call, milliseconds=4.0)
                except (RuntimeError, TritonError) as error:
                    print(f"tune: {shape} {rows} {tile} split {split}: {str(error).splitlines()[0][:120]}", flush=True)
    return times


def called(call: Callable[[tuple[Tensor, Tensor]], None], copy: tuple[Tensor, Tensor], out: Tensor) -> Tensor:
    """`out` as `call` leaves it."""
    out.fill_(math.nan)
    call(copy)
    return out


def close(found: Tensor, expected: Tensor) -> bool:
    """Whether two roundings of the same product may differ so; a kernel that is miscompiled differs by its whole."""
    return bool((found.float() - expected.float()).norm() < 0.01 * expected.float().norm())


def launch(x: Tensor, out: Tensor, tile: Tile, split: int, copy: tuple[Tensor, Tensor]) -> None:
    nf4_gemm.launch_gemm(x, *copy, None, out, tile, split)


def launch_dense(x: Tensor, out: Tensor, copy: tuple[Tensor, Tensor]) -> None:
    nf4_gemm.dequantized_linear(x, *copy, None, out)


def dense_times(weight, shape: tuple[int, int]) -> dict[int, float]:
    """Dequantise + cuBLAS, where it may win."""
    from benchmarks.common import nf4_weights

    times = {}
    for rows in ROWS:
        x = torch.randn(rows, shape[1], dtype=torch.bfloat16, device="cuda")
        out = torch.empty(rows, shape[0], dtype=torch.bfloat16, device="cuda")
        times[rows] = nf4_weights.microseconds(weight.copies, partial(launch_dense, x, out), milliseconds=4.0)
    return times


def choose(times: Times, dense: dict[int, float], shape: tuple[int, int], used: Counter[tuple[int, Tile]]) -> dict:
    """The plan for one shape: the split with the best geometric mean over numbers of rows, a tile for each of them.

    used: (split, tile) -> how many plans have it so far; counted up here.
    """
    fastest = {rows: min(times[key] for key in times if key[0] == rows) for rows in {key[0] for key in times}}
    by_split: dict[int, dict[int, dict[Tile, float]]] = defaultdict(lambda: defaultdict(dict))
    for (rows, split, tile), value in times.items():
        by_split[split][rows][tile] = value

    def loss(split: int) -> float:
        # Above 256 rows dequantising usually wins: those do not decide the split.
        at = by_split[split]
        return math.fsum(
            math.log(min(at[rows].values()) / fastest[rows]) if rows in at else 9.0 for rows in fastest if rows <= 256
        )

    split = min(by_split, key=loss)
    plan, report = {}, []
    for rows, choices in sorted(by_split[split].items()):
        best = min(choices.values())
        report.append(f"{rows}: {best:.1f} ({fastest[rows]:.1f}, {dense[rows]:.1f})")
        if best > dense[rows]:
            break
        near = [tile for tile in choices if choices[tile] <= SLACK * best]
        tile = max(near, key=lambda tile: (used[split, tile], -choices[tile]))
        used[split, tile] += 1
        plan[str(rows)] = asdict(tile)
    print(f"tune: {shape} split {split}, us (best of any split, dequantise + cuBLAS): {', '.join(report)}", flush=True)
    return {"split": split, "tiles": plan}


def write(path: Path, plans: dict[tuple[int, int], dict]) -> None:
    """Replace this GPU's entry in the table at `path`, keeping those of others."""
    table = json.loads(path.read_text()) if path.exists() else {}
    measured = {key: value for key, value in versions().items() if key in ("torch", "triton")}
    shapes = {f"{features}x{columns}": plan for (features, columns), plan in plans.items()}
    table[torch.cuda.get_device_name()] = {"measured_with": measured, "shapes": shapes}
    text = json.dumps(table, indent=1)
    path.write_text(re.sub(r"\{[^{}]*\}", lambda inner: json.dumps(json.loads(inner[0])), text) + "\n")
