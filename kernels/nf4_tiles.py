"""How the fused NF4 product may be cut up on a card: tiles, what fits, what to measure, what to take unmeasured.

A plan for a shape of W is one split of K and a tile for each number of rows of x. Measured plans come from a table
(nf4_plans.py); `default_plan` is for a card that has none, so that any card has the fused product at once. Everything
follows from the card's architecture, shared memory and multiprocessors and from the shape.

Not here: the kernel, timing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from grpo.kernels.cards import MB, Card
from grpo.kernels.split_k import COUNTERS, WORKSPACE_BYTES

Item = TypeVar("Item")

ROWS = (8, 16, 32, 64, 128, 256, 512)
"""Numbers of rows of x that are measured; each stands for those down to the one before."""
SPLITS = (1, 2, 3, 4, 5, 6, 8)
RULE_SPLITS = (1, 2, 4, 8)
"""Those that the rule chooses among; three, five and six can fill a card's multiprocessors once where these do not, but
which of them do depends on how many programs share one, and that is measured."""
BUSY, BUSY_TURING = 1.45, 2.9
"""Programs per multiprocessor that a split aims at: the least with which the measured tables are met. nf4_turing.py,
which loads nothing ahead, wants more of them."""
WIDE = 3.0
"""Programs of 64 rows per multiprocessor from which tiles of 128 rows are taken."""
SUMS_PER_THREAD = 128
"""float32 sums that a thread keeps in registers at the most."""
L2_SHARE = 0.64
SMALLEST_PIECE, LARGEST_PIECE = 16 * MB, 40 * MB
"""Of a dequantised weight: a smaller one leaves multiprocessors idle, a larger one overflows the workspace."""
TENSOR_MEMORY = 512
"""Columns of 128 float32 that sm_100 keeps sums and operands in."""


@dataclass(frozen=True)
class Tile:
    """How the fused kernel cuts up a product. None of it changes a bit of the result."""

    n: int
    """Rows of W (columns of y) per program; a multiple of 16 * warps."""
    m: int
    """Rows of x per program, at least 16."""
    warps: int
    stages: int
    """Depth of the pipeline of loads."""
    dots: int
    """Matrix products per 128 columns: 1 overlaps looking up with multiplying, 2 needs fewer registers."""


@dataclass(frozen=True)
class Plan:
    """What to do for one shape of W."""

    split: int
    """Programs that share the columns of a tile. Part of the result's definition: see nf4_gemm.py."""
    tiles: tuple[tuple[int, Tile], ...]
    """(largest number of rows, tile), ascending."""

    def tile(self, rows: int) -> Tile | None:
        """The tile for `rows` rows of x; None: dequantise + cuBLAS is faster."""
        return next((tile for most, tile in self.tiles if rows <= most), None)


def fits(tile: Tile, split: int, rows: int, features: int) -> bool:
    """Whether the workspace has room for the partial sums of a product."""
    programs = math.ceil(rows / tile.m) * math.ceil(features / tile.n)
    return split == 1 or (programs <= COUNTERS and 4 * programs * split * tile.m * tile.n <= WORKSPACE_BYTES)


def shared_bytes(tile: Tile, card: Card) -> int:
    """Shared memory of a program, as Triton lays it out: x, words and scales of every stage in flight.

    wgmma reads x where it lies, one stage longer than mma.sync, which has it in registers by then.
    """
    x, weights = 256 * tile.m, 68 * tile.n
    stages_of_x = tile.stages if card.unit in ("wgmma", "tcgen05") else tile.stages - 1
    return max(stages_of_x, 1) * x + (tile.stages - 1) * weights


def serves(tile: Tile, card: Card) -> bool:
    """Whether a program of `tile` has room on `card`, in shared memory, registers and tensor memory."""
    if card.unit == "none" or tile.n % (16 * tile.warps):
        return False
    if card.unit == "m16n8k8":
        return tile.stages == tile.dots == 1 and tile.n * tile.m <= tile.warps * 32 * SUMS_PER_THREAD // 2
    if shared_bytes(tile, card) > card.shared_memory:
        return False
    if card.unit == "tcgen05" and tile.m * tile.n // 128 + 128 // tile.dots > TENSOR_MEMORY:
        return False
    if card.unit == "mma" and tile.n * tile.m > tile.warps * 32 * SUMS_PER_THREAD // 2 and tile.warps == 4:
        return False  # x is in registers too, and the sums would spill
    return tile.n * tile.m <= tile.warps * 32 * SUMS_PER_THREAD


def candidates(card: Card, rows: int) -> list[Tile]:
    """Tiles worth timing for up to `rows` rows of x: every one that has room."""
    if card.unit == "m16n8k8":
        turing_tiles = [
            Tile(n, m, 4, 1, 1) for n in (64, 128, 256) for m in (8, 16, 32, 64) if min(rows, 64) // 2 <= m <= rows
        ]
        return [tile for tile in turing_tiles if serves(tile, card)]
    heights = {8: (), 16: (16,), 32: (32,), 64: (64,), 128: (64, 128)}.get(rows, (128, 256))
    tiles = []
    for m in heights:
        for n, warps in ((64, 4), (128, 4), (128, 8), (256, 8)):
            if m < 128 and warps == 8 and card.unit != "mma":
                continue  # slower on an H100, or faster by less than the spread
            deep = (3, 4) if card.unit == "mma" else (3, 4, 6)
            for stages in deep if m < 64 else (2, 3) if card.unit == "mma" else (2, 3, 4):
                tiles += [Tile(n, m, warps, stages, dots) for dots in (1, 2)]
    return [tile for tile in tiles if serves(tile, card)]


