"""A GPU that is not there, for whoever launches kernels only to have them compiled: tensors without memory call
themselves its own, so that host functions choose tiles, strides and specialisations as they would, and launches compile
for its architecture and run nothing.

Not here: which launches (grpo/run/ahead_worker.py, and tests of every card).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import PropertyMock, patch

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from grpo.kernels import cards, dense_gemm, nf4_plans, split_k
from grpo.kernels.cards import Card
from grpo.kernels.compile_only import Loaded, compiling_for
from grpo.kernels.nf4_lookup import byte_tables


@contextlib.contextmanager
def pretended(card: Card, loaded: Loaded | None = None) -> Iterator[None]:
    """New tensors are ones of `card`'s, whatever device they name; `loaded` is told what launches compile."""
    for dtype in (torch.bfloat16, torch.float16):
        byte_tables(dtype)  # of numbers that a tensor without memory has not
    caches = nf4_plans.find_plan, dense_gemm._shared_memory
    properties = SimpleNamespace(major=card.architecture // 10, shared_memory_per_block_optin=card.shared_memory)
    patches: tuple[Any, ...] = (
        patch.object(
            FakeTensor, "data_ptr", lambda tensor: tensor.storage_offset() * tensor.element_size(), create=True
        ),
        patch.object(FakeTensor, "is_cuda", PropertyMock(return_value=True), create=True),
        patch.object(torch.cuda, "get_device_properties", lambda device: properties),
        patch.object(torch.cuda, "device", lambda device: contextlib.nullcontext()),
        patch.object(cards, "card", lambda device: card),
        patch.object(split_k, "_workspaces", {}),
    )
    with contextlib.ExitStack() as stack:
        for cache in caches:
            cache.cache_clear()
            stack.callback(cache.cache_clear)
        for one in patches:
            stack.enter_context(one)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(compiling_for(card.architecture, loaded=loaded))
        yield
