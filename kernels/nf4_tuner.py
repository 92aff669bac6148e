"""Times the fused NF4 product's tiles on the GPU that is there and makes plans of them.

The split of K has to be one for all numbers of rows, so that a row's bits do not depend on its batch: every split is
timed with its best tile for each number of rows, and the split with the smallest geometric mean of times is taken. A
tile enters only after products that are right: Triton 3.6 miscompiles some, which are no slower.

Two searches: `nf4_tiles.shortlist`, seconds, for a first start; every candidate, minutes, for the table that comes with
the project. Not here: where plans are kept, and anything about other systems.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import TritonError

from grpo.kernels import nf4, nf4_gemm, nf4_tiles
from grpo.kernels.cards import MB, Card
from grpo.kernels.lora_factors import LowRank
from grpo.kernels.nf4_compile import Job, Product, compile_all
from grpo.kernels.nf4_plans import Shape
from grpo.kernels.nf4_tiles import Plan, Tile, in_turns

CHECKS = 5
"""How often a kernel must be right before it is timed: a race may be won at first."""
MOST_ERROR = 0.01
"""Of two roundings of one product; a kernel that is miscompiled is off by the whole."""
COLD_SHARE = 3
"""Copies of a weight that are timed in turn take this many times the L2 cache, so that none is found there."""
MOST_COPIES = 96
COPIES_BYTES = 512 * MB
"""Of all copies, at most: the card's memory may be small."""
COMPILE_SHARE = 0.6
"""Of the time allowed, at most."""
SLACK = 1.02
"""A tile up to this much slower is taken if another shape has it already: every tile is a kernel to compile."""
RANKS = 32
"""Of the adapter with which dequantising is timed."""
DECIDING_ROWS = 256
"""Above, dequantising usually wins: those rows do not decide the split."""

Times = dict[tuple[int, int, Tile], float]
"""(rows, split, tile) -> microseconds, of one shape."""
Copy = tuple[Tensor, Tensor]
Say = Callable[[str], None]


@dataclass
class Measured:
    """What was measured of one shape, in microseconds."""

    plan: Plan
    times: Times
    dense: dict[int, float]
    """Rows -> dequantise + cuBLAS."""
    wrong: list[tuple[int, int, Tile]] = field(default_factory=list)

    def fused(self, rows: int) -> float | None:
        """The plan's time at `rows`, one of those measured."""
        tile = self.plan.tile(rows)
        return None if tile is None else self.times.get((rows, self.plan.split, tile))


# Time


def microseconds(copies: Sequence[Any], call: Callable[[Any], Any], milliseconds: float = 8.0) -> float:
    """Median time of `call(copy)`, over replays of a CUDA graph that calls it with every copy in turn.

    The replays that count take about `milliseconds`; half as many before them raise the clocks.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for copy in copies[:2]:
            call(copy)
        graph.capture_begin()
        for copy in copies:
            call(copy)
        graph.capture_end()
        replay_milliseconds(graph, 1)
        replays = max(5, math.ceil(milliseconds / statistics.median(replay_milliseconds(graph, 3))))
        times = replay_milliseconds(graph, replays + replays // 2)[replays // 2 :]
    return statistics.median(times) / len(copies) * 1e3


def replay_milliseconds(graph: torch.cuda.CUDAGraph, replays: int) -> list[float]:
    """Time of each of `replays` replays, queued without waiting in between."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.current_stream().synchronize()
    return [start.elapsed_time(end) for start, end in zip(events, events[1:], strict=False)]


