"""Tiles of the gated delta rule's kernels: each of a search, compared with the ones in use and timed.

    python -m benchmarks.delta_tiles --out delta_tiles.json
    python -m benchmarks.delta_tiles --kernels GRADS --columns 16,32,64 --warps 8 --stages 1

A row of 8,192 tokens of a layer of Qwen3.5-4B; steps of 32 and 128 sequences while sampling. Processes compile all
kernels side by side; then one process launches them, and a tile whose results differ from those of the tile in use by
more than its rounding is named and not timed. The best go to kernels/delta_rule.py and kernels/delta_step.py. Prints a
table; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.processes import gpu_names
from benchmarks.common.timing import milliseconds
from benchmarks.hybrid import drawn, tree
from grpo.kernels import delta_rule, delta_step
from grpo.kernels.delta_rule import Tile
from grpo.kernels.gated_delta import EPS
from grpo.kernels.launch import disable_reduced_precision
from grpo.run.versions import hardware, versions

KERNELS = ("PREPARE", "ALONG", "BACK", "GRADS", "STEP 32", "STEP 128")
SLOTS = 160
"""Pages of states, of which a step has some."""
WORKERS = 12
TOLERANCE = 2e-4
"""Relative: sums in another order, of products of 16 of 24 bits."""


OF_STEPS = 4e-3
"""Results of a step are rounded to bfloat16, of sums in another order."""


def calls(options: argparse.Namespace) -> dict[str, Callable[[], list[Tensor]]]:
    """Kernel -> what launches it and gives its results."""
    recurrence = tree(options, *((1, 20, 2, 10) if options.tiny else (4, 512, 8, 192)))
    heads, dim = ((1, 2), 32) if options.tiny else ((16, 32), 128)
    inputs = delta_rule.Inputs(*drawn(recurrence, heads, dim, torch.bfloat16))
    run, grad = recurrence.run, torch.randn_like(inputs.value)
    made, kept = delta_rule.prepare(inputs, run, EPS), delta_rule.empty_kept(inputs, run)
    delta_rule.along(inputs, run, made, EPS, kept=kept)
    later = delta_rule.back(inputs, run, made, EPS, grad)

    def along() -> list[Tensor]:
        out, found = torch.empty_like(grad), delta_rule.empty_kept(inputs, run)
        states = delta_rule.along(inputs, run, made, EPS, out)
        return [out, states, delta_rule.along(inputs, run, made, EPS, kept=found), *found]

    def grads() -> list[Tensor]:
        out = [torch.empty_like(part) for part in inputs]
        delta_rule.input_grads(inputs, run, EPS, grad, kept, later, out)
        return out

    of_steps = {f"STEP {rows}": step_call(options, rows) for rows in ((2, 3) if options.tiny else (32, 128))}
    return {
        **of_steps,
        "PREPARE": lambda: list(delta_rule.prepare(inputs, run, EPS)),
        "ALONG": along,
        "BACK": lambda: list(delta_rule.back(inputs, run, made, EPS, grad)),
        "GRADS": grads,
    }


def step_call(options: argparse.Namespace, rows: int) -> Callable[[], list[Tensor]]:
    """A token of so many sequences; what comes of it drifts with the calls but for the first of each tile."""
    key_heads, heads, dim = (1, 2, 32) if options.tiny else (16, 32, 128)
    channels, device = (2 * key_heads + heads) * dim, options.device

    def normal(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*size, device=device).to(dtype)

    generator = torch.Generator().manual_seed(0)
    slots = (torch.randperm(SLOTS - 1, generator=generator)[:rows] + 1).int().to(device)
    x, ba, gate, conv = (
        normal(rows, channels),
        normal(rows, 2 * heads),
        normal(rows, heads * dim),
        normal(SLOTS, 3, channels),
    )
    states, begin = (torch.empty(SLOTS, heads, dim, dim, device=device) for _ in range(2))
    begin.normal_()
    first_conv = conv.clone()
    parts = normal(channels, 4), normal(heads), normal(heads), normal(dim)
    weights = delta_step.Weights(*parts, 1e-6, 1e-6, key_heads)
    out, (b, a) = torch.empty_like(gate), ba.chunk(2, 1)

    def call() -> list[Tensor]:
        delta_step.step(x, b, a, gate, weights, conv, states, slots, out)
        return [out, states[slots.long()]] if anew else []

    anew = False

    def compared() -> list[Tensor]:
        nonlocal anew
        states.copy_(begin)
        conv.copy_(first_conv)
        anew = True
        found = [part.clone() for part in call()]
        anew = False
        return found

    call.compared = compared  # type: ignore[attr-defined]
    return call


def module_of(kernel: str) -> tuple[Any, str]:
    """Where a kernel's tile is kept."""
    return (delta_step, "STEP") if kernel.startswith("STEP") else (delta_rule, kernel)


