"""Causal attention over packed sequences that may share their beginnings, without padding between them.

Exact: a sequence attends to its own tokens and, where it continues a shared prompt, to that prompt, which is computed
once; a shared prompt may itself continue another, and so on: a tree of spans. One variable-length flash call on a GPU
from Ampere on. On an older GPU, and for heads that flash attention does not take, sequences of similar length are
gathered, each behind what it continues, for torch's fused causal attention, which keeps no scores. On a CPU they are
gathered into padded batches with a mask. No dropout, no cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo.kernels.attention_sinks import masked_with_sinks, sink_weights
from grpo.kernels.flash import FlashAttention
from grpo.kernels.launch import to_device
from grpo.kernels.shared_keys import GatherIndex, gather_keys

LARGEST_FLASH_HEAD = 256
FLASH_CAPABILITY = (8, 0)
"""Compute capability from which torch's flash attention runs: older GPUs have not its instructions."""
PADDED_SCORES = 1 << 22
"""Query-key pairs in one padded batch."""
EXPLICIT_SCORES = 1 << 22
"""Up to so many scores (all heads) attention is written out: on a CPU the fused call's backward is far slower."""


@dataclass(frozen=True)
class Span:
    """Consecutive tokens `start`... that attend to themselves causally and to all that is before them: the span that
    they continue, and what that one continues."""

    start: int
    length: int
    prefix_start: int = 0
    prefix_length: int = 0
    """Of the span before. A recurrent layer begins with the state that this one ends with."""
    earlier: tuple[tuple[int, int], ...] = ()
    """(start, length) of what the span before continues itself, in the order of the sequence."""

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """(start, length) of the packed tokens that are seen, its own last."""
        before = ((self.prefix_start, self.prefix_length),) if self.prefix_length else ()
        return (*self.earlier, *before, (self.start, self.length))

    @property
    def keys(self) -> int:
        """Tokens that are seen."""
        return sum(length for _, length in self.ranges)

    @property
    def seen_before(self) -> int:
        """Tokens that are seen before its own."""
        return self.keys - self.length

    def continued(self, start: int, length: int) -> Span:
        """The span of `length` tokens from `start` that continues this one to its end."""
        return Span(start, length, self.start, self.length, self.ranges[:-1])


@dataclass(frozen=True)
class PaddedBatch:
    """Spans gathered to one shape: S spans, at most Q queries and K keys each."""

    queries: Tensor
    """int64 [S, Q], packed position of each query; 0 beyond a span's end."""
    keys: Tensor
    """int64 [S, K], packed position of each key: the prefix, then the span; 0 beyond the end."""
    distance: Tensor
    """int64 [S, Q, K], how many tokens a key lies before the query; negative where it must not be seen."""
    valid: Tensor
    """bool [S, Q], queries that exist."""


@dataclass(frozen=True)
class CausalBatch:
    """Spans, each behind the prompt that it continues: S of at most K tokens. What is beyond an end is seen by nothing
    before it, so causal attention over [S, K] needs no mask."""

    spans: int
    index: GatherIndex
    """Of S K tokens, row after row; the first token beyond a row's end."""
    own: Tensor
    """int64, those of the S K tokens that are the spans' own, in their order."""


