"""Times products with 8-bit weights, int8 and FP8, beside NF4 and bf16, or (--search) tries tiles for them.

The linear layers of one decoder layer of Llama-3.1-8B, random weights, cold as in nf4_gemm.py. Before timing, every
form's product is compared with float64 on its own dequantised weights, its rows with those of smaller batches, bit for
bit, its dequantised weights with torch's, and int8 codes with bitsandbytes'.

    python -m benchmarks.eight_bit_gemm                    # a table, then one line of JSON
    python -m benchmarks.eight_bit_gemm --search 200       # for so many seconds, tiles of the kernel too
    python -m benchmarks.eight_bit_gemm --device cpu       # the checks alone, small
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.nf4_weights import Weight, copies_for, packed_weight
from benchmarks.common.processes import write_result
from benchmarks.nf4_gemm import MODELS, dense_weight
from grpo.kernels import cards, eight_bit, eight_bit_gemm
from grpo.kernels.eight_bit_gemm import Tile, eight_bit_linear
from grpo.kernels.nf4_tuner import microseconds
from grpo.run.versions import versions

ROWS = (1, 8, 16, 32, 64, 128, 256)
MODEL = "Llama-3.1-8B"
BATCHES = (1, 2, 7, 8, 16, 17, 31, 33, 64, 100, 128, 300)
Form = tuple[Tensor, Tensor]


def int8_rows(weight: Tensor) -> Form:
    return eight_bit.quantize(weight)


def fp8_blocks(weight: Tensor) -> Form:
    """Scales for blocks of 128 x 128, as Qwen's and DeepSeek's checkpoints have them."""
    blocks = weight.float().unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
    scales = blocks.abs().amax((1, 3)) / 448
    return (blocks / scales[:, None, :, None]).to(eight_bit.FP8).flatten(2).flatten(0, 1), scales


def fp8_rows(weight: Tensor) -> Form:
    scales = weight.float().abs().amax(1, keepdim=True) / 448
    return (weight.float() / scales).to(eight_bit.FP8), scales


FORMS = {"int8": int8_rows, "fp8_128x128": fp8_blocks, "fp8_rows": fp8_rows}


def check(form: Form, dtype: torch.dtype) -> dict[str, Any]:
    """Relative error against float64, rows that changed with the batch, weights that differ from torch's."""
    codes, scales = form
    weight = eight_bit.dequantize(codes, scales, dtype)
    by_torch = (codes.float() * eight_bit.expanded(scales, *codes.shape)).to(dtype)
    x = torch.randn(max(BATCHES), codes.shape[1], dtype=dtype, device=codes.device)
    reference = x.double() @ weight.double().T
    fused = eight_bit_linear(x[: eight_bit_gemm.MOST_ROWS], codes, scales)
    worst, changed = 0.0, 0
    for rows in BATCHES:
        out = torch.full((rows, codes.shape[0]), math.nan, dtype=dtype, device=codes.device)
        eight_bit_linear(x[:rows], codes, scales, out=out)
        error = float((out.double() - reference[:rows]).norm() / reference[:rows].norm())
        worst = max(worst, error if math.isfinite(error) else math.inf)
        if rows <= eight_bit_gemm.MOST_ROWS:
            changed += int((out != fused[:rows]).any(1).sum())
    return {
        "relative_error": worst,
        "rows_changed_by_batch": changed,
        "weights_unlike_torch": int((weight != by_torch).sum()),
        "products_unlike_weights": unit_products_differ(form, weight),
    }


def unit_products_differ(form: Form, weight: Tensor) -> int:
    """How many products with rows that have a single 1 are not the weight there, bit for bit."""
    rows = eight_bit_gemm.MOST_ROWS
    columns = torch.randperm(weight.shape[1], device=weight.device)[:rows]
    x = torch.zeros(rows, weight.shape[1], dtype=weight.dtype, device=weight.device)
    x[torch.arange(rows, device=weight.device), columns] = 1
    return int((eight_bit_linear(x, *form) != weight[:, columns].T).sum())


def bitsandbytes_codes_differ(weight: Tensor) -> int | str:
    try:
        from bitsandbytes.functional import int8_vectorwise_quant
    except ImportError as error:
        return str(error)
    return int((int8_vectorwise_quant(weight.half().contiguous())[0] != eight_bit.quantize(weight)[0]).sum())


def eight_bit_weight(form: Form) -> Weight:
    copies = [(form[0].clone(), form[1]) for _ in range(copies_for(form[0].numel()))]
    return Weight(copies, lambda x, copy: eight_bit_linear(x, *copy))


def tiles(card: cards.Card, rows: int) -> Iterator[Tile]:
    """Tiles to try that the card has room for."""
    tile_rows = max(16, 1 << (rows - 1).bit_length())
    for n, split, stages, warps, words in product((64, 128), (1, 2, 4), (3, 4, 6), (4, 8), (True, False)):
        needs = stages * (n * 128 + 2 * tile_rows * 128) + 2 * n * 128
        if needs <= card.shared_memory and n >= 16 * warps and not (words and card.unit != "wgmma"):
            yield Tile(n, 128, split, stages, warps, words)


