"""Which plan the fused NF4 product takes for a shape of W on a device: measured here, measured before, or by rule.

First what this machine measured (`add_plans`: nf4_tuner.py at a first start, or its file from an earlier one), then
nf4_table.json, which holds what was measured on some cards by name, then `nf4_tiles.default_plan`. A shape between
measured ones takes the plan of the nearest. A plan never exceeds the card: tiles without room on it are left out.

Not here: measuring, where a user's measurements are kept, what a tile is.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from grpo.kernels import cards, nf4_tiles
from grpo.kernels.cards import Card
from grpo.kernels.nf4_tiles import Plan, Tile

TABLE = Path(__file__).with_name("nf4_table.json")

Shape = tuple[int, int]
"""(rows of W, columns of W)."""

log = logging.getLogger(__name__)
_added: dict[tuple[str, int], dict[Shape, Plan]] = {}


@lru_cache
def load_table() -> dict[tuple[str, int], dict[Shape, Plan]]:
    """(GPU name, architecture) -> (N, K) -> Plan, from the file that python -m benchmarks.nf4_gemm --tune writes."""
    gpus = json.loads(TABLE.read_text())
    return {(gpu, content["architecture"]): read_plans(content["shapes"]) for gpu, content in gpus.items()}


def use_table(path: Path) -> None:
    """Take plans from `path` from now on."""
    global TABLE
    TABLE = path
    load_table.cache_clear()
    find_plan.cache_clear()


def add_plans(card: Card, plans: Mapping[Shape, Plan]) -> None:
    """Take these plans on cards of this name, before the table's, from now on."""
    _added.setdefault((card.name, card.architecture), {}).update(plans)
    find_plan.cache_clear()


def measured_shapes(card: Card) -> dict[Shape, Plan]:
    """What is known of cards of this name."""
    key = card.name, card.architecture
    return {**load_table().get(key, {}), **_added.get(key, {})}


def read_plans(shapes: Mapping[str, Any]) -> dict[Shape, Plan]:
    """Plans from their JSON form. Raises KeyError, TypeError or ValueError for another."""
    return {_read_shape(shape): _read_plan(entry) for shape, entry in shapes.items()}


def written_plans(plans: Mapping[Shape, Plan]) -> dict[str, Any]:
    """Plans in their JSON form."""
    return {
        f"{features}x{columns}": {
            "split": plan.split, "tiles": {str(rows): asdict(tile) for rows, tile in plan.tiles},
        }
        for (features, columns), plan in plans.items()
    }  # fmt: skip


def _read_shape(text: str) -> Shape:
    features, columns = text.split("x")
    return int(features), int(columns)


def _read_plan(entry: Mapping[str, Any]) -> Plan:
    tiles = sorted((int(rows), Tile(**tile)) for rows, tile in entry["tiles"].items())
    return Plan(int(entry["split"]), tuple(tiles))


@lru_cache
def find_plan(device: torch.device, features: int, columns: int) -> Plan | None:
    """The plan for W [features, columns] on `device`; None where dequantising is all there is."""
    return plan_for(cards.card(device), (features, columns))


def plan_for(card: Card, shape: Shape) -> Plan | None:
    """That of the nearest measured shape, by the ratios of both sides, as far as card and workspace allow; by rule on a
    card that was not measured."""
    measured = measured_shapes(card)
    if not measured:
        return nf4_tiles.default_plan(card, shape)
    nearest = measured[min(measured, key=lambda one: distance(one, shape))]
    tiles = tuple(
        (rows, tile)
        for rows, tile in nearest.tiles
        if nf4_tiles.serves(tile, card) and nf4_tiles.fits(tile, nearest.split, rows, shape[0])
    )
    return Plan(nearest.split, tiles)


def distance(one: Shape, other: Shape) -> float:
    """How far two shapes are apart, in powers of e."""
    return abs(math.log(one[0] / other[0])) + abs(math.log(one[1] / other[1]))


@lru_cache
def kernel_version() -> str:
    """Changes whenever the kernel that tiles were measured with does."""
    digest = hashlib.sha256()
    for name in ("nf4_gemm.py", "nf4_lookup.py", "nf4_turing.py", "split_k.py"):
        digest.update(Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()[:12]
