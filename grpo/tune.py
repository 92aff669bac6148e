"""The command line of measuring the 4-bit product on this GPU: `python -m grpo.tune`.

    python -m grpo.tune                                    # the shapes of configs' usual models
    python -m grpo.tune --shapes 2560x2048,2048x2048       # rows x columns of weights
    python -m grpo.tune --config configs/gsm8k.toml        # those of a configuration's model

A training run does it by itself at its first start; this does it at will, takes longer if asked to, and prints what it
found beside cuBLAS in 16 bit and bitsandbytes. For the exit codes see `grpo.command`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo.command import command
from grpo.config.schema import read_config
from grpo.errors import UserError
from grpo.run.machine import check_machine

if TYPE_CHECKING:
    from grpo.kernels.cards import Card
    from grpo.kernels.nf4_plans import Shape
    from grpo.kernels.nf4_tuner import Measured

USUAL = (
    (2560, 2048), (2048, 2048), (22016, 2048), (2048, 11008),
    (6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336),
)  # fmt: skip
"""Of a Qwen2.5-3B and of a Llama-3.1-8B: qkv, o, gate_up, down."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (those of the process by default) and return its exit code."""
    parsed = parser().parse_args(arguments)
    return command("grpo.tune", lambda: run(parsed), interrupted=lambda: "interrupted; nothing was kept")


def run(parsed: argparse.Namespace) -> None:
    """Measure what the command line asks for. Raises UserError."""
    check_options(parsed)
    measure(parsed, wanted_shapes(parsed))


def parser() -> argparse.ArgumentParser:
    """The options of `python -m grpo.tune`."""
    result = argparse.ArgumentParser(
        prog="python -m grpo.tune", description="Measure the 4-bit product on this GPU.", allow_abbrev=False
    )
    what = result.add_mutually_exclusive_group()
    what.add_argument("--config", type=Path, metavar="CONFIG", help="measure the shapes of this configuration's model")
    what.add_argument("--shapes", metavar="NxK,...", help="measure weights of these rows and columns")
    result.add_argument("--seconds", type=float, default=120.0, help="to take at most (default: 120)")
    result.add_argument("--thorough", action="store_true", help="try every tile that has room, not a handful")
    result.add_argument("--dtype", choices=["bfloat16", "float16"], help="default: what this GPU trains in")
    result.add_argument("--out", type=Path, metavar="FILE", help="write the table there too, as JSON")
    return result


def check_options(parsed: argparse.Namespace) -> None:
    """Raises UserError for what would fail after measuring."""
    if not 0 < parsed.seconds < math.inf:
        raise UserError(f"--seconds {parsed.seconds:g}: give a number of seconds above 0")
    if parsed.out and not parsed.out.absolute().parent.is_dir():
        raise UserError(f"--out {parsed.out}: there is no folder {parsed.out.absolute().parent}")


def wanted_shapes(parsed: argparse.Namespace) -> list[Shape]:
    """The shapes of W that the command line names. Raises UserError."""
    if parsed.shapes is not None:
        return [read_shape(text) for text in parsed.shapes.split(",")]
    if parsed.config is None:
        return list(USUAL)
    from grpo.memory.shapes import model_shape
    from grpo.model.layout import fused_linears
    from grpo.model.sizes import linear_shapes

    config = read_config(parsed.config, [])
    shape = model_shape(config.model)
    if shape is None:
        raise UserError(
            f"{parsed.config}: {config.model.name} is not on this machine nor well known; give --shapes instead"
        )
    sizes = linear_shapes(shape)
    fused = [(sum(sizes[part][0] for part in parts), sizes[parts[0]][1]) for parts in fused_linears(shape).values()]
    return list(dict.fromkeys(fused))


def read_shape(text: str) -> Shape:
    """(rows, columns) of "6144x4096". Raises UserError."""
    rows, _, columns = text.strip().partition("x")
    if (
        not (rows.isdecimal() and columns.isdecimal())
        or int(rows) % 8
        or int(columns) % 64
        or 0 in map(int, (rows, columns))
    ):
        raise UserError(
            f"--shapes {text}: give rows x columns of a weight, such as 6144x4096; rows a multiple of 8, columns of 64"
        )
    return int(rows), int(columns)


