"""Starting vLLM without what it does for others: sampling once by top-p and top-k from made-up logits, whose kernel
takes nine seconds to compile and which runs seldom use, and searching the process for garbage around CUDA graphs.

On a GPU alone. How large the KV cache is is planned (grpo/memory), so nothing is measured by what is left out.
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
def quick_start() -> Iterator[None]:
    """Around vllm.LLM(...)."""
    collects, runner = gc.isenabled(), None
    # vLLM keeps one pool for graphs' memory, which torch has given up with the graphs of an engine that was stopped.
    type(current_platform)._global_graph_pool = None
    try:
        runner = import_module("vllm.v1.worker.gpu_model_runner").GPUModelRunner
    except (ImportError, AttributeError):  # a vLLM that has it elsewhere starts as it does
        pass
    with ExitStack() as stack:
        if hasattr(runner, SAMPLES):
            stack.enter_context(patch.object(runner, SAMPLES, no_samples))
        stack.enter_context(patch.object(gc, "collect", lambda generation=2: 0))
        gc.disable()
        try:
            yield
        finally:
            if collects:
                gc.enable()


def no_samples(runner: Any, hidden_states: Tensor) -> Tensor:
    """In place of the runner's method."""
    return torch.empty(0)