def splits(card: Card, shape: tuple[int, int], rows: int, tile: Tile) -> list[int]:
    """Splits that keep the card busy without filling it many times over, and fit the workspace."""
    programs = math.ceil(shape[0] / tile.n) * math.ceil(rows / tile.m)
    few, many = card.multiprocessors // 3, 8 * card.multiprocessors
    return [
        split
        for split in SPLITS
        if programs * split >= few
        and (split == 1 or (programs * split <= many and split * 2 <= shape[1] // 128))
        and fits(tile, split, rows, shape[0])
    ]


def default_split(card: Card, shape: tuple[int, int]) -> int:
    """The least split that gives every multiprocessor something to do, as far as K is long enough."""
    programs = math.ceil(shape[0] / 64)
    possible = [split for split in RULE_SPLITS if split == 1 or split * 2 <= shape[1] // 128]
    busy = BUSY_TURING if card.unit == "m16n8k8" else BUSY
    return next((split for split in possible if programs * split >= busy * card.multiprocessors), possible[-1])


DEFAULTS: dict[str, tuple[tuple[int, Tile, Tile], ...]] = {
    "wgmma": (
        (16, Tile(64, 16, 4, 4, 2), Tile(128, 16, 4, 3, 2)),
        (32, Tile(64, 32, 4, 4, 1), Tile(128, 32, 4, 4, 1)),
        (64, Tile(64, 64, 4, 3, 2), Tile(128, 64, 4, 3, 1)),
        (128, Tile(64, 128, 4, 3, 2), Tile(128, 128, 8, 3, 2)),
    ),
    "tcgen05": (
        (16, Tile(64, 16, 4, 4, 2), Tile(128, 16, 4, 3, 2)),
        (32, Tile(64, 32, 4, 4, 2), Tile(128, 32, 4, 3, 2)),
        (64, Tile(64, 64, 4, 3, 2), Tile(128, 64, 4, 3, 2)),
        (128, Tile(64, 128, 4, 3, 2), Tile(128, 128, 4, 3, 2)),
    ),
    "mma": (
        (16, Tile(64, 16, 4, 4, 2), Tile(128, 16, 4, 4, 2)),
        (32, Tile(64, 32, 4, 4, 2), Tile(128, 32, 4, 4, 2)),
        (64, Tile(64, 64, 4, 3, 2), Tile(128, 64, 4, 3, 2)),
        (128, Tile(64, 64, 4, 3, 2), Tile(128, 128, 8, 3, 2)),
    ),
    "m16n8k8": (
        (8, Tile(64, 8, 4, 1, 1), Tile(128, 8, 4, 1, 1)),
        (16, Tile(64, 16, 4, 1, 1), Tile(128, 16, 4, 1, 1)),
        (32, Tile(64, 32, 4, 1, 1), Tile(128, 32, 4, 1, 1)),
        (64, Tile(64, 32, 4, 1, 1), Tile(128, 64, 4, 1, 1)),
    ),
    "none": (),
}
"""Matrix unit -> (largest number of rows, tile, tile for a W with many rows)."""
RULE_ENDS = {"m16n8k8": 16}
"""Matrix unit -> rows above which dequantising is faster unless measured otherwise: nf4_as_sm75.json of the results."""


def default_plan(card: Card, shape: tuple[int, int]) -> Plan | None:
    """The plan for a W of `shape` on a card that was not measured; None where there is no fused product."""
    split = default_split(card, shape)
    wide = math.ceil(shape[0] / 64) >= WIDE * card.multiprocessors
    last = RULE_ENDS.get(card.unit, ROWS[-1])
    chosen = ((rows, many if wide else few) for rows, few, many in DEFAULTS[card.unit] if rows <= last)
    tiles = tuple((rows, tile) for rows, tile in chosen if serves(tile, card) and fits(tile, split, rows, shape[0]))
    return Plan(split, tiles) if tiles else None


def shortlist(card: Card, shape: tuple[int, int]) -> list[tuple[int, int, Tile]]:
    """(rows, split, tile) worth timing at a first start, the default first: two tiles, splits next to the default."""
    split = default_split(card, shape)
    near = SPLITS[max(0, SPLITS.index(split) - 1) : SPLITS.index(split) + 2]
    choices: dict[tuple[int, int, Tile], None] = {}
    plan = default_plan(card, shape)
    for rows, tile in plan.tiles if plan else ():
        choices[rows, split, tile] = None
    by_rows = [
        [(rows, one, tile) for tile in _serving(card, tiles) for one in splits(card, shape, rows, tile) if one in near]
        for rows, *tiles in DEFAULTS[card.unit]
    ]
    return list(dict.fromkeys([*choices, *in_turns(by_rows)]))


def in_turns(lists: Iterable[Sequence[Item]]) -> list[Item]:
    """The first of every list, then the second of every list, each once: cut short, there is something for all."""
    lists = list(lists)
    longest = max(map(len, lists), default=0)
    return list(dict.fromkeys(one[index] for index in range(longest) for one in lists if index < len(one)))


def _serving(card: Card, tiles: Iterable[Tile]) -> list[Tile]:
    return [tile for tile in tiles if serves(tile, card)]


def piece_bytes(card: Card) -> int:
    """Of a weight that is dequantised before it is multiplied: what the product then reads from the L2 cache."""
    return min(max(int(L2_SHARE * card.l2), SMALLEST_PIECE), LARGEST_PIECE)
