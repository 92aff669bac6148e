"""Starting and stopping vLLM without what it does for others.

It samples once by top-p and top-k from made-up logits, whose kernel takes nine seconds to compile and which runs seldom
use. And it searches the whole process for garbage three times at a start, more often around CUDA graphs, and at a stop
two or three times, where one search at its end finds the same: each takes a good part of a second among the modules
that are loaded. How large the KV cache is is planned (grpo/memory), so nothing is measured by what is left out.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from vllm.platforms import current_platform

SAMPLES = "_dummy_sampler_run"


@contextmanager
def without_searches() -> Iterator[None]:
    """Within it nobody searches for garbage."""
    collects = gc.isenabled()
    gc.disable()
    try:
        with patch.object(gc, "collect", lambda generation=2: 0):
            yield
    finally:
        if collects:
            gc.enable()


@contextmanager
def quick_start() -> Iterator[None]:
    """Around vllm.LLM(...)."""
    runner = None
    # vLLM keeps one pool for graphs' memory, which torch has given up with the graphs of an engine that was stopped.
    type(current_platform)._global_graph_pool = None
    try:
        runner = import_module("vllm.v1.worker.gpu_model_runner").GPUModelRunner
    except (ImportError, AttributeError):  # a vLLM that has it elsewhere starts as it does
        pass
    with ExitStack() as stack:
        if hasattr(runner, SAMPLES):
            stack.enter_context(patch.object(runner, SAMPLES, no_samples))
        stack.enter_context(without_searches())
        yield


def no_samples(runner: Any, hidden_states: Tensor) -> Tensor:
    """In place of the runner's method."""
    return torch.empty(0)
