"""One NF4 copy on a GPU, shown: memory, identity, start-up, adapter sync, agreement of vLLM with the training graph.

Starts one process for each part (a model has the GPU to itself, and start-up is measured from nothing), gathers what
they print, checks it against the project's bars, and writes one JSON file.

    python -m benchmarks.gpu_one_copy --model SmolLM2-135M-Instruct.Q4_1.gguf --out benchmarks/results/gpu_one_copy.json
    python -m benchmarks.gpu_one_copy --parts start-3b,routes-3b --budget 200

Parts: `load-8b` and `start-3b` (random weights of the Llama shapes), `routes-3b` (the adapter in our linear layers,
in vLLM's LoRA layers, and absent), `mismatch` (SmolLM2 after 20 optimiser steps, on a 16-bit and on an NF4 base,
against stock vLLM and transformers on the same values).
What is measured is written after every process. With --resume, parts that `--out` already has are kept.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from benchmarks.common.processes import wait_or_end, write_result

Keep = Callable[[dict[str, Any]], None]
PARTS = ("start-3b", "load-8b", "routes-3b", "mismatch")
GIB = 2**30


class Runner:
    """Runs the benchmarks of the parts, each with what is left of the time."""

    def __init__(self, budget: float):
        self.ends = time.monotonic() + budget

    def __call__(self, benchmark: str, *arguments: str) -> dict[str, Any]:
        """The JSON on the benchmark's last line, or {"error": ...}."""
        left = self.ends - time.monotonic()
        if left < 15:
            return {"error": "skipped: no time left"}
        command = [sys.executable, "-m", f"benchmarks.{benchmark}", *arguments]
        print("$", benchmark, *arguments, flush=True)
        started = time.monotonic()
        with (
            tempfile.TemporaryFile("w+", errors="replace") as out,
            tempfile.TemporaryFile("w+", errors="replace") as err,
        ):
            failed = wait_or_end(subprocess.Popen(command, stdout=out, stderr=err), left)
            out.seek(0)
            err.seek(0)
            lines, errors = out.read().strip().splitlines(), err.read()
        seconds = round(time.monotonic() - started, 1)
        if failed or not lines:
            print(errors[-3000:], flush=True)
            return {"error": failed or "no output", "stderr": errors[-1500:], "wall_s": seconds}
        print("\n".join(lines[-3:-1]), f"({seconds} s)", flush=True)
        return {**json.loads(lines[-1]), "wall_s": seconds}


def model_part(run: Runner, options: argparse.Namespace, shape: str, *arguments: str) -> dict[str, Any]:
    sizes = ["--device", options.device]
    if options.tiny:
        shape, sizes = (
            "tiny",
            [*sizes, "--sequences=2,4", "--prompt-tokens=16", "--new-tokens=8", "--max-seq-length=64"],
        )
    return run("one_copy_model", "--shape", shape, *arguments, *sizes)


def start_3b(run: Runner, options: argparse.Namespace, keep: Keep) -> None:
    keep(model_part(run, options, "3b", "--measure=startup,memory,sync,agreement"))


def load_8b(run: Runner, options: argparse.Namespace, keep: Keep) -> None:
    where = (f"--checkpoint={options.checkpoint}", f"--scratch={options.scratch}")
    keep(model_part(run, options, "8b", "--measure=startup,memory", *where))


def routes_3b(run: Runner, options: argparse.Namespace, keep: Keep) -> None:
    for route in ("vllm", "in_layer", "none"):
        keep({route: model_part(run, options, "3b", f"--route={route}", "--measure=sync,agreement,throughput")})


