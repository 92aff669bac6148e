"""Experts of Qwen3-30B-A3B's shape while decoding: correctness, and microseconds of a layer by number of sequences.

Random weights in NF4, 128 experts of 768, 8 for each token, uniform routing. A whole layer is compared with float64.
Timed inside CUDA graphs: the two products alone at every tile, the whole layer (router, choice, both products,
activation, sum) without and with an adapter of rank 16 on every expert, and bf16 weights by torch's grouped_mm.

    python -m benchmarks.experts --out benchmarks/results/experts.json
    python -m benchmarks.experts --counts 32,128 --taken   # by the tiles alone that decoding takes
    TRITON_INTERPRET=1 python -m benchmarks.experts --tiny

Prints a table; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common.processes import write_result
from grpo.kernels import cards, nf4, nf4_experts, routing
from grpo.kernels.experts import ExpertAdapter, ExpertAdapters, ExpertMatrix, Experts, group, route
from grpo.kernels.glu import glu_forward
from grpo.kernels.nf4_experts import DecodeTiles
from grpo.kernels.nf4_tiles import Tile

SHAPE = {"experts": 128, "hidden": 2048, "inner": 768, "top_k": 8}
TINY = {"experts": 8, "hidden": 128, "inner": 64, "top_k": 2}
COUNTS = (1, 8, 32, 64, 128, 256)
BARS = {32: (130, 160), 128: (150, 190)}
"""Sequences -> microseconds on an H200 of the products alone, and of the whole layer with adapters."""
TILES = (
    Tile(128, 16, 4, 3, 2), Tile(128, 16, 4, 3, 1), Tile(128, 16, 4, 4, 1), Tile(128, 16, 4, 2, 1),
    Tile(128, 16, 8, 3, 1), Tile(128, 16, 8, 3, 2), Tile(256, 16, 8, 3, 2), Tile(256, 16, 8, 4, 2),
    Tile(256, 16, 8, 3, 1), Tile(64, 16, 4, 4, 1), Tile(128, 32, 4, 3, 2), Tile(128, 32, 4, 4, 2),
    Tile(128, 32, 8, 3, 2), Tile(256, 32, 8, 3, 2),
)  # fmt: skip
RANK = 16
BANDWIDTH = 3.0e12


# What is measured


def packed(experts: int, rows: int, columns: int, device: str) -> ExpertMatrix:
    """Random matrices of all experts in NF4."""
    weight, absmax = nf4.allocate(experts * rows, columns, torch.bfloat16, device)
    for expert in range(experts):
        nf4.quantize_rows(weight, absmax, expert * rows, torch.randn(rows, columns, device=device) * 0.02)
    return ExpertMatrix(weight, absmax, experts)


def layer(sizes: dict[str, int], device: str) -> Experts:
    """The experts of one layer."""
    experts, hidden, inner = sizes["experts"], sizes["hidden"], sizes["inner"]
    return Experts(packed(experts, 2 * inner, hidden, device), packed(experts, hidden, inner, device), "silu")


def adapters(sizes: dict[str, int], device: str) -> ExpertAdapters:
    """Random ones on every expert."""

    def one(rows: int, columns: int) -> ExpertAdapter:
        a = torch.randn(sizes["experts"], RANK, columns, device=device).bfloat16() * columns**-0.5
        return ExpertAdapter(a, torch.randn(sizes["experts"], rows, RANK, device=device).bfloat16() * 0.02)

    above, below = one(2 * sizes["inner"], sizes["hidden"]), one(sizes["hidden"], sizes["inner"])
    return ExpertAdapters(above, below, torch.ones((), dtype=torch.bfloat16, device=device))


def exact(x: Tensor, logits: Tensor, experts: Experts, sizes: dict[str, int], lora: ExpertAdapters | None) -> Tensor:
    """A layer in float64, an expert at a time; every tensor that is rounded here is rounded there."""
    weights, chosen = route(logits, sizes["top_k"], True)
    result = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for expert in range(sizes["experts"]):
        token, place = (chosen == expert).nonzero(as_tuple=True)
        if not len(token):
            continue
        above = experts.gate_up.dense(expert, expert + 1)[0].double()
        below = experts.down.dense(expert, expert + 1)[0].double()
        gate_up = x[token].double() @ above.t()
        if lora is not None and lora.gate_up is not None:
            shrunk = (x[token].double() @ lora.gate_up.a[expert].double().t()).bfloat16().double()
            gate_up += shrunk @ lora.gate_up.b[expert].double().t()
        inner = glu_forward(gate_up.bfloat16(), "silu")
        rows = inner.double() @ below.t()
        if lora is not None and lora.down is not None:
            shrunk = (inner.double() @ lora.down.a[expert].double().t()).bfloat16().double()
            rows += shrunk @ lora.down.b[expert].double().t()
        result.index_add_(0, token, rows.bfloat16().double() * weights[token, place].double()[:, None])
    return result


def relative(ours: Tensor, wanted: Tensor) -> float:
    return float((ours.double() - wanted).norm() / wanted.norm())


def inputs(tokens: int, sizes: dict[str, int], device: str) -> tuple[Tensor, Tensor]:
    """x and a router's logits, of which no two of a token are equal."""
    torch.manual_seed(tokens)
    x = torch.randn(tokens, sizes["hidden"], device=device).bfloat16()
    ranks = torch.stack([torch.randperm(sizes["experts"], device=device) for _ in range(tokens)]).float()
    return x, (ranks / 32).bfloat16()


