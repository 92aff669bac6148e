"""Time and peak memory of one call, on a GPU or, to try a script out, on a CPU."""

from __future__ import annotations

import gc
import statistics
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch


def milliseconds(call: Callable[[], Any], repeats: int, warmup: int = 2) -> list[float]:
    """Times of `repeats` calls after `warmup` that do not count, by CUDA events or the clock."""
    for _ in range(warmup):
        call()
    if not torch.cuda.is_available():
        return [_clocked(call) for _ in range(repeats)]
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def _clocked(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def extra_bytes(call: Callable[[], Any]) -> int:
    """How far allocated GPU memory rises above its present height during one call; 0 on a CPU."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(call: Callable[[], Any], repeats: int, warmup: int = 2) -> dict[str, Any]:
    """Median and range in milliseconds, and the memory that a call adds at its peak in bytes."""
    times = milliseconds(call, repeats, warmup)
    return {
        "ms": round(statistics.median(times), 4),
        "range_ms": [round(min(times), 4), round(max(times), 4)],
        "extra_bytes": extra_bytes(call),
    }


def free_memory() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def tried(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """`call()`, or what went wrong under "error": one figure that cannot be had does not cost the others."""
    try:
        return call()
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"[:300]}
    finally:
        free_memory()