def mismatch(run: Runner, options: argparse.Namespace, keep: Keep) -> None:
    """Ours on an NF4 and on a 16-bit base, and stock on the values of each, in both 16-bit types, all at once: nothing
    here is timed."""
    common = ["--device", options.device]
    if options.tiny:
        common += ["--steps=2", "--prompts-per-step=2", "--completions=3"]
    with ThreadPoolExecutor(1 if options.tiny else 8) as pool:
        futures: dict[Future[dict[str, Any]], str] = {}
        for dtype in options.dtypes:
            plain = options.scratch / f"grpo-export-{dtype}"
            rounded = options.scratch / f"grpo-export-{dtype}-nf4"
            failed = export(run, options, dtype, plain) or export(run, options, dtype, rounded, "--four-bit")
            if failed:
                keep({f"{dtype}/error": failed})
                continue
            modes = {
                "nf4": ["ours", "--four-bit", "--model", str(plain)],
                "16bit": ["ours", "--model", str(plain)],
                "stock": ["stock", "--model", str(plain)],
                "stock-nf4": ["stock", "--model", str(rounded)],
            }
            for name, mode in modes.items():
                where = ["--dtype", dtype, *common]
                futures[pool.submit(run, "one_copy_mismatch", *mode, *where)] = f"{dtype}/{name}"
        for future in as_completed(futures):
            keep({futures[future]: future.result()})


def export(run: Runner, options: argparse.Namespace, dtype: str, folder: Path, *form: str) -> dict[str, Any] | None:
    """Write the model's values, or with `--four-bit` NF4's, to `folder` unless they are there; what failed."""
    if (folder / "config.json").exists():
        return None
    where = ["--model", options.model, "--folder", str(folder), "--dtype", dtype]
    made = run("one_copy_mismatch", "export", *where, *form)
    return made if "error" in made else None


# Bars


def checks(parts: dict[str, Any]) -> list[dict[str, Any]]:
    """Every bar whose figure was measured: name, figure, bar, whether it holds."""
    found: list[dict[str, Any]] = []
    for name in ("start-3b", "load-8b"):
        found += model_checks(name, parts.get(name, {}))
    if "in_layer" in parts.get("routes-3b", {}):
        found += route_checks(parts["routes-3b"])
    found += mismatch_checks(parts.get("mismatch", {}))
    return found


def at_most(name: str, figure: float, bar: float) -> dict[str, Any]:
    return {"check": name, "figure": round(figure, 6), "bar": f"<= {bar:.6g}", "holds": figure <= bar}


