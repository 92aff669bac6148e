"""torch's variable-length flash attention over a packed row as one autograd function, on CUDA.

Around the call itself: keys and values of a shared prompt are laid out before each span that continues it, which is
what flash attention takes, and their gradients added up (shared_keys.py); sinks take part by what flash attention
returns and is given (attention_sinks.py). torch's own function of the same kernel is an operator defined in Python,
whose dispatch takes the host longer than the launches of all else in a layer's attention.

Not here: which packed rows and heads come this way (attention.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo.kernels.attention_sinks import sinks_gradient, with_sinks
from grpo.kernels.shared_keys import GatherIndex, copy_keys, sum_keys


class FlashAttention(torch.autograd.Function):
    """query [tokens, heads, dim], key and value [tokens, key-value heads, dim] -> [tokens, heads, dim].

    sinks: [heads] or None. index: where keys are laid out anew, or None. query_bounds, key_bounds: int32 [spans + 1];
    longest: most queries and most keys of a span. With fewer queries than keys the causal mask is aligned to the last
    key, as a continuation needs.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, index: GatherIndex | None,
        query_bounds: Tensor, key_bounds: Tensor, longest: tuple[int, int], scale: float, window: int | None,
    ) -> Tensor:  # fmt: skip
        ctx.index, ctx.sizes = index, (*longest, 0.0, window is None)
        ctx.named = {
            "scale": scale, "window_size_left": -1 if window is None else window - 1, "window_size_right": 0,
        }  # fmt: skip
        if index is not None:
            key, value = copy_keys(key, value, index)
        (most_queries, most_keys, dropout, causal), named = ctx.sizes, ctx.named
        output, logsumexp, random, unused, _ = torch.ops.aten._flash_attention_forward(
            query, key, value, query_bounds, key_bounds, most_queries, most_keys, dropout, causal, False, **named
        )
        if sinks is not None:
            output, logsumexp = with_sinks(output, logsumexp, sinks)
        ctx.save_for_backward(query, key, value, sinks, query_bounds, key_bounds, output, logsumexp, random, unused)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, query_bounds, key_bounds, output, logsumexp, random, unused = ctx.saved_tensors
        (most_queries, most_keys, dropout, causal), named = ctx.sizes, ctx.named
        query_grad, key_grad, value_grad = torch.ops.aten._flash_attention_backward(
            grad.contiguous(), query, key, value, output, logsumexp, query_bounds, key_bounds, most_queries, most_keys,
            dropout, causal, random, unused, **named,
        )  # fmt: skip
        if ctx.index is not None:
            key_grad, value_grad = sum_keys(key_grad, value_grad, ctx.index)
        of_sinks = sinks_gradient(grad, output, logsumexp, sinks) if ctx.needs_input_grad[3] else None
        return (query_grad, key_grad, value_grad, of_sinks, *[None] * 6)
