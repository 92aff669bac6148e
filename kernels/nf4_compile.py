"""Processes that compile a decoding step's kernels into Triton's cache on disk, for whoever will time or launch them.

    python -m grpo.kernels.nf4_compile 80 bfloat16 [ptx]

reads lines of JSON, a job each (`Product`, `Shrink`), and answers each with a line: the same, and whether there is a
kernel. No GPU is used. ptx: as `compile_only.compile_to_ptx`. `compile_all` starts such processes and hands out the
work; `compile_in_background` does so while the caller goes on, and remembers beside the cache what is in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime.errors import TritonError

from grpo.kernels import cards, lora_shrink, nf4_gemm, nf4_turing
from grpo.kernels.compile_only import compile_to_ptx, compiling_for
from grpo.kernels.nf4_lookup import byte_tables
from grpo.kernels.nf4_plans import kernel_version
from grpo.kernels.nf4_tiles import Tile

MOST_PROCESSES = 15
BACKGROUND_PROCESSES, BACKGROUND_SECONDS = 8, 120.0
"""Of the machine's cores, beside a program that starts; after so long they end, whatever they have not done."""


class Product(NamedTuple):
    """A fused product, for sides of W that are multiples of 16."""

    tile: Tile
    split: int
    ranks: int = 0
    ragged: bool = False
    """Whether the last tile of x has rows beyond x."""
    half_tail: bool = False
    """Whether the columns are an odd number of blocks."""
    bias: bool = False
    pending: bool = False
    """Whether it begins before its adapter's x A^T is there."""


class Shrink(NamedTuple):
    """x A^T with A [ranks, columns]."""

    ranks: int
    columns: int
    overlapped: bool = False
    """Whether it is launched while what is in front of it runs."""


Job = Product | Shrink


def written(job: Job) -> list[Any]:
    """`job` as JSON has it."""
    return [type(job).__name__, *(vars(each) if isinstance(each, Tile) else each for each in job)]


def read(line: list[Any]) -> Job:
    """A job from its JSON form."""
    kind, *fields = line
    return Shrink(*fields) if kind == Shrink.__name__ else Product(Tile(**fields[0]), *fields[1:])


def warm(job: Job, dtype: torch.dtype, architecture: int) -> None:
    """Compile the job's kernel."""
    if isinstance(job, Shrink):
        warm_shrink(job, dtype)
        return
    tile, split, ranks, ragged, half_tail, bias, pending = job
    unit = cards.matrix_unit(architecture)
    if unit == "m16n8k8":
        nf4_turing._turing_kernel.warmup(
            torch.int32, torch.int32, torch.int32, dtype, dtype, torch.float32, torch.int32, torch.int32, torch.int32,
            256, 4096, 4096, 32, 4096, 4096, *byte_tables(dtype), tile.warps, tile.n // (16 * tile.warps), tile.m // 8,
            split, half_tail, bias, ranks, False, grid=(1,), num_warps=tile.warps,
        )  # fmt: skip
        return
    nf4_gemm._gemm_kernel.warmup(
        dtype, torch.int32, torch.int32, dtype, dtype, torch.float32, torch.int32, dtype, dtype,
        256, 4096, 4096, 32, 4096, 4096, *byte_tables(dtype), tile.n, tile.m, split, tile.warps, tile.stages,
        tile.dots, ragged, half_tail, bias, ranks, nf4_gemm.ranks_at_once(ranks), False, unit == "mma", pending,
        grid=(1,), num_warps=tile.warps, launch_pdl=pending,
    )  # fmt: skip


def warm_shrink(job: Shrink, dtype: torch.dtype) -> None:
    block, split = lora_shrink.cut(job.ranks, job.columns)
    lora_shrink._shrink_kernel.warmup(
        dtype, dtype, dtype, dtype, torch.float32, torch.int32, 256, 4096, 4096, job.ranks, block, split,
        lora_shrink.ROWS, lora_shrink.COLUMNS, job.columns % lora_shrink.COLUMNS != 0, False,
        job.overlapped, grid=(1,), num_warps=4, launch_pdl=job.overlapped,
    )  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """Answer lines until there are no more."""
    architecture, dtype = int(arguments[0]), getattr(torch, arguments[1])
    if "ptx" in arguments[2:]:
        compile_to_ptx()
    with compiling_for(architecture):
        for line in sys.stdin:
            job = read(json.loads(line))
            try:
                warm(job, dtype, architecture)
                done = True
            except (RuntimeError, TritonError):
                done = False
            print(json.dumps([written(job), done]), flush=True)
    return 0


def compile_all(
    jobs: Sequence[Job], architecture: int, dtype: torch.dtype, deadline: float, *, ptx: bool = False,
    processes_at_most: int = MOST_PROCESSES,
) -> set[Job]:  # fmt: skip
    """Compile `jobs` in their order on the machine's cores; what was ready by `deadline` (time.monotonic)."""
    waiting: SimpleQueue[Job] = SimpleQueue()
    for job in jobs:
        waiting.put(job)
    ready: set[Job] = set()
    count = max(1, min(processes_at_most, len(os.sched_getaffinity(0)) - 1, len(jobs)))
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
            job = waiting.get_nowait()
            process.stdin.write(json.dumps(written(job)) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            if not answer:
                return
            if json.loads(answer)[1]:
                ready.add(job)
    except (Empty, OSError, ValueError):
        return


def compile_in_background(jobs: Iterable[Job], architecture: int, dtype: torch.dtype) -> threading.Thread | None:
    """Begin to compile those of `jobs` that are not known to be in Triton's cache; None where all are.

    Whoever launches a kernel before it is there compiles it too, which is no harm.
    """
    known = compiled(architecture, dtype)
    wanted = [job for job in dict.fromkeys(jobs) if job not in known]
    if not wanted:
        return None

    def work() -> None:
        ends = time.monotonic() + BACKGROUND_SECONDS
        ready = compile_all(wanted, architecture, dtype, ends, processes_at_most=BACKGROUND_PROCESSES)
        remember(known | ready, architecture, dtype)

    thread = threading.Thread(target=work, daemon=True, name="compile")
    thread.start()
    return thread


def record(architecture: int, dtype: torch.dtype) -> Path:
    """Which jobs are in Triton's cache is said in it, and goes when it goes."""
    digest = hashlib.sha256(Path(lora_shrink.__file__).read_bytes()).hexdigest()[:8]
    version = f"{kernel_version()}-{digest}-{triton.__version__}"
    name = f"grpo-{version}-{architecture}-{str(dtype).removeprefix('torch.')}.json"
    return Path(triton.knobs.cache.dir) / name


def compiled(architecture: int, dtype: torch.dtype) -> set[Job]:
    """What `record` says; nothing where it cannot be read."""
    try:
        return {read(line) for line in json.loads(record(architecture, dtype).read_text(encoding="utf-8"))}
    except (OSError, ValueError, TypeError):
        return set()


def remember(jobs: set[Job], architecture: int, dtype: torch.dtype) -> None:
    """Write the record, where that can be done."""
    file = record(architecture, dtype)
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps([written(job) for job in jobs]), encoding="utf-8")
        part.replace(file)
    except OSError:
        return


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
