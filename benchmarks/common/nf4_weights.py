"""Random NF4 weights of a layer, and timing a product with them from cold memory."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from grpo.kernels import nf4, nf4_gemm

COLD_BYTES = 160e6
"""What the copies that one graph reads add up to, at least: three times the L2 cache of an H100."""


MOST_COPIES = 96


class Weight:
    """Copies of one random weight in one form, for cold reads, and the product that reads one of them."""

    def __init__(self, copies: list, multiply: Callable[[Tensor, Any], Any]):
        self.copies, self.multiply = copies, multiply

    def microseconds(self, x: Tensor) -> float:
        return microseconds(self.copies, partial(self.multiply, x))


def microseconds(copies: list, call: Callable[[Any], Any], milliseconds: float = 8.0) -> float:
    """Median time of `call(copy)`, over replays of a CUDA graph that calls it with every copy in turn.

    The replays that count take about `milliseconds`; half as many before them raise the clocks.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for copy in copies[:2]:
            call(copy)
        graph.capture_begin()
        for copy in copies:
            call(copy)
        graph.capture_end()
        replay_milliseconds(graph, 1)
        replays = max(5, math.ceil(milliseconds / statistics.median(replay_milliseconds(graph, 3))))
        times = replay_milliseconds(graph, replays + replays // 2)[replays // 2 :]
    return statistics.median(times) / len(copies) * 1e3


def replay_milliseconds(graph: torch.cuda.CUDAGraph, replays: int) -> list[float]:
    """Time of each of `replays` replays, queued without waiting in between."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.current_stream().synchronize()
    return [start.elapsed_time(end) for start, end in zip(events, events[1:], strict=False)]


def copies_for(size: float) -> int:
    return max(2, min(MOST_COPIES, math.ceil(COLD_BYTES / size)))


def random_weight(features: int, columns: int) -> Tensor:
    return torch.randn(features, columns, dtype=torch.bfloat16, device="cuda") * 0.02


def packed_weight(dense: Tensor) -> Weight:
    features, columns = dense.shape
    copies = []
    for _ in range(copies_for(dense.numel() * 0.53125)):
        copies.append(nf4.allocate(features, columns, torch.bfloat16, "cuda"))
        nf4.quantize_rows(*copies[-1], 0, dense)
    return Weight(copies, lambda x, copy: nf4_gemm.nf4_linear(x, *copy))