def measure(parsed: argparse.Namespace, shapes: list[Shape]) -> None:
    """Measure, keep and print. Raises UserError where there is no GPU."""
    check_machine("cuda", engine=False)
    import torch

    from grpo.kernels import cards, nf4_gemm, nf4_plans, nf4_tuner
    from grpo.run import tiles

    device = torch.device("cuda", torch.cuda.current_device())
    card = cards.card(device)
    dtype = getattr(torch, parsed.dtype or ("bfloat16" if card.architecture >= 80 else "float16"))
    print(f"{card.name}: sm_{card.architecture}, {card.multiprocessors} multiprocessors, "
          f"{card.shared_memory >> 10} KB of shared memory, {card.l2 / 2**20:.0f} MB of L2 cache")  # fmt: skip
    if card.unit == "none" or not nf4_gemm.fused_serves(dtype, device):
        raise UserError(
            f"{card.name} (sm_{card.architecture}) has no fused 4-bit product in {str(dtype).removeprefix('torch.')}; "
            "weights are dequantised before they are multiplied, and there is nothing to measure"
        )
    measured = nf4_tuner.tune(shapes, card, dtype, parsed.seconds, thorough=parsed.thorough, say=print)
    if not measured:
        raise UserError(f"no kernel was compiled and right within {parsed.seconds:.0f} s; give a larger --seconds")
    nf4_plans.add_plans(card, {shape: one.plan for shape, one in measured.items()})
    file = tiles.save_measured(card, measured)
    rows = beside_others(measured, card, dtype)
    print(table(rows))
    print(f"kept in {file}" if file else f"not kept: {tiles.cache_folder()} cannot be written")
    result = {"benchmark": "tune", "card": vars(card) | {"l2": card.l2}, "rows": rows}
    if parsed.out:
        parsed.out.write_text(json.dumps(result | {"plans": nf4_plans.written_plans(
            {shape: one.plan for shape, one in measured.items()})}, indent=1) + "\n")  # fmt: skip
    print(json.dumps(result))


def beside_others(measured: dict[Shape, Measured], card: Card, dtype: Any) -> list[dict[str, Any]]:
    """A record per shape and number of rows, in microseconds; None for what is not there."""
    import torch.nn.functional as F

    from grpo.kernels import nf4, nf4_tuner

    records: list[dict[str, Any]] = []
    for shape, one in measured.items():
        packed = nf4_tuner.random_copies(card, shape, dtype)[:1]
        weight = nf4.dequantize(*packed[0])
        copies = [weight.clone() for _ in range(nf4_tuner.cold_copies(card, weight.numel() * 2))]
        theirs = bitsandbytes_copies(weight, nf4_tuner.cold_copies(card, weight.numel() * 0.5625))
        for rows in sorted(one.dense):
            x = weight.new_empty(rows, shape[1]).normal_()
            records.append({
                "shape": f"{shape[0]}x{shape[1]}", "rows": rows, "fused": one.fused(rows),
                "dequantise": one.dense[rows],
                "cublas": nf4_tuner.microseconds(copies, partial(F.linear, x), 4.0),
                "bitsandbytes": bitsandbytes_time(x, theirs),
            })  # fmt: skip
        del copies, theirs
    return records


def bitsandbytes_copies(weight: Any, count: int) -> list[Any]:
    """`weight` as bitsandbytes stores it; none where it is not installed."""
    try:
        from bitsandbytes.functional import quantize_4bit
    except ImportError:
        return []
    return [quantize_4bit(weight, quant_type="nf4", blocksize=64) for _ in range(count)]


def bitsandbytes_time(x: Any, copies: list[Any]) -> float | None:
    """Its product's microseconds."""
    if not copies:
        return None
    import bitsandbytes

    from grpo.kernels.nf4_tuner import microseconds

    return microseconds(copies, lambda copy: bitsandbytes.matmul_4bit(x, copy[0].t(), copy[1]), 4.0)


def table(records: list[dict[str, Any]]) -> str:
    """The records as text, a line each."""
    lines = [
        f"{'weight':>12} {'rows':>5} {'fused':>9} {'dequantise':>11} {'cuBLAS':>9} {'bitsandbytes':>13}   microseconds"
    ]
    for record in records:
        values = [
            f"{record[key]:.1f}" if record[key] else "-" for key in ("fused", "dequantise", "cublas", "bitsandbytes")
        ]
        lines.append("{:>12} {:>5} {:>9} {:>11} {:>9} {:>13}".format(record["shape"], record["rows"], *values))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
