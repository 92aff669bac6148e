"""Rollout speed on a GPU that no table names: by rule, and after measuring at the first start, beside the own table.

The table that comes with the project is hidden from the second and third process, and the user's cache is an empty
folder, so that the GPU is unknown to them; the third measures it as a first start does. Random weights and prompts.

    python -m benchmarks.first_start --out $OUT/first_start.json       # about five minutes
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common.processes import write_result

WAYS = ("table", "rule", "measured")
BAR = 0.95
"""Of the table's tokens a second, after measuring."""


def one_way(options: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of whole rollouts by number of sequences, and what starting took."""
    import grpo.rollout.engine
    from benchmarks import rollout
    from benchmarks.common.random_model import shape_config
    from grpo.kernels import cards, nf4_plans

    if options.way != "table":
        empty = Path(os.environ["XDG_CACHE_HOME"]) / "empty.json"
        empty.write_text("{}")
        nf4_plans.use_table(empty)
    if options.way == "rule":
        grpo.rollout.engine.prepare_tiles = lambda *arguments, **keywords: None
    prepared = {"seconds": 0.0}
    prepare = grpo.rollout.engine.prepare_tiles

    def timed(*arguments: Any, **keywords: Any) -> None:
        begun = time.monotonic()
        prepare(*arguments, **keywords)
        prepared["seconds"] = round(time.monotonic() - begun, 1)

    grpo.rollout.engine.prepare_tiles = timed
    options.device, options.kv_cache_dtype, options.system = "cuda", "auto", options.way
    sample = rollout.our_rollout(options)
    vocabulary = shape_config(options.shape).vocab_size
    found = [rollout.one_count(options, sample, vocabulary, count) for count in options.counts]
    import torch

    card = cards.card(torch.device("cuda", 0))
    plans = nf4_plans.written_plans(nf4_plans.measured_shapes(card))
    return {"measuring_s": prepared["seconds"], "rollouts": found, "plans": plans if options.way == "measured" else {}}


def child(options: argparse.Namespace, way: str, folder: Path) -> dict[str, Any]:
    """What a process of its own finds."""
    found = folder / f"{way}.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.first_start",
        "--way",
        way,
        "--out",
        str(found),
        "--shape",
        options.shape,
    ]
    command += ["--counts", ",".join(map(str, options.counts)), "--new-tokens", str(options.new_tokens)]
    subprocess.run(command, check=True, env=os.environ | {"XDG_CACHE_HOME": str(folder)})
    return json.loads(found.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", default="3b", help="3b, 8b, or tiny")
    parser.add_argument("--counts", default="1,32,128", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, help="this one alone, in this process")
    parser.add_argument("--out", type=Path, help="write the result there too, as JSON")
    options = parser.parse_args()
    if options.way:
        options.out.write_text(json.dumps(one_way(options)))
        return 0
    result: dict[str, Any] = {"benchmark": "first_start", "shape": options.shape}
    with tempfile.TemporaryDirectory() as folder:
        for way in WAYS:
            result[way] = child(options, way, Path(folder))
            write_result(options.out, result)
    rates = {way: [entry["tokens_per_second"] for entry in result[way]["rollouts"]] for way in WAYS}
    print(f"{'sequences':>10} {'table':>10} {'rule':>10} {'measured':>10}   tokens a second")
    for index, count in enumerate(options.counts):
        print(f"{count:10} " + " ".join(f"{rates[way][index]:10,.0f}" for way in WAYS))
    share = {way: [round(a / b, 3) for a, b in zip(rates[way], rates["table"], strict=True)] for way in WAYS[1:]}
    result |= {"share_of_table": share, "within_bar": min(share["measured"]) >= BAR}
    write_result(options.out, result)
    print(json.dumps({key: result[key] for key in ("benchmark", "shape", "share_of_table", "within_bar")}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
