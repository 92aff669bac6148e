"""Causal attention over sequences packed one after another, without padding.

Exact: every sequence attends to itself only. One scaled-dot-product call a sequence, or one variable-length call for
all of them where torch has it on the device. No dropout, no cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal self-attention of every packed sequence.

    `query` [heads, tokens, dim], `key` and `value` [key-value heads, tokens, dim], `lengths` summing to tokens.
    `window`: a token sees itself and the `window - 1` before it. `softcap`: scores become `softcap * tanh(score /
    softcap)` (Gemma 2). Returns [tokens, heads, dim].
    """
    assert sum(lengths) == query.shape[1], (sum(lengths), query.shape)
    assert query.shape[0] % key.shape[0] == 0, (query.shape, key.shape)
    outputs = []
    for q, k, v in zip(query.split(list(lengths), 1), key.split(list(lengths), 1), value.split(list(lengths), 1), strict=True):
        if softcap is None:
            outputs.append(_fused(q, k, v, scale, window))
        else:
            outputs.append(_softcapped(q, k, v, scale, window, softcap))
    return torch.cat(outputs, 1).transpose(0, 1)


def _fused(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
    length = query.shape[1]
    mask = None if window is None or window >= length else causal_mask(length, window, query.device)
    grouped = query.shape[0] != key.shape[0]
    return F.scaled_dot_product_attention(
        query[None], key[None], value[None], attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )[0]


def _softcapped(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, softcap: float
) -> Tensor:
    groups = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    scores = softcap * torch.tanh(query @ key.transpose(1, 2) * (scale / softcap))
    visible = causal_mask(query.shape[1], window, query.device)
    weights = scores.masked_fill(~visible, float("-inf")).float().softmax(-1)
    return weights.to(query.dtype) @ value


def causal_mask(length: int, window: int | None, device: torch.device) -> Tensor:
    """bool [length, length], True where the row's token sees the column's."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None, :]
    visible = distance >= 0
    return visible if window is None else visible & (distance < window)