def search(forms: dict[str, dict[str, Weight]], row_counts: tuple[int, ...], seconds: float) -> list[dict[str, Any]]:
    """The time of every tile on every linear layer, as many as there is time for, the smallest batches first."""
    card, found, end = cards.card(torch.device("cuda", 0)), [], time.monotonic() + seconds
    for rows in row_counts:
        for tile in tiles(card, rows):
            for kind, linears in forms.items():
                if time.monotonic() > end:
                    return found
                record: dict[str, Any] = {"rows": rows, "form": kind, "tile": tile.__dict__}
                for name, weight in linears.items():
                    x = torch.randn(rows, weight.copies[0][0].shape[1], dtype=torch.bfloat16, device="cuda")
                    try:
                        record[name] = round(microseconds(weight.copies, partial(launch, x, tile), 3.0), 2)
                        record[f"{name}_error"] = round(error_of(x, tile, weight.copies[0]), 5)
                    except Exception as error:  # a tile that does not fit costs no others
                        record[name] = f"{type(error).__name__}: {error}"[:200]
                found.append(record)
    return found


def error_of(x: Tensor, tile: Tile, copy: Form) -> float:
    """Of a tile's product, relative to that of dequantised weights: Triton 3.6 miscompiles some."""
    expected = x.float() @ eight_bit.dequantize(*copy, x.dtype).float().T
    return float((launch(x, tile, copy).float() - expected).norm() / expected.norm())


def launch(x: Tensor, tile: Tile, copy: Form) -> Tensor:
    out = torch.empty(x.shape[0], copy[0].shape[0], dtype=x.dtype, device=x.device)
    eight_bit_gemm.launch_fused(x, *copy, None, out, None, tile)
    return out


def measure(row_counts: tuple[int, ...]) -> tuple[list[dict[str, Any]], dict[str, dict[str, Weight]]]:
    """A record a linear layer and number of rows, microseconds; and the 8-bit weights."""
    records, kept = [], {kind: {} for kind in FORMS}
    for name, (parts, columns) in MODELS[MODEL].items():
        dense = torch.randn(sum(parts), columns, dtype=torch.bfloat16, device="cuda") * 0.02
        forms = {kind: make(dense) for kind, make in FORMS.items()}
        checks = {kind: check(form, torch.bfloat16) for kind, form in forms.items()}
        codes_differ = bitsandbytes_codes_differ(dense)
        for kind, form in forms.items():
            kept[kind][name] = eight_bit_weight(form)
        systems = {kind: kept[kind][name] for kind in FORMS}
        systems |= {"nf4": packed_weight(dense), "bf16": dense_weight(dense)}
        for rows in row_counts:
            x = torch.randn(rows, columns, dtype=torch.bfloat16, device="cuda")
            record = {"linear": name, "rows": rows, "checks": checks, "codes_unlike_bitsandbytes": codes_differ}
            record |= {system: round(weight.microseconds(x), 2) for system, weight in systems.items()}
            records.append(record)
        del dense, forms, systems
        torch.cuda.empty_cache()
    return records, kept


def layer_sums(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    sums: dict[int, dict[str, Any]] = {}
    for record in records:
        entry = sums.setdefault(record["rows"], {"rows": record["rows"]})
        for key in (*FORMS, "nf4", "bf16"):
            entry[key] = round(entry.get(key, 0.0) + record[key], 2)
    return list(sums.values())


def check_small() -> dict[str, Any]:
    """The checks where there is no GPU."""
    dense = torch.randn(256, 384, dtype=torch.bfloat16) * 0.02
    checks = {kind: check(make(dense), torch.bfloat16) for kind, make in FORMS.items()}
    return {"checks": checks, "codes_unlike_bitsandbytes": bitsandbytes_codes_differ(dense)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="numbers of rows of x")
    parser.add_argument("--search", type=float, default=0.0, metavar="SECONDS", help="try tiles for so long")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, help="write the result there too, as JSON")
    options = parser.parse_args()
    if options.device == "cpu":
        print(json.dumps(check_small()))
        return 0
    started, rows = time.monotonic(), tuple(int(count) for count in options.rows.split(","))
    records, weights = measure(rows)
    result = {
        "benchmark": "eight_bit_gemm", "versions": versions(), "gpu": torch.cuda.get_device_name(),
        "layers": layer_sums(records), "linears": records,
    }  # fmt: skip
    for entry in result["layers"]:
        print(entry, flush=True)
    write_result(options.out, result)
    if options.search:
        tried = {kind: weights[kind] for kind in ("int8", "fp8_128x128")}
        result["search"] = search(tried, (16, 64, 128), options.search)
    result["seconds"] = round(time.monotonic() - started, 1)
    write_result(options.out, result)
    print(json.dumps({key: value for key, value in result.items() if key not in ("linears", "search")}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