def model_checks(name: str, part: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    if name == "start-3b" and "startup" in part:
        found.append(at_most("3b: process start to first token, s", part["startup"]["total"], 45))
    if "sync" in part:
        found.append(at_most(f"{name}: adapter sync, ms, median of 20", part["sync"]["median_ms"], 10))
    if "load_peak_bytes" in part:
        expected = part["expected_bytes"]["total"]
        if name == "load-8b":
            found.append(at_most("8b: peak while loading, GiB", part["load_peak_bytes"] / GIB, 6.5))
        off = abs(part["loaded_bytes"] / expected - 1)
        found.append(at_most(f"{name}: weights loaded against arithmetic, relative", off, 0.03))
    if part.get("identity"):
        different = len(part["identity"]["different"]) + len(part["identity"]["vllm_only"])
        off = abs(part["identity"]["bytes_both_sides"] / part["expected_bytes"]["total"] - 1)
        found.append(at_most(f"{name}: weights of both sides against arithmetic, relative", off, 0.03))
        found.append(at_most(f"{name}: tensors not shared, of {part['identity']['tensors']}", different, 0))
    return found


def route_checks(routes: dict[str, Any]) -> list[dict[str, Any]]:
    if any("throughput" not in routes.get(name, {}) for name in ("in_layer", "vllm")):
        return []
    found = []
    for key in ("rollout_tokens_per_second", "decode_tokens_per_second"):
        for ours, theirs in zip(routes["in_layer"]["throughput"], routes["vllm"]["throughput"], strict=True):
            name = f"{key}, vLLM's LoRA over ours, {ours['sequences']} sequences"
            found.append(at_most(name, theirs[key] / ours[key], 1))
    return found


def mismatch_checks(parts: dict[str, Any]) -> list[dict[str, Any]]:
    bars = {"bfloat16": (0.045, 0.002), "float16": (0.01, 1e-4)}
    found = []
    for name, part in parts.items():
        dtype, _, form = name.partition("/")
        if form not in ("nf4", "16bit") or "after_training" not in part:
            continue
        after, stock = part["after_training"], parts.get(f"{dtype}/stock{'-nf4' if form == 'nf4' else ''}", {})
        for key, bar in zip(("mean_abs", "mismatch_kl"), bars[dtype], strict=True):
            found.append(at_most(f"{name}: {key} after training", after[key], bar))
            if key in stock:
                found.append(at_most(f"{name}: {key} against stock", after[key] / stock[key], 1.1))
    return found


def print_summary(parts: dict[str, Any], found: list[dict[str, Any]]) -> None:
    for name in ("start-3b", "load-8b"):
        memory = parts.get(name, {}).get("memory")
        if memory:
            print(f"{name}, GiB: " + ", ".join(f"{key} {size / GIB:.3f}" for key, size in memory.items()))
    for route, part in parts.get("routes-3b", {}).items():
        for entry in part.get("throughput", []):
            sync = f"sync {part['sync']['median_ms']:.2f} ms" if "sync" in part else ""
            rollout, decode = entry["rollout_tokens_per_second"], entry["decode_tokens_per_second"]
            print(
                f"{route:9} {entry['sequences']:4} sequences: all {rollout:9,.0f} decode {decode:9,.0f} tok/s  {sync}"
            )
    for name, part in parts.get("mismatch", {}).items():
        figures = part.get("after_training", part)
        if "mean_abs" in figures:
            print(f"{name:16} mean |dlogp| {figures['mean_abs']:.5f}  max {figures['max_abs']:.3f}  "
                  f"mismatch KL {figures['mismatch_kl']:.2e}  tokens {figures['tokens']}")  # fmt: skip
    for entry in found:
        print(f"{'ok  ' if entry['holds'] else 'FAIL'} {entry['check']}: {entry['figure']} ({entry['bar']})")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--parts", default=",".join(PARTS), type=lambda text: text.split(","), help="comma-separated")
    parser.add_argument("--model", default="/tmp/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", help="for `mismatch`")
    parser.add_argument(
        "--dtypes", default="bfloat16,float16", type=lambda text: text.split(","), help="for `mismatch`"
    )
    parser.add_argument("--checkpoint", choices=("memory", "disk"), default="memory", help="for `load-8b`")
    parser.add_argument("--scratch", type=Path, default=Path("/tmp"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--tiny", action="store_true", help="a small model and few tokens: tries the script, not the GPU"
    )
    parser.add_argument("--budget", type=float, default=560, help="seconds for everything")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--resume", action="store_true", help="keep the parts that --out already has")
    options = parser.parse_args()
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"--parts {sorted(unknown)[0]}: choose from {', '.join(PARTS)}")
    run = Runner(options.budget)
    functions = {"start-3b": start_3b, "load-8b": load_8b, "routes-3b": routes_3b, "mismatch": mismatch}
    parts: dict[str, Any] = {}
    if options.resume and options.out and options.out.exists():
        parts = json.loads(options.out.read_text())["parts"]
    for name in options.parts:
        parts[name] = {}

        def keep(more: dict[str, Any], name: str = name) -> None:
            parts[name] |= more
            result = {"benchmark": "gpu_one_copy", "checks": checks(parts), "parts": parts}
            write_result(options.out, result)

        functions[name](run, options, keep)
    found = checks(parts)
    print_summary(parts, found)
    errors = {name: part["error"] for name, part in parts.items() if "error" in part}
    print(json.dumps({"benchmark": "gpu_one_copy", "checks": found, "errors": errors}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
