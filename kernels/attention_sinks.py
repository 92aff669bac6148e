"""Attention sinks: a learned score of each head that takes part in the softmax over keys and has no value (gpt-oss).

Flash attention knows none, but returns the log of what it divided by. A sink only enlarges that: the result is scaled
down, and the backward of flash attention, given the scaled result and the enlarged logarithm, is the backward with
sinks, since it uses no more of the forward than these two. Where scores are written out, or a fused call takes a mask,
a sink is one more key. Xiao et al., 2023 (arXiv:2309.17453) name sinks; the form is that of gpt-oss (arXiv:2508.10925).

Not here: the flash call (flash.py); which of these is called for, and packed rows (attention.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SINK_COLUMNS = 8
"""Columns that a key gets beside its own, so that a fused call still takes the head."""


def with_sinks(output: Tensor, logsumexp: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """(The result with sinks, the log of the sum with them) of attention without.

    output [tokens, heads, dim]; logsumexp [heads, tokens] in float32, of each query's scores; sinks [heads]. The
    result is output * exp(logsumexp) / (exp(logsumexp) + exp(sink)), rounded once more.
    """
    sinks = sinks.to(logsumexp.dtype)[:, None]
    share = torch.sigmoid(logsumexp - sinks).t()[..., None]
    return (output.to(share.dtype) * share).to(output.dtype), torch.logaddexp(logsumexp, sinks)


def sinks_gradient(grad: Tensor, output: Tensor, logsumexp: Tensor, sinks: Tensor) -> Tensor:
    """dL/d(sinks) [heads] from dL/d(output) and what `with_sinks` gave, both [tokens, heads, dim]."""
    share = torch.exp(sinks.to(logsumexp.dtype)[:, None] - logsumexp)
    of_rows = (grad.to(logsumexp.dtype) * output.to(logsumexp.dtype)).sum(-1).t()
    return -(share * of_rows).sum(1).to(sinks.dtype)


def sink_weights(scores: Tensor, sinks: Tensor) -> Tensor:
    """softmax over keys and sink, of the keys, in float32 or wider: scores [batch, heads, queries, keys]."""
    wide = torch.promote_types(scores.dtype, torch.float32)
    sink = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
    return torch.cat([scores, sink], -1).softmax(-1, dtype=wide)[..., :-1]


def masked_with_sinks(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, sinks: Tensor, scale: float
) -> Tensor:
    """torch's fused attention with a mask, a sink being one more key: all [batch, heads, length, dim].

    visible: boolean, broadcast to [batch, heads, queries, keys]. The sink's score is the product of columns that all
    queries have as ones and only its key has otherwise than zero: two, since one may round it.
    """
    batch, heads, keys, dim = key.shape
    target = sinks.to(torch.promote_types(key.dtype, torch.float32)) / scale
    first = target.to(key.dtype)
    second = (target - first.to(target.dtype)).to(key.dtype)
    columns = torch.stack([first, second], -1)[None, :, None].expand(batch, -1, -1, -1)
    sink = F.pad(columns, (dim, SINK_COLUMNS - 2))
    ones = query.new_ones(*query.shape[:3], 2)
    query = torch.cat([query, ones, ones.new_zeros(*query.shape[:3], SINK_COLUMNS - 2)], -1)
    key = torch.cat([F.pad(key, (0, SINK_COLUMNS)), sink], 2)
    value = F.pad(value, (0, SINK_COLUMNS, 0, 1))
    visible = F.pad(visible, (0, 1), value=True)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scale)[..., :dim]