def checked(tokens: int, sizes: dict[str, int], experts: Experts, lora: ExpertAdapters, device: str) -> dict[str, Any]:
    """Relative errors against float64, and whether the choice is torch's."""
    x, logits = inputs(tokens, sizes, device)
    found: dict[str, Any] = {}
    for name, each in (("layer", None), ("with_adapters", lora)):
        y = nf4_experts.decode(x, logits, experts, sizes["top_k"], True, each)
        found[f"error_{name}"] = relative(y, exact(x, logits, experts, sizes, each))
    chosen = routing.choose(logits, sizes["top_k"], True, 16).chosen
    same = torch.sort(chosen.long(), -1).values == torch.sort(route(logits, sizes["top_k"], True)[1], -1).values
    return found | {"same_choice": bool(same.all())}


def microseconds(call: Any) -> float:
    """Of a call inside a CUDA graph."""
    import triton

    return 1e3 * triton.testing.do_bench_cudagraph(call, rep=12)


def name_of(tile: Tile) -> str:
    return str((tile.n, tile.m, tile.warps, tile.stages, tile.dots))


def agreement(experts: Experts, top_k: int, tiles: tuple[Tile, ...]) -> dict[str, bool]:
    """Which of `tiles` compute what torch does, with adapters and without."""
    above, below = (
        nf4_experts.first_experts(each, nf4_experts.CHECKED_EXPERTS) for each in (experts.gate_up, experts.down)
    )

    def right(tile: Tile) -> bool:
        activated = nf4_experts.agrees(above, top_k, tile, RANK, experts.activation)
        return activated and nf4_experts.agrees(below, top_k, tile, RANK)

    return {name_of(tile): right(tile) for tile in tiles}


def timed(
    tokens: int, sizes: dict[str, int], experts: Experts, lora: ExpertAdapters, dense: Any, right: list[Tile]
) -> dict[str, Any]:
    """Microseconds of everything at one number of sequences, by the tiles that are `right`."""
    x, logits = inputs(tokens, sizes, "cuda")
    top_k, hit = sizes["top_k"], len(set(route(logits, sizes["top_k"], True)[1].flatten().tolist()))
    inner = torch.randn(tokens * top_k, sizes["inner"], device="cuda").bfloat16()
    by_tile = {tile: both_products(x, inner, logits, experts, top_k, tile) for tile in right}
    tiles = fastest(by_tile)
    router = torch.randn(sizes["experts"], sizes["hidden"], device="cuda").bfloat16()

    router_us = round(microseconds(lambda: F.linear(x, router)), 1)

    def whole(each: ExpertAdapters | None) -> float:
        def call() -> None:
            F.linear(x, router)
            nf4_experts.decode(x, logits, experts, top_k, True, each, tiles)

        return round(microseconds(call), 1)

    return {
        "sequences": tokens,
        "experts_hit": hit,
        "products_us": round(by_tile[tiles.gate_up][0] + by_tile[tiles.down][1], 1),
        "layer_us": whole(None),
        "layer_with_adapters_us": whole(lora),
        "parts_us": parts(x, inner, logits, experts, lora, top_k, tiles) | {"router": router_us},
        "bf16_grouped_mm_us": round(dense_time(x, logits, sizes, dense), 1),
        "floor_us": round(hit * 3 * sizes["hidden"] * sizes["inner"] * 0.53125 / BANDWIDTH * 1e6, 1),
        "tiles": [str(tile) for tile in tiles],
        **({"layer_apart_us": apart(lambda: whole(None))} if len(right) > 1 else {}),
        "by_tile": {name_of(tile): times for tile, times in by_tile.items()},
    }


