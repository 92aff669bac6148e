"""A process that compiles fused NF4 products into Triton's cache on disk, for whoever will time or launch them.

    python -m grpo.kernels.nf4_compile 80 bfloat16 [ptx]

reads lines of JSON, [tile, split, ranks], and answers each with a line: the same, and whether there is a kernel. No GPU
is used. ptx: as `compile_only.compile_to_ptx`. `compile_all` starts such processes and hands out the work.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from queue import Empty, SimpleQueue

import torch
from triton.runtime.errors import TritonError

from grpo.kernels import cards, nf4_gemm, nf4_turing
from grpo.kernels.compile_only import compile_to_ptx, compiling_for
from grpo.kernels.nf4_lookup import byte_tables
from grpo.kernels.nf4_tiles import Tile

MOST_PROCESSES = 15
Job = tuple[Tile, int]
"""A tile and a split."""


def warm(tile: Tile, split: int, dtype: torch.dtype, unit: cards.MatrixUnit) -> None:
    """Compile the kernel for shapes whose sides are multiples of 16, whole tiles of x, no bias and no adapter."""
    if unit == "m16n8k8":
        nf4_turing._turing_kernel.warmup(
            torch.int32, torch.int32, torch.int32, dtype, dtype, torch.float32, torch.int32, torch.int32, torch.int32,
            256, 4096, 4096, 32, 4096, 4096, *byte_tables(dtype), tile.warps, tile.n // (16 * tile.warps), tile.m // 8,
            split, False, False, 0, False, grid=(1,), num_warps=tile.warps,
        )  # fmt: skip
        return
    nf4_gemm._gemm_kernel.warmup(
        dtype, torch.int32, torch.int32, dtype, dtype, torch.float32, torch.int32, dtype, dtype,
        256, 4096, 4096, 32, 4096, 4096, *byte_tables(dtype), tile.n, tile.m, split, tile.warps, tile.stages,
        tile.dots, False, False, False, 0, 16, False, unit == "mma", grid=(1,), num_warps=tile.warps,
    )  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """Answer lines until there are no more."""
    architecture, dtype = int(arguments[0]), getattr(torch, arguments[1])
    if "ptx" in arguments[2:]:
        compile_to_ptx()
    unit = cards.matrix_unit(architecture)
    with compiling_for(architecture):
        for line in sys.stdin:
            fields, split = json.loads(line)
            try:
                warm(Tile(**fields), split, dtype, unit)
                done = True
            except (RuntimeError, TritonError):
                done = False
            print(json.dumps([fields, split, done]), flush=True)
    return 0


def compile_all(
    jobs: Sequence[Job], architecture: int, dtype: torch.dtype, deadline: float, *, ptx: bool = False
) -> set[Job]:
    """Compile `jobs` in their order on the machine's cores; what was ready by `deadline` (time.monotonic)."""
    waiting: SimpleQueue[Job] = SimpleQueue()
    for job in jobs:
        waiting.put(job)
    ready: set[Job] = set()
    count = max(1, min(MOST_PROCESSES, len(os.sched_getaffinity(0)) - 1, len(jobs)))
    command = [sys.executable, "-m", "grpo.kernels.nf4_compile", str(architecture), str(dtype).removeprefix("torch.")]
    package = find_spec("grpo")
    assert package is not None and package.origin is not None, "this file is part of it"
    root = str(Path(package.origin).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    processes = [
        subprocess.Popen(
            [*command, *(["ptx"] if ptx else [])], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, env=environment,
        )
        for _ in range(count)
    ]  # fmt: skip
    threads = [threading.Thread(target=_feed, args=(process, waiting, ready), daemon=True) for process in processes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    for process in processes:
        process.kill()
        process.wait()
    return set(ready)


def _feed(process: subprocess.Popen[str], waiting: SimpleQueue[Job], ready: set[Job]) -> None:
    """Give one process a job at a time until there are none, or it has ended."""
    assert process.stdin is not None and process.stdout is not None
    try:
        while True:
            tile, split = waiting.get_nowait()
            process.stdin.write(json.dumps([asdict(tile), split]) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            if not answer:
                return
            if json.loads(answer)[2]:
                ready.add((tile, split))
    except (Empty, OSError, ValueError):
        return


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
