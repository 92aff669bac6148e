"""Times the NF4 product against bitsandbytes and bf16 cuBLAS, or (--tune) measures the table it chooses tiles from.

The linear layers of one decoder layer of Llama-3.1-8B, Llama-3.2-3B and Qwen2.5-1.5B, and those of both kinds of layers
of Qwen3.5-4B, random weights. Weights are cold: every call in a CUDA graph reads another copy, together larger than the
L2 cache. bitsandbytes multiplies q, k, v and gate, up one after the other, as vLLM's integration of it does, here
without that integration's copies between; where it is not installed, its column is left out. Before timing, every
product is compared with float32 on the same dequantised weights, and its rows with those of smaller batches, bit for
bit.

    python -m benchmarks.nf4_gemm                                   # a table, then one line of JSON
    python -m benchmarks.nf4_gemm --tune kernels/nf4_table.json     # search tiles first, and measure with them
    python -m benchmarks.nf4_gemm --models Qwen3.5-4B --tune kernels/nf4_table.json --short   # a first start's search
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common.nf4_weights import (
    Weight,
    bitsandbytes_copies,
    bitsandbytes_product,
    copies_for,
    packed_weight,
    random_weight,
)
from benchmarks.common.processes import write_result
from grpo.kernels import cards, nf4, nf4_gemm, nf4_plans, nf4_tiles, nf4_tuner
from grpo.kernels.cards import Card
from grpo.kernels.nf4_tiles import Plan
from grpo.run.versions import versions

MODELS: dict[str, dict[str, tuple[tuple[int, ...], int]]] = {
    "Llama-3.1-8B": {
        "qkv": ((4096, 1024, 1024), 4096),
        "o": ((4096,), 4096),
        "gate_up": ((14336, 14336), 4096),
        "down": ((4096,), 14336),
    },
    "Llama-3.2-3B": {
        "qkv": ((3072, 1024, 1024), 3072),
        "o": ((3072,), 3072),
        "gate_up": ((8192, 8192), 3072),
        "down": ((3072,), 8192),
    },
    "Qwen2.5-1.5B": {
        "qkv": ((1536, 256, 256), 1536),
        "o": ((1536,), 1536),
        "gate_up": ((8960, 8960), 1536),
        "down": ((1536,), 8960),
    },
    "Qwen3.5-4B": {
        "qkvz": ((8192, 4096), 2560),
        "ba": ((32, 32), 2560),
        "out": ((2560,), 4096),
        "qkv": ((8192, 1024, 1024), 2560),
        "gate_up": ((9216, 9216), 2560),
        "down": ((2560,), 9216),
    },
}
"""Model -> linear layer -> (rows of each part, columns)."""

ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 2048)
MEMORY_BANDWIDTH = 3.0e12
"""Bytes per second of a device-to-device copy on an H100 80GB HBM3, for the column `floor`."""


def dense_weight(dense: Tensor) -> Weight:
    copies = [dense.clone() for _ in range(copies_for(dense.numel() * 2))]
    return Weight(copies, lambda x, copy: F.linear(x, copy))


def check(packed: Weight) -> dict[str, float]:
    """Relative error against float32, the largest over numbers of rows, and how many rows changed with the batch."""
    copy = packed.copies[0]
    features, columns = copy[0].shape[0], copy[0].shape[1] * 2
    dense = nf4.dequantize(*copy).float()
    plan = nf4_plans.find_plan(torch.device("cuda", 0), features, columns)
    most = plan.tiles[-1][0] if plan and plan.tiles else 256
    x = torch.randn(max(most, 512), columns, dtype=torch.bfloat16, device="cuda")
    reference = x.float() @ dense.T
    worst, changed = 0.0, 0
    whole = nf4_gemm.nf4_linear(x[:most], *copy)
    for rows in (1, 2, 3, 7, 8, 9, 16, 17, 31, 32, 33, 64, 65, 100, 128, 129, 200, 256, 257, 300, 512):
        out = torch.full((rows, features), math.nan, dtype=torch.bfloat16, device="cuda")
        nf4_gemm.nf4_linear(x[:rows], *copy, out=out)
        error = (out.float() - reference[:rows]).norm() / reference[:rows].norm()
        worst = max(worst, error.item() if error.isfinite() else math.inf)
        if rows <= most:
            changed += int((out != whole[:rows]).any(1).sum())
    return {"relative_error": worst, "rows_changed_by_batch": changed}


def measure(models: Iterable[str], row_counts: Iterable[int]) -> list[dict]:
    """One record per model, linear layer and number of rows, times in microseconds."""
    records = []
    for model in models:
        for name, (parts, columns) in MODELS[model].items():
            dense = random_weight(sum(parts), columns)
            packed = packed_weight(dense)
            checks = check(packed)
            systems = {"ours": packed, "bf16": dense_weight(dense)}
            if theirs := bitsandbytes_copies(dense, parts, copies_for(dense.numel() * 0.5625)):
                systems["bitsandbytes"] = Weight(theirs, bitsandbytes_product)
            for rows in row_counts:
                x = torch.randn(rows, columns, dtype=torch.bfloat16, device="cuda")
                record = {"model": model, "linear": name, "shape": [sum(parts), columns], "rows": rows, **checks}
                record |= {system: round(weight.microseconds(x), 2) for system, weight in systems.items()}
                record["floor"] = round(dense.numel() * 0.53125 / MEMORY_BANDWIDTH * 1e6, 2)
                records.append(record)
            del dense, packed, systems, theirs
            torch.cuda.empty_cache()
    return records


def layer_sums(records: list[dict]) -> list[dict]:
    """The linear layers of a decoder layer added up, with the ratios that matter."""
    sums: dict[tuple[str, int], dict] = {}
    for record in records:
        entry = sums.setdefault((record["model"], record["rows"]), {"model": record["model"], "rows": record["rows"]})
        for key in ("ours", *peers_of(records), "floor"):
            entry[key] = round(entry.get(key, 0.0) + record[key], 2)
    for entry in sums.values():
        for peer in peers_of(records):
            entry[f"against_{peer}"] = round(entry[peer] / entry["ours"], 3)
    return list(sums.values())


def peers_of(records: list[dict]) -> list[str]:
    """What ours was timed against, in the order of the columns."""
    return [peer for peer in ("bf16", "bitsandbytes") if peer in records[0]]


def print_table(records: list[dict], sums: list[dict]) -> None:
    print("microseconds, cold weights")
    peers = peers_of(records)
    times = [*peers, "ours", "floor"]
    heading = [*times, *(f"x {peer}" for peer in peers)]
    print(f"{'model':14} {'linear':8} {'rows':>5}", *(f"{name:>14}" for name in heading))
    for record in [*records, *({**entry, "linear": "layer"} for entry in sums)]:
        values = [f"{record[name]:14.1f}" for name in times]
        values += [f"{record[peer] / record['ours']:14.2f}" for peer in peers]
        print(f"{record['model']:14} {record['linear']:8} {record['rows']:5}", *values)


def tune(shapes: list[tuple[int, int]], path: Path, seconds: float, *, thorough: bool) -> None:
    """Measure `shapes` on this GPU and `put` their plans into the table at `path`."""
    card = cards.card(torch.device("cuda", 0))
    found = nf4_tuner.tune(
        shapes, card, torch.bfloat16, seconds, thorough=thorough, say=lambda text: print(f"tune: {text}", flush=True)
    )
    put(path, card, {shape: measured.plan for shape, measured in found.items()})


def put(path: Path, card: Card, plans: Mapping[tuple[int, int], Plan]) -> None:
    """Put `plans` into the table at `path`, which keeps what else it has, and use the table."""
    table = json.loads(path.read_text()) if path.exists() else {}
    before = table.get(card.name, {}).get("shapes", {})
    table[card.name] = {
        "measured_with": {key: value for key, value in versions().items() if key in ("torch", "triton")},
        "architecture": card.architecture,
        "shapes": before | nf4_plans.written_plans(plans),
    }
    text = json.dumps(table, indent=1)
    path.write_text(re.sub(r"\{[^{}]*\}", lambda inner: json.dumps(json.loads(inner[0])), text) + "\n")
    nf4_plans.use_table(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="numbers of rows of x")
    parser.add_argument(
        "--tune", type=Path, metavar="TABLE", help="search tiles, write them to this JSON file, use them"
    )
    parser.add_argument("--budget", type=float, default=600.0, help="seconds for --tune")
    parser.add_argument("--short", action="store_true", help="--tune searches as a first start does")
    parser.add_argument("--splits", type=lambda text: tuple(map(int, text.split(","))), help="of K, that --tune tries")
    parser.add_argument("--out", type=Path, help="write the result there too, as JSON")
    options = parser.parse_args()
    models = options.models.split(",")
    started = time.monotonic()
    if options.splits:
        nf4_tiles.SPLITS = options.splits
    if options.tune:
        shapes = [(sum(parts), columns) for model in models for parts, columns in MODELS[model].values()]
        tune(list(dict.fromkeys(shapes)), options.tune, options.budget, thorough=not options.short)
    torch.cuda.init()
    records: list[dict] = []
    for model in models:
        records += measure([model], [int(rows) for rows in options.rows.split(",")])
        result = {
            "benchmark": "nf4_gemm",
            "seconds": round(time.monotonic() - started, 1),
            "worst_relative_error": max(record["relative_error"] for record in records),
            "rows_changed_by_batch": sum(record["rows_changed_by_batch"] for record in records),
            "layers": layer_sums(records),
            "linears": records,
        }
        write_result(options.out, result)
    print_table(records, result["layers"])
    print(json.dumps({key: value for key, value in result.items() if key != "linears"}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