def apart(call: Any) -> Any:
    """`call`() where no kernel begins before the one in front of it has ended."""
    with patch.object(cards, "OVERLAPPED_LAUNCHES", False):
        return call()


def parts(
    x: Tensor, inner: Tensor, logits: Tensor, experts: Experts, lora: ExpertAdapters, top_k: int, tiles: DecodeTiles
) -> dict[str, Any]:
    """Microseconds of every launch of a layer alone."""
    routes = routing.choose(logits, top_k, True, tiles.gate_up.m)
    above, rows = experts.gate_up, torch.empty(len(inner), x.shape[1], dtype=x.dtype, device=x.device)
    found = {
        "choose": microseconds(lambda: routing.choose(logits, top_k, True, tiles.gate_up.m)),
        "gate_up_activated": microseconds(
            lambda: nf4_experts.product(
                x, above, None, None, routes, tiles.gate_up, top_k=top_k, glu=experts.activation
            )
        ),
        "combine": microseconds(lambda: nf4_experts.combine(rows, routes)),
    }
    for name, source, matrix, adapter, tile, of_token in (
        ("gate_up", x, experts.gate_up, lora.gate_up, tiles.gate_up, top_k),
        ("down", inner, experts.down, lora.down, tiles.down, 1),
    ):
        sums = partial(nf4_experts.experts_sums, source, matrix.weight, matrix.absmax, adapter.a, lora.on, routes, tile)
        found[f"{name}_and_shrink"] = microseconds(partial(sums, top_k=of_token))
        glu = experts.activation if name == "gate_up" else ""
        ends = (*sums(top_k=of_token), adapter.b, None, routes, tile.m, glu)
        found[f"finish_{name}"] = microseconds(partial(nf4_experts.finish, *ends))
    return {name: round(time, 1) for name, time in found.items()}


def both_products(
    x: Tensor, inner: Tensor, logits: Tensor, experts: Experts, top_k: int, tile: Tile
) -> tuple[float, float]:
    """Microseconds of gate and up, and of down, by one tile."""
    routes = routing.choose(logits, top_k, True, tile.m)
    above, below = experts.gate_up, experts.down
    assert above.absmax is not None and below.absmax is not None
    up = microseconds(lambda: nf4_experts.experts_linear(x, above.weight, above.absmax, routes, tile, top_k=top_k))
    down = microseconds(lambda: nf4_experts.experts_linear(inner, below.weight, below.absmax, routes, tile))
    return round(up, 1), round(down, 1)


def fastest(by_tile: dict[Tile, tuple[float, float]]) -> DecodeTiles:
    """The best tiles of both products among those with equally many rows."""
    pairs = []
    for rows in {tile.m for tile in by_tile}:
        same = {tile: times for tile, times in by_tile.items() if tile.m == rows}
        up, down = (min(same, key=lambda tile, place=place: same[tile][place]) for place in (0, 1))
        pairs.append((same[up][0] + same[down][1], up, down))
    _, up, down = min(pairs, key=lambda pair: pair[0])
    return DecodeTiles(up, down)