class Packing:
    """The spans of a packed row, in order and without gaps, and the index tensors that attention needs."""

    def __init__(self, spans: Sequence[Span], device: torch.device):
        position = 0
        for span in spans:
            assert span.start == position and span.length > 0, span
            assert all(begin + length <= span.start for begin, length in span.ranges[:-1]), span
            position += span.length
        self.spans, self.device, self.tokens = tuple(spans), device, position

    @classmethod
    def of_lengths(cls, lengths: Sequence[int], device: torch.device) -> Packing:
        """Independent sequences of these `lengths`."""
        starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
        return cls([Span(start, length) for start, length in zip(starts, lengths, strict=False)], device)

    @cached_property
    def shares_prefixes(self) -> bool:
        return any(span.prefix_length for span in self.spans)

    @cached_property
    def query_bounds(self) -> Tensor:
        """int32 [spans + 1], cumulative query counts."""
        return self._bounds([span.length for span in self.spans])

    @cached_property
    def key_bounds(self) -> Tensor:
        """int32 [spans + 1], cumulative key counts."""
        return self._bounds([span.keys for span in self.spans])

    def _bounds(self, counts: list[int]) -> Tensor:
        return to_device(torch.tensor([0, *counts]).cumsum(0).int(), self.device)

    @cached_property
    def longest(self) -> tuple[int, int]:
        """Most queries and most keys of a span."""
        return max(span.length for span in self.spans), max(span.keys for span in self.spans)

    @cached_property
    def key_positions(self) -> Tensor:
        """int64 on the CPU, packed position of every span's keys, span after span."""
        return torch.cat([places(span) for span in self.spans])

    @cached_property
    def gather_index(self) -> GatherIndex:
        """Where flash attention wants each token's key and value."""
        return GatherIndex(self.key_positions, self.tokens, self.device)

    @cached_property
    def padded(self) -> list[PaddedBatch]:
        """The spans as padded batches, in an order that `order` undoes."""
        return [padded_batch(batch, self.device) for batch in self._similar()]

    @cached_property
    def causal(self) -> list[CausalBatch]:
        """The spans behind their prompts, in an order that `order` undoes."""
        return [causal_batch(batch, self.tokens, self.device) for batch in self._similar()]

    @cached_property
    def order(self) -> Tensor:
        """int64 [tokens]: where each packed token stands among those of `padded` or `causal`, batch after batch."""
        spans = [span for batch in self._similar() for span in batch]
        positions = torch.cat([torch.arange(span.start, span.start + span.length) for span in spans])
        return torch.argsort(positions).to(self.device)

    def _similar(self) -> Iterator[list[Span]]:
        """Spans by whether they have a prefix and by length, in batches of at most PADDED_SCORES pairs."""
        batch: list[Span] = []
        for span in sorted(self.spans, key=lambda span: (span.prefix_length > 0, span.keys, span.length)):
            most_queries = max(one.length for one in [*batch, span])
            mixed = batch and (batch[0].prefix_length > 0) != (span.prefix_length > 0)
            if batch and (mixed or (len(batch) + 1) * most_queries * span.keys > PADDED_SCORES):
                yield batch
                batch = []
            batch.append(span)
        yield batch


def places(span: Span) -> Tensor:
    """int64 [keys] on the CPU, the packed tokens that `span` sees."""
    return torch.cat([torch.arange(start, start + length) for start, length in span.ranges])


def padded_batch(spans: Sequence[Span], device: torch.device) -> PaddedBatch:
    """`spans` gathered to the shape of the largest."""
    most_queries, most_keys = max(span.length for span in spans), max(span.keys for span in spans)
    column = torch.tensor([[span.start, span.length, span.seen_before] for span in spans]).unbind(1)
    start, length, before = (part[:, None] for part in column)
    query, key = torch.arange(most_queries)[None], torch.arange(most_keys)[None]
    valid = query < length
    queries = torch.where(valid, start + query, 0)
    keys = torch.zeros(len(spans), most_keys, dtype=torch.int64)
    for row, span in zip(keys, spans, strict=True):
        row[: span.keys] = places(span)
    distance = (before + query)[:, :, None] - key[:, None, :]
    distance = distance.masked_fill((key >= before + length)[:, None, :], -1)
    # A query beyond the end sees key 0 alone: softmax over nothing would be NaN.
    distance[~valid] = -1
    distance[:, :, 0] = distance[:, :, 0].clamp(min=0)
    return PaddedBatch(*(part.to(device) for part in (queries, keys, distance, valid)))


