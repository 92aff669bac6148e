"""Which experts every token went to, by the place of its keys and values in vLLM's cache. For engine.py alone.

A layer writes its choice beside the token's slot, inside CUDA graphs too. What a request's tokens were given is read
when it ends, by its blocks: prefixes that requests share have been recorded once, like their keys and values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context

from grpo.kernels.routing import Record
from grpo.memory.plan import layer_token_bytes
from grpo.model.base_weights import BaseWeights


class RouteRecorder:
    """A table [slots, layers, top_k] for all layers with experts of `base`."""

    def __init__(self, base: BaseWeights, kv_bytes: int, kv_cache_dtype: str):
        """kv_bytes: the size of vLLM's cache; there are no more slots than it has room for."""
        stacks = list(base.experts.values())
        kinds = getattr(base.config, "layer_types", None) or ["full_attention"] * base.config.num_hidden_layers
        # Layers of other kinds share the pool of blocks, so it has no more room than if there were none.
        attention = kinds.count("full_attention") or len(kinds)
        slots = kv_bytes // (attention * layer_token_bytes(base.config, base.dtype.itemsize, kv_cache_dtype))
        most = max(stack.experts.gate_up.experts for stack in stacks)
        dtype = torch.uint8 if most <= 256 else torch.int16
        self.table = torch.zeros(slots + 2, len(stacks), stacks[0].routing.top_k, dtype=dtype, device=base.device)
        self._layer = f".{kinds.index('full_attention') if 'full_attention' in kinds else 0}."
        self._attention: str | None = None

    def record(self, layer: int) -> Record | None:
        """Where the layer of that number among those with experts writes, for the tokens of the running forward pass;
        None of a pass without a cache, as when vLLM measures its memory."""
        slots = get_forward_context().slot_mapping
        if not isinstance(slots, dict) or not slots:
            return None
        if self._attention is None:
            self._attention = next((name for name in slots if self._layer in name), next(iter(slots)))
        return Record(self.table, slots[self._attention], layer)

    def routes(self, scheduler: Any, request: Any) -> Tensor:
        """[tokens, layers, top_k] of `request`'s tokens but the last, which was not fed; while it has its blocks."""
        groups = scheduler.kv_cache_config.kv_cache_groups
        group = next((i for i, each in enumerate(groups) if self._attention in each.layer_names), 0)
        blocks = scheduler.kv_cache_manager.get_block_ids(request.request_id)[group]
        size = groups[group].kv_cache_spec.block_size
        slots = (torch.tensor(blocks)[:, None] * size + torch.arange(size)).reshape(-1)[: request.num_tokens - 1]
        return self.table[slots.to(self.table.device, non_blocking=True)]
