"""Supervised training and DPO in TRL's trainers: this project's training graph against plain TRL + peft + bitsandbytes.

QLoRA of rank 16 on all seven linears of a random-weight model. SFT: rows of 2,048 tokens as packing leaves them, one
document each, because the peer's SDPA tells documents apart only by a dense mask. DPO: pairs of 1,024 tokens each,
half of them the prompt. Both systems run TRL's own step on the same rows, TRL's fused loss included; each in a process
of its own, one after the other on the same GPU, at the same tokens per micro-batch. The peer checkpoints its layers,
as TRL does by default; one row without tells what that costs it.

    python -m benchmarks.sft_peers --budget 240 --out benchmarks/results/sft_peers.json
    python -m benchmarks.sft_peers --tiny                  # small, on a CPU: tries the script, its figures mean nothing

Memory is given twice: the peak that torch's allocator handed out in a step, and what NVML counts as used on the device
after the last one, torch's cache and the CUDA context included; nothing else should run there. A row that fails is
recorded with its error. OUT is written after every row.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BARS = {"sft": {"speed": 1.8, "memory": 0.6}, "dpo": {"speed": 1.5, "memory": 0.6}}
"""Ours over the peer's: tokens a second at least, peak memory at most."""
FOUND = "row "
"""What a measuring process begins a line of figures with."""
Key = tuple[str, str, str, int]