def cold_copies(card: Card, size: float) -> int:
    """How many copies of `size` bytes are timed in turn."""
    wanted = math.ceil(COLD_SHARE * max(card.l2, 16 * MB) / size)
    return max(2, min(MOST_COPIES, wanted, int(COPIES_BYTES // size)))


def random_copies(card: Card, shape: Shape, dtype: torch.dtype, device: str = "cuda") -> list[Copy]:
    """Copies of one random weight in the stored form."""
    weight = torch.randn(*shape, dtype=dtype, device=device) * 0.02
    copies = []
    for _ in range(cold_copies(card, weight.numel() * 0.53125)):
        copies.append(nf4.allocate(*shape, dtype, device))
        nf4.quantize_rows(*copies[-1], 0, weight)
    return copies


# Measure


def tune(
    shapes: Iterable[Shape],
    card: Card,
    dtype: torch.dtype,
    seconds: float,
    *,
    thorough: bool = False,
    ptx: bool = False,
    device: str = "cuda",
    say: Say = lambda text: None,
) -> dict[Shape, Measured]:
    """Plans for `shapes` of W on the current device, in `seconds` at most; what was not reached is left out.

    say: is told how far it is. ptx: compile as `compile_only.pretend` does. Empty for a card without the fused product.
    """
    started = time.monotonic()
    deadline = started + seconds
    wanted = {shape: search(card, shape, thorough=thorough) for shape in shapes}
    jobs = in_turns([Product(tile, split) for _, split, tile in choices] for choices in wanted.values())
    if not jobs:
        return {}
    ready = compile_all(jobs, card.architecture, dtype, started + COMPILE_SHARE * seconds, ptx=ptx)
    say(f"{len(ready)} of {len(jobs)} kernels compiled in {time.monotonic() - started:.0f} s")
    found: dict[Shape, Measured] = {}
    used: Counter[tuple[int, Tile]] = Counter()
    for index, (shape, choices) in enumerate(wanted.items()):
        now = time.monotonic()
        # The first shapes load the kernels that the others share.
        share = now + max(0.0, deadline - now) * 2 / (len(wanted) - index + 1)
        copies = random_copies(card, shape, dtype, device)
        times, wrong = time_shape(copies, shape, choices, ready, share)
        if times:
            dense = dense_times(copies, shape, {rows for rows, _, _ in times})
            rule = nf4_tiles.default_plan(card, shape)
            plan = filled(choose(times, dense, used), rule, times, dense, shape[0])
            found[shape] = Measured(plan, times, dense, wrong)
            say(f"{shape[0]} x {shape[1]}: {described(found[shape])}")
        del copies
    return found


def search(card: Card, shape: Shape, *, thorough: bool) -> list[tuple[int, int, Tile]]:
    """(rows, split, tile) to time for one shape, the likeliest first."""
    short = nf4_tiles.shortlist(card, shape)
    if not thorough:
        return short
    every = (
        [(rows, split, tile) for tile in nf4_tiles.candidates(card, rows)
         for split in nf4_tiles.splits(card, shape, rows, tile)]
        for rows in nf4_tiles.ROWS
    )  # fmt: skip
    return list(dict.fromkeys([*short, *in_turns(every)]))


def time_shape(
    copies: list[Copy], shape: Shape, choices: list[tuple[int, int, Tile]], ready: set[Job], deadline: float
) -> tuple[Times, list[tuple[int, int, Tile]]]:
    """Times of the kernels that are `ready` and right, and which were wrong; numbers of rows take turns."""
    times: Times = {}
    wrong = []
    operands = {rows: random_operands(copies, shape, rows) for rows, _, _ in choices}
    by_rows: dict[int, list[tuple[int, int, Tile]]] = defaultdict(list)
    for key in choices:
        if Product(key[2], key[1]) in ready:
            by_rows[key[0]].append(key)
    for key in in_turns(by_rows[rows] for rows in sorted(by_rows)):
        if time.monotonic() > deadline:
            break
        rows, split, tile = key
        x, out, expected = operands[rows]
        call = partial(launch, x, out, tile, split)
        try:
            if all(close(called(call, copies[0], out), expected) for _ in range(CHECKS)):
                times[key] = microseconds(copies, call, milliseconds=4.0)
            else:
                wrong.append(key)
        except (RuntimeError, TritonError):
            wrong.append(key)
    return times, wrong


def random_operands(copies: list[Copy], shape: Shape, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [rows, K], room for y [rows, N], and y by dequantising."""
    x = torch.randn(rows, shape[1], dtype=copies[0][1].dtype, device=copies[0][0].device)
    out = torch.empty(rows, shape[0], dtype=x.dtype, device=x.device)
    expected = torch.empty_like(out)
    launch_dense(x, expected, copies[0])
    return x, out, expected


def called(call: Callable[[Copy], None], copy: Copy, out: Tensor) -> Tensor:
    """`out` as `call` leaves it."""
    out.fill_(math.nan)
    call(copy)
    return out


def close(actual: Tensor, expected: Tensor) -> bool:
    """Whether two roundings of the same product may differ so."""
    return bool((actual.float() - expected.float()).norm() < MOST_ERROR * expected.float().norm())


def launch(x: Tensor, out: Tensor, tile: Tile, split: int, copy: Copy) -> None:
    nf4_gemm.launch_fused(x, *copy, None, out, tile, split)


def launch_dense(x: Tensor, out: Tensor, copy: Copy, low_rank: LowRank | None = None) -> None:
    nf4_gemm.dequantized_linear(x, *copy, None, out, low_rank)


def dense_times(copies: list[Copy], shape: Shape, row_counts: Iterable[int]) -> dict[int, float]:
    """Dequantise + cuBLAS, with an adapter of RANKS as sampling has one: it is copied beside W and beside x, where the
    fused product adds it in registers."""
    times = {}
    for rows in sorted(row_counts):
        x = torch.randn(rows, shape[1], dtype=copies[0][1].dtype, device=copies[0][0].device)
        out = torch.empty(rows, shape[0], dtype=x.dtype, device=x.device)
        low_rank = LowRank(x.new_zeros(rows, RANKS), x.new_zeros(shape[0], RANKS))
        times[rows] = microseconds(copies, partial(launch_dense, x, out, low_rank=low_rank), milliseconds=4.0)
    return times


# Choose


def choose(times: Times, dense: dict[int, float], used: Counter[tuple[int, Tile]]) -> Plan:
    """The plan for one shape: the split with the best geometric mean over numbers of rows, a tile for each of them as
    far as it is faster than `dense`. used: (split, tile) -> how many plans have it so far; counted up here."""
    fastest = {rows: min(times[key] for key in times if key[0] == rows) for rows in {key[0] for key in times}}
    by_split: dict[int, dict[int, dict[Tile, float]]] = defaultdict(lambda: defaultdict(dict))
    for (rows, split, tile), value in times.items():
        by_split[split][rows][tile] = value

    def loss(split: int) -> float:
        at = by_split[split]
        return math.fsum(
            math.log(min(at[rows].values()) / fastest[rows]) if rows in at else 9.0
            for rows in fastest
            if rows <= DECIDING_ROWS
        )

    split = min(by_split, key=loss)
    tiles = []
    for rows, choices in sorted(by_split[split].items()):
        best = min(choices.values())
        if best > dense[rows]:
            break
        near = [tile for tile in choices if choices[tile] <= SLACK * best]
        tile = max(near, key=lambda tile: (used[split, tile], -choices[tile]))
        used[split, tile] += 1
        tiles.append((rows, tile))
    return Plan(split, tuple(tiles))


def filled(plan: Plan, rule: Plan | None, times: Times, dense: dict[int, float], features: int) -> Plan:
    """`plan` with the rule's tiles for numbers of rows that its split was not timed at, up to where `dense` wins."""
    timed = {rows for rows, split, _ in times if split == plan.split}
    fastest = {rows: min(times[key] for key in times if key[0] == rows) for rows in {key[0] for key in times}}
    lost = {rows for rows in timed if rows not in dict(plan.tiles)}
    lost |= {rows for rows, value in fastest.items() if value > dense[rows]}
    end = min(lost, default=math.inf)
    added = {
        rows: tile
        for rows, tile in (rule.tiles if rule else ())
        if rows not in timed and rows < end and nf4_tiles.fits(tile, plan.split, rows, features)
    }
    return Plan(plan.split, tuple(sorted({**added, **dict(plan.tiles)}.items(), key=lambda item: item[0])))


def described(measured: Measured) -> str:
    """A plan and its times in a line; numbers of rows that a short search did not reach have the rule's tile."""
    parts = [
        f"{rows}: {measured.fused(rows) or math.nan:.1f} ({measured.dense[rows]:.1f})"
        if rows in measured.dense
        else f"{rows}: by rule"
        for rows, _ in measured.plan.tiles
    ]
    left_out = f"; {len(measured.wrong)} kernels wrong, left out" if measured.wrong else ""
    return f"split {measured.plan.split}, rows: us (dequantise + cuBLAS): {', '.join(parts)}{left_out}"
