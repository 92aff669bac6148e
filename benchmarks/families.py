"""How far generation is from the training graph for every family of models, on tiny random ones, in float32.

    python -m benchmarks.families --out benchmarks/results/families.json

An adapter that does something is on every linear layer, sequences share prompts and are packed in one row, windows and
original lengths are shorter than the sequences, multipliers are not 1. `docs/models.md` is made of the result.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from benchmarks.common.processes import write_result
from tests.helpers.families import NEWCOMERS, WITH_IMAGES, save_family, save_with_images
from tests.helpers.family_tail import TAIL
from tests.helpers.graph_comparison import largest_difference, load
from tests.helpers.tiny import FAMILIES, save_tiny

TRAINED = ["llama", *NEWCOMERS, *WITH_IMAGES]
"""Those of which tests/training makes a run."""


def measured(family: str) -> dict[str, float]:
    """Largest |logprob difference| over a 16-bit and a 4-bit base, both computed in float32."""
    with tempfile.TemporaryDirectory() as name:
        save(Path(name), family)
        bases = {"plain": False, "nf4": True}
        found = {kind: largest_difference(*load(Path(name), load_in_4bit=four_bit)) for kind, four_bit in bases.items()}
    print(f"{family:24}" + "".join(f"{value:12.1e}" for value in found.values()), flush=True)
    return found


def save(folder: Path, family: str) -> None:
    """The tiny model of `family`."""
    if family in WITH_IMAGES:
        save_with_images(folder, family)
    elif family in NEWCOMERS | TAIL:
        save_family(folder, family)
    else:
        save_tiny(folder, family)


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the result here")
    parser.add_argument("--only", help="families, with commas between")
    parsed = parser.parse_args(arguments)
    every = [*dict.fromkeys([*FAMILIES, *NEWCOMERS, *TAIL]), *WITH_IMAGES]
    print(f"{'family':24}{'16 bit':>12}{'NF4':>12}")
    families = {name: measured(name) for name in (parsed.only.split(",") if parsed.only else every)}
    result = {"benchmark": "families", "families": families, "trained": TRAINED}
    write_result(parsed.out, result)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
