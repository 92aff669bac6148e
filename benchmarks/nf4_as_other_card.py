"""The NF4 product of another architecture, run on the GPU that is there, whose driver compiles the PTX.

A card of sm_80 to sm_89 or of sm_120 multiplies by mma.sync, from registers; an H100 has that too. PTX for sm_80 keeps
to the instructions of sm_80 and runs there, so the code path of those cards can be compared, timed against the memory
floor of the GPU that runs it, and its tiles searched. What it says of another card is the share of the floor that the
instructions allow where memory is no slower in proportion; it is no measurement of that card.

    python -m benchmarks.nf4_as_other_card --out $OUT/as_sm80.json               # about five minutes

Two processes: one with the GPU's own tiles, bitsandbytes (if it is installed) and 16-bit cuBLAS, one that compiles for
the other card.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common.nf4_weights import bitsandbytes_copies, bitsandbytes_product
from benchmarks.common.processes import write_result
from benchmarks.nf4_gemm import MODELS
from grpo.kernels import cards, compile_only, nf4, nf4_gemm, nf4_plans, nf4_tiles, nf4_tuner
from grpo.run.versions import versions

ROWS = (1, 8, 16, 32, 64, 128, 256)
COPY_BYTES = 1 << 30
SPEED_BAR, BITSANDBYTES_BAR = 1.25, 3.0
"""At most this times the GPU's own tiles; at least this times as fast as bitsandbytes, at 8 to 64 rows."""


def copy_bandwidth() -> float:
    """Bytes a second that a device-to-device copy reads and writes."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / (nf4_tuner.microseconds([target], lambda to: to.copy_(source), 40.0) * 1e-6)


def shapes_of(model: str) -> dict[str, tuple[tuple[int, ...], int]]:
    """Linear layer -> (rows of each part, columns)."""
    return MODELS[model]


def least_shared_memory(architecture: int) -> int:
    """Bytes that a block may have on every card that multiplies by the instruction of `architecture`."""
    unit = cards.matrix_unit(architecture)
    return min(size for other, size in cards.SHARED_MEMORY.items() if cards.matrix_unit(other) == unit)


def own(options: argparse.Namespace) -> dict[str, Any]:
    """The GPU's own tiles, bitsandbytes and cuBLAS: microseconds by system, linear layer and rows."""
    dtype = getattr(torch, options.dtype)
    card = cards.card(torch.device("cuda", 0))
    times: dict[str, dict[str, dict[int, float]]] = {"ours": {}, "bitsandbytes": {}, "cublas": {}}
    for name, (parts, columns) in shapes_of(options.model).items():
        shape = (sum(parts), columns)
        copies = nf4_tuner.random_copies(card, shape, dtype)
        dense = nf4.dequantize(*copies[0])
        wide = [dense.clone() for _ in range(nf4_tuner.cold_copies(card, dense.numel() * 2))]
        theirs = bitsandbytes_copies(dense, parts, len(copies))
        for rows in ROWS:
            x = torch.randn(rows, columns, dtype=dtype, device="cuda")
            times["ours"].setdefault(name, {})[rows] = nf4_tuner.microseconds(copies, partial(product, x))
            times["cublas"].setdefault(name, {})[rows] = nf4_tuner.microseconds(wide, partial(F.linear, x))
            if theirs:
                call = partial(bitsandbytes_product, x)
                times["bitsandbytes"].setdefault(name, {})[rows] = nf4_tuner.microseconds(theirs, call)
        del copies, wide, theirs
        torch.cuda.empty_cache()
    return {"card": asdict(card), "bandwidth": copy_bandwidth(), "times": times}


def product(x: Tensor, copy: tuple[Tensor, Tensor]) -> Tensor:
    return nf4_gemm.nf4_linear(x, *copy)


def other(options: argparse.Namespace) -> dict[str, Any]:
    """The other architecture's tiles: searched, checked against float64, timed."""
    compile_only.pretend(options.architecture)
    dtype, device = getattr(torch, options.dtype), torch.device("cuda", 0)
    card = replace(cards.card(device), shared_memory=options.shared << 10)
    shapes = {name: (sum(parts), columns) for name, (parts, columns) in shapes_of(options.model).items()}
    found = nf4_tuner.tune(
        shapes.values(), card, dtype, options.seconds, thorough=True, ptx=True, say=lambda text: print(text, flush=True)
    )
    nf4_plans.add_plans(cards.card(device), {shape: measured.plan for shape, measured in found.items()})
    times: dict[str, dict[int, float]] = {}
    by_rule: dict[str, dict[int, float]] = {}
    errors = {}
    for name, shape in shapes.items():
        copies = nf4_tuner.random_copies(card, shape, dtype)
        errors[name] = against_float64(copies[0], shape)
        rule = nf4_tiles.default_plan(card, shape)
        for rows in ROWS:
            x = torch.randn(rows, shape[1], dtype=dtype, device="cuda")
            times.setdefault(name, {})[rows] = nf4_tuner.microseconds(copies, partial(product, x))
            tile = rule.tile(rows) if rule else None
            if rule and tile:
                out = torch.empty(rows, shape[0], dtype=dtype, device="cuda")
                call = partial(nf4_tuner.launch, x, out, tile, rule.split)
                by_rule.setdefault(name, {})[rows] = nf4_tuner.microseconds(copies, call)
        del copies
    return {
        "card": asdict(card),
        "times": times,
        "by_rule": by_rule,
        "errors": errors,
        "plans": nf4_plans.written_plans({shape: measured.plan for shape, measured in found.items()}),
        "left_out": {str(shape): [str(key) for key in measured.wrong] for shape, measured in found.items()},
        "searched": {
            f"{shape[0]}x{shape[1]}": [
                [rows, split, *asdict(tile).values(), round(value, 2)]
                for (rows, split, tile), value in sorted(measured.times.items(), key=lambda item: item[1])
            ]
            for shape, measured in found.items()
        },
    }


