"""The NF4 product's tiles for this machine's GPU: measured at the first start, kept in the user's cache.

A GPU that nf4_table.json does not name is measured when a model first starts on it, in `SECONDS` at most. What is
found is kept in a file for that GPU, driver, torch, Triton and kernel: another of any of them measures again. Nothing
is asked of a network, and where the cache cannot be written the measurement lasts as long as the process.

Not here: measuring (kernels/nf4_tuner.py), and what is done on a GPU without measurements (kernels/nf4_tiles.py).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo.run.machine import driver_version
from grpo.run.versions import versions

if TYPE_CHECKING:
    import torch

    from grpo.kernels.cards import Card
    from grpo.kernels.nf4_plans import Shape
    from grpo.kernels.nf4_tuner import Measured

SECONDS = 30.0
"""What a first start may take for it."""
NEAR = 0.05
"""A shape whose sides together differ by less than this, in powers of e, from a measured one needs no measurement."""
LEAST_ROOM = 2.0
"""GB of the GPU's memory that measuring may take; with less left, the plans by rule are kept."""


def cache_folder() -> Path:
    """Where measurements are kept: $XDG_CACHE_HOME or ~/.cache, in grpo."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path(os.path.expanduser("~")) / ".cache") / "grpo" / "nf4_tiles"


def cache_key(card: Card) -> dict[str, Any]:
    """What a measurement holds for."""
    from grpo.kernels.nf4_plans import kernel_version

    installed = versions()
    return {
        "gpu": card.name, "architecture": card.architecture, "multiprocessors": card.multiprocessors,
        "driver": driver_version() or "unknown", "torch": installed.get("torch"), "triton": installed.get("triton"),
        "kernel": kernel_version(),
    }  # fmt: skip


def cache_file(card: Card) -> Path:
    """The file for `card` with this software."""
    text = "-".join(str(value) for value in cache_key(card).values())
    return cache_folder() / (re.sub(r"[^A-Za-z0-9.]+", "-", text) + ".json")


def load_measured(card: Card) -> None:
    """Take the plans that an earlier start measured; a file that cannot be read, or is of something else, is none."""
    from grpo.kernels.nf4_plans import add_plans, read_plans

    try:
        content = json.loads(cache_file(card).read_text(encoding="utf-8"))
        if content["measured_with"] == cache_key(card):
            add_plans(card, read_plans(content["shapes"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return


def save_measured(card: Card, measured: dict[Shape, Measured]) -> Path | None:
    """Add these plans to the file for `card`; where they are now, or None where nothing can be written."""
    from grpo.kernels.nf4_plans import read_plans, written_plans

    file, plans = cache_file(card), {shape: one.plan for shape, one in measured.items()}
    try:
        before = read_plans(json.loads(file.read_text(encoding="utf-8"))["shapes"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        before = {}
    content = {"measured_with": cache_key(card), "shapes": written_plans({**before, **plans})}
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        part.replace(file)
    except OSError:
        return None
    return file


def unmeasured(card: Card, shapes: Iterable[Shape]) -> list[Shape]:
    """Those of `shapes`, each once, that this card has to measure. A card of the project's own table has none."""
    from grpo.kernels.nf4_plans import distance, load_table, measured_shapes

    if card.unit == "none" or (card.name, card.architecture) in load_table():
        return []
    known = measured_shapes(card)
    return [shape for shape in dict.fromkeys(shapes) if not any(distance(one, shape) < NEAR for one in known)]


def prepare_tiles(
    device: torch.device, shapes: Iterable[Shape], dtype: torch.dtype, say: Callable[[str], None], *,
    seconds: float = SECONDS,
) -> None:  # fmt: skip
    """Have plans for W of `shapes` on `device`, measured if they have not been; `say` is told of it."""
    import torch

    from grpo.kernels import cards, nf4_gemm, nf4_plans, nf4_tuner

    card = cards.card(device)
    load_measured(card)
    wanted = unmeasured(card, shapes)
    if not wanted or not nf4_gemm.fused_serves(dtype, device):
        return
    if torch.cuda.mem_get_info(device)[0] < LEAST_ROOM * 1e9:
        say(f"too little of the {card.name}'s memory is free to measure the 4-bit product; tiles are taken by rule")
        return
    say(f"measuring the 4-bit product on this {card.name}, once, for at most {seconds:.0f} s")
    with torch.cuda.device(device):
        measured = nf4_tuner.tune(wanted, card, dtype, seconds, say=say)
    nf4_plans.add_plans(card, {shape: one.plan for shape, one in measured.items()})
    torch.cuda.empty_cache()
    file = save_measured(card, measured) if measured else None
    say(f"kept in {file}" if file else "not kept: the cache folder cannot be written; the next start measures again")