def dense_time(x: Tensor, logits: Tensor, sizes: dict[str, int], dense: tuple[Tensor, Tensor]) -> float:
    """torch's grouped product of both matrices in bf16."""
    groups = group(route(logits, sizes["top_k"], True)[1], sizes["experts"])
    rows = x[groups.order // sizes["top_k"]]
    inner = torch.randn(len(rows), sizes["inner"], device="cuda").bfloat16()
    above, below = dense
    return microseconds(
        lambda: (
            F.grouped_mm(rows, above.mT, offs=groups.ends),
            F.grouped_mm(inner, below.mT, offs=groups.ends),
        )
    )


# The whole


def compile_ahead(tiles: tuple[Tile, ...]) -> list[subprocess.Popen[bytes]]:
    """Begin to compile every tile in processes of their own, which leave them in Triton's cache."""
    numbers = [TILES.index(tile) for tile in tiles]
    commands = [[sys.executable, "-m", "benchmarks.experts", "--compile", str(number)] for number in numbers]
    return [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for command in commands]


def compile_tile(tile: Tile, device: str) -> None:
    """Run whatever `tile` is timed with once, with and without adapters."""
    sizes = {**SHAPE, "experts": 16}  # a multiple of 16, for which Triton compiles as for 128
    experts, lora = layer(sizes, device), adapters(sizes, device)
    x, logits = inputs(2, sizes, device)
    for each in (None, lora):
        nf4_experts.decode(x, logits, experts, sizes["top_k"], True, each, DecodeTiles(tile, tile))
    agreement(experts, sizes["top_k"], (tile,))


def kernels(options: argparse.Namespace) -> dict[str, Any]:
    """Times on a GPU, correctness everywhere."""
    sizes, device = (TINY, "cpu") if options.tiny else (SHAPE, "cuda")
    counts = (1, 3) if options.tiny else tuple(map(int, options.counts.split(",")))
    tried = (nf4_experts.FEW[0], nf4_experts.MANY[0]) if options.taken else TILES
    compiling = [] if options.tiny else compile_ahead(tried)
    experts, lora = layer(sizes, device), adapters(sizes, device)
    for process in compiling:
        process.wait()
    result: dict[str, Any] = {"benchmark": "experts", "shape": sizes}
    if not options.tiny:
        time_all(options, experts, lora, counts, result)
    result["correctness"] = {str(tokens): checked(tokens, sizes, experts, lora, device) for tokens in counts}
    for tokens, errors in result["correctness"].items():
        print(f"{tokens:>4} sequences: {errors}", flush=True)
    write_result(options.out, result)
    return result


def time_all(
    options: argparse.Namespace, experts: Experts, lora: ExpertAdapters, counts: tuple[int, ...], result: dict[str, Any]
) -> None:
    """Every count by the tiles that are right, into `result`."""
    taken = nf4_experts.find_tiles(experts, SHAPE["top_k"], RANK)
    result["tile_taken"] = str(taken)
    if not options.taken:
        result["tiles_that_agree"] = agreement(experts, SHAPE["top_k"], TILES)
    dense = experts.gate_up.dense(), experts.down.dense()
    result["times"] = []
    for tokens in counts:
        if options.taken:
            right = [] if taken is None else [taken.of(tokens * SHAPE["top_k"], SHAPE["experts"])]
        else:
            right = [tile for tile in TILES if result["tiles_that_agree"][name_of(tile)]]
        row = timed(tokens, SHAPE, experts, lora, dense, right)
        print({key: value for key, value in row.items() if key != "by_tile"}, flush=True)
        result["times"].append(row)
        write_result(options.out, result)


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tiny", action="store_true", help="small sizes, on the CPU under TRITON_INTERPRET=1")
    parser.add_argument("--counts", default=",".join(map(str, COUNTS)), help="numbers of sequences")
    parser.add_argument("--taken", action="store_true", help="the tiles alone that decoding takes")
    parser.add_argument("--compile", type=int, metavar="N", help="compile the N-th tile alone")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    if options.compile is not None:
        compile_tile(TILES[options.compile], "cuda")
        return 0
    started = time.monotonic()
    result = kernels(options)
    result["seconds"] = round(time.monotonic() - started, 1)
    write_result(options.out, result)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