def tiles(options: argparse.Namespace, kernel: str) -> list[Tile]:
    """Those to try: the one in use is the first."""
    if kernel.startswith("STEP"):
        choices = itertools.product([32, 64, 128], [2, 4, 8], [1])
        return [delta_step.STEP, *itertools.starmap(Tile, choices)]
    columns = [0] if kernel == "PREPARE" else options.columns
    return [
        getattr(delta_rule, kernel),
        *itertools.starmap(Tile, itertools.product(columns, options.warps, options.stages)),
    ]


def compile_all(options: argparse.Namespace) -> None:
    """Launch each tile once, in processes of their own, so that Triton's cache has it."""
    wanted = [[kernel, *tile] for kernel in options.kernels for tile in tiles(options, kernel)[1:]]
    shares = [share for first in range(WORKERS) if (share := wanted[first::WORKERS])]
    command = [sys.executable, "-m", "benchmarks.delta_tiles", *(["--tiny"] if options.tiny else []), "--compile"]
    running = [subprocess.Popen([*command, json.dumps(share)]) for share in shares]
    for process in running:
        process.wait()


def launch_each(options: argparse.Namespace, share: list[list]) -> None:
    launches = calls(options)
    for kernel, *tile in share:
        setattr(*module_of(kernel), Tile(*tile))
        try:
            launches[kernel]()
        except Exception as error:  # a tile that does not fit is found out again, and named
            print(kernel, tile, repr(error)[:200], file=sys.stderr)


def apart(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative difference."""
    pairs = zip(found, expected, strict=True)
    return max(float((one.double() - other.double()).norm() / other.double().norm()) for one, other in pairs)


def tried(options: argparse.Namespace, kernel: str, call: Callable[[], list[Tensor]]) -> list[dict]:
    used, found = getattr(*module_of(kernel)), []
    compared = getattr(call, "compared", call)
    expected = compared()
    for tile in tiles(options, kernel):
        setattr(*module_of(kernel), tile)
        row: dict = {"kernel": kernel, "tile": list(tile)}
        try:
            row["apart"] = apart(compared(), expected)
            if row["apart"] < (OF_STEPS if kernel.startswith("STEP") else TOLERANCE):
                row["ms"] = round(sorted(milliseconds(call, 7))[3], 4)
        except Exception as error:
            row["failed"] = repr(error)[:200]
        found.append(row)
        print(row, flush=True)
    setattr(*module_of(kernel), used)
    return found


def main() -> int:
    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kernels", default=",".join(KERNELS), type=lambda text: text.split(","))
    parser.add_argument("--columns", default="16,32,64,128", type=numbers)
    parser.add_argument("--warps", default="2,4,8", type=numbers)
    parser.add_argument("--stages", default="1,2", type=numbers)
    parser.add_argument("--tiny", action="store_true", help="in Triton's interpreter: tries the script")
    parser.add_argument("--compile", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.device = "cpu" if options.tiny else "cuda"
    disable_reduced_precision()
    if options.compile:
        launch_each(options, options.compile)
        return 0
    compile_all(options)
    launches, measured, best = calls(options), [], {}
    for kernel in options.kernels:
        measured += tried(options, kernel, launches[kernel])
        timed = [row for row in measured if row["kernel"] == kernel and "ms" in row]
        best[kernel] = min(timed, key=lambda row: row["ms"])
        result = {"benchmark": "delta_tiles", "best": best, "rows": measured, "versions": versions()}
        result["hardware"] = hardware() | {"gpus": gpu_names()}
        if options.out:
            options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "rows"}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
