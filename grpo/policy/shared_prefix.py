"""Where the two halves of a batch begin alike: the beginning of each pair of rows is computed once.

Preference trainers call a model with all chosen answers and then, in the same order, all rejected ones, each after its
prompt. Exact: the answers attend to the one copy of their prompt, and its gradient is the sum of both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo.kernels.attention import Span

FEWEST = 16
"""Shorter beginnings are not worth spans of their own."""


@dataclass(frozen=True)
class Pairs:
    """A batch [2 n, length] as one packed row, flat places being `row * length + column`."""

    sources: Tensor
    """int64 [packed tokens]: the flat place that each packed token is taken from."""
    present: Tensor
    """int64 [tokens]: the flat places that are not padding, in order."""
    positions_in_row: Tensor
    """int64 [tokens]: where in the packed row each of `present` is computed."""
    spans: list[Span]


def pairs_of(ids: Tensor, mask: Tensor | None) -> Pairs | None:
    """How `ids` [2 n, length] are packed with shared beginnings; None where no pair has one, or padding is not right.

    mask: bool [2 n, length], true for a token. Row i and row n + i are a pair; each keeps at least one own token.
    """
    rows, length = ids.shape
    if not rows or rows % 2 or length <= FEWEST:
        return None
    present = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    first, second = present.chunk(2)
    alike = ((ids[: rows // 2] == ids[rows // 2 :]) & first & second).long().cumprod(1).sum(1)
    ends_once = (present[:, 1:] <= present[:, :-1]).all() & present[:, 0].all()
    facts = torch.cat([alike, present.sum(1), ends_once[None].long()]).tolist()  # one wait for the device
    common, lengths, right = facts[: rows // 2], facts[rows // 2 : -1], facts[-1]
    shares = [min(c, a - 1, b - 1) for c, a, b in zip(common, lengths, lengths[rows // 2 :], strict=False)]
    if not right or max(shares) < FEWEST:
        return None
    return layout(shares, lengths, length, ids.device)


def layout(shares: list[int], lengths: list[int], width: int, device: torch.device) -> Pairs:
    """`shares`: tokens at which each pair's rows begin alike, below FEWEST for none; `lengths` of all rows."""
    spans: list[Span] = []
    sources: list[Tensor] = []
    positions_in_row = torch.full((len(lengths), width), -1)
    size = 0

    def add(row: int, begin: int, end: int, prefix: Span | None = None) -> Span:
        nonlocal size
        span = Span(size, end - begin, *((prefix.start, prefix.length) if prefix else (0, 0)))
        spans.append(span)
        sources.append(torch.arange(row * width + begin, row * width + end))
        positions_in_row[row, begin:end] = torch.arange(size, size + end - begin)
        size += end - begin
        return span

    for first, share in enumerate(shares):
        second = first + len(shares)
        if share < FEWEST:
            add(first, 0, lengths[first])
            add(second, 0, lengths[second])
            continue
        prefix = add(first, 0, share)
        add(first, share, lengths[first], prefix)
        add(second, share, lengths[second], prefix)
        positions_in_row[second, :share] = positions_in_row[first, :share]
    flat = positions_in_row.flatten()
    selected = (flat >= 0).nonzero()[:, 0]
    return Pairs(torch.cat(sources).to(device), selected.to(device), flat[selected].to(device), spans)