def rows_of(sft: Sequence[int], dpo: Sequence[int]) -> list[Key]:
    """(trainer, system, form, size) of every measurement, the most telling first in each process."""
    rows: list[Key] = []
    for trainer, sizes in (("sft", sft), ("dpo", dpo)):
        rows += [(trainer, "peer", "layer", size) for size in sizes]
        rows += [(trainer, "ours", "none", size) for size in sizes]
        rows += [(trainer, "ours", "offload", sizes[-1]), (trainer, "ours", "layer", sizes[-1])]
        rows += [(trainer, "ours", "mlp", sizes[-1])]
        rows += [(trainer, "peer", "none", sizes[len(sizes) // 2])]
    return rows


class Process:
    """One system in a process of its own, which imports at once and touches the GPU when it is given rows."""

    def __init__(self, options: argparse.Namespace):
        command = [sys.executable, "-m", "benchmarks.sft_peers", "--measure", *options.passed]
        self.child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, cwd=ROOT
        )
        self.lines: Queue[str | None] = Queue()
        Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.child.stdout is not None
        for line in self.child.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def ask(self, rows: Sequence[Key]) -> None:
        """Let it measure `rows` in this order."""
        assert self.child.stdin is not None
        self.child.stdin.write(json.dumps(rows) + "\n")
        self.child.stdin.close()

    def next(self, ends: float) -> dict[str, Any] | None:
        """The next row's figures; None when the process has ended. Raises TimeoutError when the time is over."""
        while True:
            try:
                line = self.lines.get(timeout=max(ends - time.monotonic(), 0.01))
            except Empty:
                raise TimeoutError from None
            if line is None:
                return None
            if line.startswith(FOUND):
                return json.loads(line.removeprefix(FOUND))
            print(line, end="", flush=True)

    def end(self) -> None:
        if self.child.poll() is None:
            self.child.kill()
        self.child.wait()


def compare(options: argparse.Namespace) -> int:
    """Both systems, one after the other; returns how many rows failed."""
    ends = time.monotonic() + options.budget
    wanted = rows_of(options.sft_sizes, options.dpo_sizes)
    processes = {system: Process(options) for system in options.systems}
    found: list[dict[str, Any]] = []
    try:
        for number, system in enumerate(options.systems):
            rows = [row for row in wanted if row[1] == system and row[0] in options.trainers]
            # What the first leaves over is the second's.
            until = time.monotonic() + (ends - time.monotonic()) / (len(options.systems) - number)
            measure_system(processes[system], rows, until, found, options)
    finally:
        for process in processes.values():
            process.end()
    result = record(found, options)
    print(table(result))
    print(json.dumps(result))
    return sum("error" in one for one in found)


def measure_system(
    process: Process, rows: list[Key], ends: float, found: list[dict[str, Any]], options: argparse.Namespace
) -> None:
    """Append to `found` what `process` measures; rows without a result get an error."""
    left = list(rows)
    message = ""
    process.ask(rows)
    try:
        while left and (figures := process.next(ends)) is not None:
            if "machine" in figures:
                options.machine = figures["machine"]
                continue
            left.pop(0)
            found.append(figures)
            show(figures)
            record(found, options)
    except TimeoutError:
        message = "no time left"
    process.end()
    for trainer, system, form, size in left:
        error = message or f"the process ended with code {process.child.returncode}"
        found.append({"trainer": trainer, "system": system, "form": form, "size": size, "error": error})
        show(found[-1])
    record(found, options)


def show(figures: dict[str, Any]) -> None:
    name = f"{figures['trainer']} {figures['system']:5} {figures['form']:8} {figures['size']:3}"
    if "error" in figures:
        print(f"  {name}  {figures['error']}", flush=True)
        return
    speed, step = figures["tokens_per_second"], figures["ms"]
    memory = f"{figures['allocated_bytes'] / 1e9:6.2f} GB allocated {figures['device_bytes'] / 1e9:6.2f} GB used"
    print(f"  {name} {speed:10,.0f} tok/s {step:9.1f} ms  {memory}", flush=True)


# The comparison


def record(found: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Everything so far, as it stands in OUT."""
    result: dict[str, Any] = {
        "benchmark": "sft_peers",
        "settings": options.settings,
        "rows": found,
        "against_peer": {trainer: against_peer(found, trainer) for trainer in BARS},
        **options.machine,
    }
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return result


def against_peer(found: list[dict[str, Any]], trainer: str) -> dict[str, Any]:
    """Ratios at each micro-batch that both systems were measured at, and at the peer's best, with the bars."""
    known = [one for one in found if one["trainer"] == trainer and "error" not in one]
    peers = {one["size"]: one for one in known if one["system"] == "peer" and one["form"] == "layer"}
    sizes = []
    for size, peer in sorted(peers.items()):
        ours = [one for one in known if one["system"] == "ours" and one["size"] == size]
        if ours:
            sizes.append(ratios(size, peer, ours))
    if not sizes:
        return {}
    best = max(peers.values(), key=lambda one: one["tokens_per_second"])
    return {
        "bars": BARS[trainer],
        "peers_best_size": best["size"],
        "at_peers_best_size": next((one for one in sizes if one["size"] == best["size"]), None),
        "best_speed": max(sizes, key=lambda one: one["speed"]),
        "best_memory": min(sizes, key=lambda one: one["memory"]),
        "sizes": sizes,
    }


def ratios(size: int, peer: dict[str, Any], ours: list[dict[str, Any]]) -> dict[str, Any]:
    """Ours over the peer's at one size: the fastest form's speed, the leanest form's memory."""
    fastest = max(ours, key=lambda one: one["tokens_per_second"])
    leanest = min(ours, key=lambda one: one["allocated_bytes"])
    return {
        "size": size,
        "tokens": peer["tokens"],
        "speed": share(fastest, peer, "tokens_per_second"),
        "speed_form": fastest["form"],
        "memory": share(leanest, peer, "allocated_bytes"),
        "memory_of_device": share(leanest, peer, "device_bytes"),
        "memory_form": leanest["form"],
        "memory_forms_speed": share(leanest, peer, "tokens_per_second"),
    }


def share(ours: dict[str, Any], peer: dict[str, Any], key: str) -> float:
    return round(ours[key] / peer[key], 3) if peer[key] else 0.0


def table(result: dict[str, Any]) -> str:
    lines = ["", "ours / peer at the same micro-batch (the peer with gradient checkpointing)"]
    for trainer, found in result["against_peer"].items():
        for one in found.get("sizes", ()):
            lines.append(
                f"  {trainer} {one['tokens']:6,} tokens: speed {one['speed']:5.2f}x ({one['speed_form']}), memory "
                f"{one['memory']:5.2f}x allocated, {one['memory_of_device']:5.2f}x used ({one['memory_form']}, at "
                f"{one['memory_forms_speed']:4.2f}x speed)"
                + ("   <- the peer's best" if one["size"] == found["peers_best_size"] else "")
            )
    return "\n".join(lines)


# The measuring process


def measure(options: argparse.Namespace) -> int:
    """Read rows from standard input and write figures, a line each; all rows are of one system."""
    if options.tiny:
        import torch

        torch.set_num_threads(1)
    from grpo.run.library_logs import quiet_libraries

    quiet_libraries(verbose=False)
    from benchmarks.common import sft_systems
    from benchmarks.common.timing import tried
    from grpo.run.versions import hardware, versions

    rows = [sft_systems.Row(*row) for row in json.loads(sys.stdin.readline() or "[]")]
    if not rows:
        return 0
    settings = sft_systems.Settings(**options.settings)
    system = sft_systems.SYSTEMS[rows[0].system](settings)
    tell({"machine": {"versions": versions(), "hardware": hardware()}})
    for row in rows:
        figures = tried(lambda row=row: system.measure(row))
        tell({**asdict(row), **figures})
    return 0


def tell(figures: dict[str, Any]) -> None:
    print(f"{FOUND}{json.dumps(figures)}", flush=True)


def parse() -> argparse.Namespace:
    def words(text: str) -> list[str]:
        return text.split(",")

    def numbers(text: str) -> list[int]:
        return [int(word) for word in text.split(",")]

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--systems", type=words, default=["peer", "ours"], help="comma-separated, in this order")
    parser.add_argument("--trainers", type=words, default=["sft", "dpo"])
    parser.add_argument("--shape", default="3b", help="of random_model.py")
    parser.add_argument("--sft-sizes", type=numbers, default=[1, 4, 8, 16], help="rows of 2,048 in a micro-batch")
    parser.add_argument("--dpo-sizes", type=numbers, default=[1, 4, 8], help="pairs in a micro-batch")
    parser.add_argument("--attention", default="sdpa", help="the peer's attn_implementation")
    parser.add_argument("--double-quant", action="store_true", help="the peer's absmax quantised too")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each row, after two")
    parser.add_argument("--budget", type=float, default=240, help="seconds")
    parser.add_argument("--out", type=Path, help="write the result there too, as JSON")
    parser.add_argument("--tiny", action="store_true", help="a small model on a CPU: tries the script")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.passed = [word for word in sys.argv[1:] if word != "--measure"]
    options.settings = {name: getattr(options, name) for name in ("shape", "attention", "double_quant", "steps")}
    if options.tiny:
        options.settings |= {
            "shape": "tiny", "rank": 4, "length": 64, "pair_length": 32, "warmup": 1, "steps": 1, "device": "cpu"
        }  # fmt: skip
        options.sft_sizes, options.dpo_sizes = [1, 2], [1, 2]
        options.budget = max(options.budget, 1200)
    options.machine = {}
    return options


if __name__ == "__main__":
    parsed = parse()
    sys.exit(measure(parsed) if parsed.measure else compare(parsed) > 0)
