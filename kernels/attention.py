"""Causal attention over sequences packed one after another, without padding.

Exact: every sequence attends to itself only. One variable-length flash call for all sequences where the GPU and the
model's attention allow it, otherwise one scaled-dot-product call a sequence. No dropout, no cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch older than 2.10
    varlen_attn = None

VARLEN_ARGUMENTS = frozenset(inspect.signature(varlen_attn).parameters) if varlen_attn else frozenset()
LARGEST_FLASH_HEAD = 256


@dataclass(frozen=True)
class Packing:
    """Where the packed sequences begin and end."""

    lengths: tuple[int, ...]
    bounds: Tensor
    """int32 [sequences + 1], cumulative lengths, on the device of the tokens."""

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Packing:
        """The packing of sequences of these `lengths`."""
        bounds = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
        return cls(tuple(lengths), bounds)


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal self-attention of every packed sequence.

    `query` [heads, tokens, dim], `key` and `value` [key-value heads, tokens, dim]. `window`: a token sees itself and
    the `window - 1` before it. `softcap`: scores become `softcap * tanh(score / softcap)` (Gemma 2). Returns
    [tokens, heads, dim].
    """
    assert sum(packing.lengths) == query.shape[1], (packing.lengths, query.shape)
    assert query.shape[0] % key.shape[0] == 0, (query.shape, key.shape)
    if softcap is None and flash_serves(query):
        return _flash(query, key, value, packing, scale, window)
    outputs = []
    sequences = zip(*(part.split(list(packing.lengths), 1) for part in (query, key, value)), strict=True)
    for q, k, v in sequences:
        outputs.append(_softcapped(q, k, v, scale, window, softcap) if softcap else _fused(q, k, v, scale, window))
    return torch.cat(outputs, 1).transpose(0, 1)


def flash_serves(query: Tensor) -> bool:
    """Whether torch's variable-length flash attention takes this query and lets the scale and window be set."""
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] <= LARGEST_FLASH_HEAD
        and {"scale", "window_size"} <= VARLEN_ARGUMENTS
    )


def _flash(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scale: float, window: int | None
) -> Tensor:
    arguments: dict = {"scale": scale, "window_size": (-1 if window is None else window - 1, 0)}
    if key.shape[0] != query.shape[0]:
        if "enable_gqa" in VARLEN_ARGUMENTS:
            arguments["enable_gqa"] = True
        else:
            groups = query.shape[0] // key.shape[0]
            key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    longest = max(packing.lengths)
    rows = [part.transpose(0, 1) for part in (query, key, value)]
    return varlen_attn(*rows, packing.bounds, packing.bounds, longest, longest, **arguments)


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