def causal_batch(spans: Sequence[Span], tokens: int, device: torch.device) -> CausalBatch:
    """`spans` of `tokens` packed ones behind what they continue, gathered to the shape of the longest."""
    rows = torch.zeros(len(spans), max(span.keys for span in spans), dtype=torch.int64)
    own = torch.zeros_like(rows, dtype=torch.bool)
    for row, mine, span in zip(rows, own, spans, strict=True):
        row[: span.keys] = places(span)
        mine[span.seen_before : span.keys] = True
    index = GatherIndex(rows.flatten(), tokens, device)
    return CausalBatch(len(spans), index, own.flatten().nonzero()[:, 0].to(device))


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of every span.

    `query` [heads, tokens, dim], `key` and `value` [key-value heads, tokens, dim]. `window`: a token sees itself and
    the `window - 1` before it. `softcap`: scores become `softcap * tanh(score / softcap)` (Gemma 2). `sinks` [heads]:
    scores that take part in each head's softmax without a value (attention_sinks.py). Returns [tokens, heads, dim].
    """
    assert packing.tokens == query.shape[1] == key.shape[1], (packing.tokens, query.shape, key.shape)
    assert query.shape[0] % key.shape[0] == 0, (query.shape, key.shape)
    if softcap is None and flash_supports(query):
        return _flash(query, key, value, packing, scale, window, sinks)
    if softcap is None and without_scores(query):
        outputs = [_causal(query, key, value, batch, scale, window, sinks) for batch in packing.causal]
    else:
        groups = query.shape[0] // key.shape[0]
        key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
        outputs = [_padded(query, key, value, batch, scale, window, softcap, sinks) for batch in packing.padded]
    return torch.cat(outputs).index_select(0, packing.order)


def flash_supports(query: Tensor) -> bool:
    """Whether torch's variable-length flash attention takes this query."""
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] <= LARGEST_FLASH_HEAD
        and torch.cuda.get_device_capability(query.device) >= FLASH_CAPABILITY
    )


def without_scores(query: Tensor) -> bool:
    """Whether torch's fused attention takes this query and keeps no scores: on a CPU its backward is slow."""
    return query.is_cuda


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    scale: float,
    window: int | None,
    sinks: Tensor | None,
) -> Tensor:
    query, key, value = (part.transpose(0, 1) for part in (query, key, value))
    index = packing.gather_index if packing.shares_prefixes else None
    bounds = packing.query_bounds, packing.key_bounds
    return FlashAttention.apply(query, key, value, sinks, index, *bounds, packing.longest, scale, window)


def _causal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    batch: CausalBatch,
    scale: float,
    window: int | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of one batch's own tokens [tokens, heads, dim]. Prompts are computed with each span and left out."""
    groups = query.shape[0] // key.shape[0]
    # A prompt's query gets no gradient but from its own row, so that torch's atomics add zeros; its key gets several.
    query = query.transpose(0, 1).index_select(0, batch.index.sources)
    key, value = gather_keys(key.transpose(0, 1), value.transpose(0, 1), batch.index)
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    q, k, v = (part.unflatten(0, (batch.spans, -1)).transpose(1, 2) for part in (query, key, value))
    longest = q.shape[2]
    if sinks is None and (window is None or window >= longest):
        output = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    else:
        place = torch.arange(longest, device=q.device)
        distance = place[:, None] - place[None, :]
        visible = (distance >= 0) & (distance < (longest if window is None else window))
        output = _masked(q, k, v, visible[None, None], scale, sinks)
    return output.transpose(1, 2).flatten(0, 1).index_select(0, batch.own)


def _masked(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, sinks: Tensor | None) -> Tensor:
    """torch's fused attention of [batch, heads, length, dim] with a mask [batch or 1, 1, queries, keys]."""
    if sinks is not None:
        return masked_with_sinks(q, k, v, visible, sinks, scale)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)


def _padded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    batch: PaddedBatch,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of one padded batch: its valid queries [tokens, heads, dim]."""
    spans = batch.queries.shape[0]
    q, k, v = (
        part.index_select(1, index.flatten()).unflatten(1, (spans, -1)).transpose(0, 1)
        for part, index in ((query, batch.queries), (key, batch.keys), (value, batch.keys))
    )
    visible = batch.distance >= 0
    if window is not None:
        visible &= batch.distance < window
    if softcap is None and visible.numel() * q.shape[1] > EXPLICIT_SCORES:
        output = _masked(q, k, v, visible[:, None], scale, sinks)
    else:
        scores = (q * scale) @ k.transpose(-1, -2)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~visible[:, None], float("-inf"))
        weights = scores.softmax(-1, dtype=torch.float32) if sinks is None else sink_weights(scores, sinks)
        output = weights.to(q.dtype) @ v
    return output.transpose(1, 2)[batch.valid]