def against_float64(copy: tuple[Tensor, Tensor], shape: tuple[int, int]) -> dict[str, float]:
    """Relative error against float64, share of results that are not the float64 sum rounded once, and rows whose bits
    depend on their batch, over the numbers of rows that are fused."""
    features, columns = shape
    dense = nf4.dequantize(*copy).double()
    plan = nf4_plans.find_plan(torch.device("cuda", 0), features, columns)
    most = plan.tiles[-1][0] if plan and plan.tiles else 128
    x = torch.randn(most, columns, dtype=copy[1].dtype, device="cuda")
    exact = x.double() @ dense.T
    whole = nf4_gemm.nf4_linear(x, *copy)
    worst, unlike, changed = 0.0, 0.0, 0
    for rows in (1, 2, 7, 8, 16, 17, 32, 33, 64, 100, 128, 129, 256):
        if rows > most:
            break
        out = nf4_gemm.nf4_linear(x[:rows], *copy)
        worst = max(worst, ((out.double() - exact[:rows]).norm() / exact[:rows].norm()).item())
        unlike = max(unlike, (out != exact[:rows].to(out.dtype)).double().mean().item())
        changed += int((out != whole[:rows]).any(1).sum())
    return {"relative_error": worst, "not_rounded_once": unlike, "rows_changed_by_batch": changed}


def child(options: argparse.Namespace, part: str) -> dict[str, Any]:
    """What a process of its own finds: each architecture needs Triton's state, and its cache, to itself."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        command = [sys.executable, "-m", "benchmarks.nf4_as_other_card", "--part", part, "--out", str(found)]
        for name in ("architecture", "shared", "model", "dtype", "seconds"):
            command += [f"--{name}", str(getattr(options, name))]
        environment = dict(os.environ)
        if part == "other":
            environment["TRITON_CACHE_DIR"] = str(Path(folder) / "triton")
        subprocess.run(command, check=True, env=environment)
        return json.loads(found.read_text())


def compared(options: argparse.Namespace, ours: dict[str, Any], theirs: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each number of rows of x: the linear layers of one decoder layer together."""
    weights = sum(sum(parts) * columns for parts, columns in shapes_of(options.model).values())
    table = []
    for rows in map(str, ROWS):
        sums = {name: sum(layer[rows] for layer in times.values()) for name, times in ours["times"].items() if times}
        sums["other"] = sum(layer[rows] for layer in theirs["times"].values())
        layers = theirs["by_rule"].values()
        sums["rule"] = sum(layer[rows] for layer in layers) if layers and all(rows in one for one in layers) else 0.0
        floor = weights * 0.53125 / ours["bandwidth"] * 1e6
        table.append({"rows": int(rows), **{key: round(value, 1) for key, value in sums.items()},
                      "floor": round(floor, 1), "share_of_floor": round(floor / sums["other"], 3),
                      "own_share_of_floor": round(floor / sums["ours"], 3),
                      "against_own": round(sums["other"] / sums["ours"], 3)})  # fmt: skip
        if "bitsandbytes" in sums:
            table[-1]["against_bitsandbytes"] = round(sums["bitsandbytes"] / sums["other"], 2)
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--architecture", type=int, default=80, help="to compile for: 75, 80, 86, 89")
    parser.add_argument("--shared", type=int, help="KB of shared memory that a block may have; default: the least of "
                        "the cards with this instruction")  # fmt: skip
    parser.add_argument("--model", default="Llama-3.1-8B", choices=list(MODELS))
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--seconds", type=float, default=240.0, help="for the search")
    parser.add_argument("--part", choices=["own", "other"], help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="write the result there too, as JSON")
    options = parser.parse_args()
    options.shared = options.shared or least_shared_memory(options.architecture) >> 10
    if options.part:
        options.out.write_text(json.dumps(own(options) if options.part == "own" else other(options)))
        return 0
    started = time.monotonic()
    ours, theirs = child(options, "own"), child(options, "other")
    table = compared(options, ours, theirs)
    print("microseconds for the linear layers of one layer, cold weights; floor: reading them once")
    print(" ".join(f"{name:>14}" for name in table[0]))
    for row in table:
        print(" ".join(f"{value:14}" for value in row.values()))
    result = {
        "benchmark": "nf4_as_other_card", "architecture": options.architecture, "model": options.model,
        "dtype": options.dtype, "gpu": ours["card"]["name"], "versions": versions(),
        "gb_per_second": round(ours["bandwidth"] / 1e9), "seconds": round(time.monotonic() - started),
        "within_bar": [row["against_own"] <= SPEED_BAR for row in table if row["rows"] <= 64],
        "above_bitsandbytes": [
            row["against_bitsandbytes"] >= BITSANDBYTES_BAR
            for row in table if 8 <= row["rows"] <= 64 and "against_bitsandbytes" in row
        ],
        "errors": theirs["errors"], "table": table,
    }  # fmt: skip
    write_result(options.out, {**result, "own": ours, "other": theirs})
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
