"""Which tokens of a packed row follow one another, for layers that carry a state from token to token.

Attention over a packed row needs to know who sees whom; a recurrent layer needs an order. Every span begins with an
empty state, or with the one that a prompt which it continues has left behind: the state is forked. Here that order is
laid out as index tensors, once for a row: chunks of 64 tokens for the delta rule, and what comes right before each span
for convolutions. Nothing is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from grpo.kernels.attention import Packing, Span
from grpo.kernels.sizes import DELTA_CHUNK

CHUNK = DELTA_CHUNK
"""Tokens whose part of the delta rule is computed by matrix products."""


@dataclass(frozen=True)
class Stage:
    """Spans that can run beside one another, from the most chunks to the fewest; chunk c of all comes before chunk
    c + 1 of any."""

    tokens: Tensor
    """int64 [chunks, CHUNK]: the packed token in each place; 0 beyond a span's end."""
    inside: Tensor
    """bool [chunks, CHUNK]: whether there is a token."""
    packed: Tensor
    """int64 [tokens]: the packed tokens that there are, in the order of their places."""
    filled: Tensor
    """int64 [tokens]: those places, counted over all chunks."""
    running: list[int]
    """For each step, how many spans have a chunk: the first ones."""
    parents: Tensor | None
    """float32 [spans, spans of the stage before]: 1 for the one whose state each begins with; None: empty states."""


class Order(NamedTuple):
    """Spans that can run beside one another: a stage, as kernels take it."""

    spans: Tensor
    """int32 [spans, 4]: first token, number of tokens, number of the first chunk, and which span of the order before
    is continued; -1 for none."""
    parents: Tensor | None
    """As of `Stage`."""


class Run(NamedTuple):
    """The chunks of a packed row, each of one span, and the orders in which states run along them."""

    starts: Tensor
    """int32 [chunks]: the first token."""
    counts: Tensor
    """int32 [chunks]: how many there are, at most CHUNK."""
    orders: list[Order]


class Recurrence:
    """The order of the tokens of a packed row. spans: in order, without gaps; a continued span is a whole one."""

    _made: WeakKeyDictionary[Packing, Recurrence] = WeakKeyDictionary()

    @classmethod
    def of(cls, packing: Packing) -> Recurrence:
        """Of the row of `packing`, made once."""
        if packing not in cls._made:
            cls._made[packing] = cls(packing.spans, packing.device)
        return cls._made[packing]

    def __init__(self, spans: Sequence[Span], device: torch.device):
        self.spans, self.device = spans, device
        self.tokens = sum(span.length for span in spans)

    @cached_property
    def stages(self) -> list[Stage]:
        """Spans that begin empty, then those that continue one of them, and so on."""
        return [self._stage(spans, before) for spans, before in self._by_depth()]

    @cached_property
    def run(self) -> Run:
        """The same for kernels."""
        starts: list[int] = []
        counts: list[int] = []
        orders: list[Order] = []
        for spans, before in self._by_depth():
            order = {span.start: index for index, span in enumerate(before)}
            rows = []
            for span in spans:
                rows.append((span.start, span.length, len(starts), order.get(span.prefix_start, -1)))
                starts += range(span.start, span.start + span.length, CHUNK)
                counts += [min(CHUNK, span.start + span.length - start) for start in starts[len(counts) :]]
            parents = self._parents(spans, before) if before else None
            orders.append(Order(torch.tensor(rows, dtype=torch.int32).to(self.device), parents))
        first, count = torch.tensor([starts, counts], dtype=torch.int32).to(self.device)
        return Run(first, count, orders)

    def _by_depth(self) -> Iterator[tuple[list[Span], list[Span]]]:
        """The spans of each stage, from the longest to the shortest, and those of the stage before."""
        by_depth: dict[int, list[Span]] = {}
        for span in self.spans:
            by_depth.setdefault(len(span.ranges) - 1, []).append(span)
        before: list[Span] = []
        for depth in sorted(by_depth):
            spans = sorted(by_depth[depth], key=lambda span: -span.length)
            yield spans, before
            before = spans

    def _parents(self, spans: list[Span], before: list[Span]) -> Tensor:
        """float32 [spans, spans before]: 1 for the one that each continues."""
        order = {span.start: index for index, span in enumerate(before)}
        parents = torch.zeros(len(spans), len(before))
        for index, span in enumerate(spans):
            parents[index, order[span.prefix_start]] = 1.0
        return parents.to(self.device)

    def _stage(self, spans: list[Span], before: list[Span]) -> Stage:
        chunks = [-(-span.length // CHUNK) for span in spans]
        running = [sum(count > step for count in chunks) for step in range(chunks[0])]
        firsts = torch.tensor([span.start for span in spans])
        lengths = torch.tensor([span.length for span in spans])
        places = torch.arange(CHUNK)
        offsets = [CHUNK * step + places.expand(active, CHUNK) for step, active in enumerate(running)]
        inside = torch.cat([offset < lengths[: len(offset), None] for offset in offsets])
        tokens = torch.cat([firsts[: len(offset), None] + offset for offset in offsets]).masked_fill(~inside, 0)
        filled = inside.flatten().nonzero()[:, 0]
        packed, device = tokens.flatten()[filled], self.device
        return Stage(
            tokens.to(device), inside.to(device), packed.to(device), filled.to(device), running,
            self._parents(spans, before) if before else None,
        )  # fmt: skip

    def preceding(self, count: int) -> Preceding:
        """The row with the `count` tokens before each span in front of it."""
        made: dict[int, Preceding] = self.__dict__.setdefault("_preceding", {})
        if count not in made:
            made[count] = Preceding(self.spans, count, self.device)
        return made[count]


class Preceding:
    """A packed row in which every span has the `count` tokens before it in front: its prompt's last ones, or zeros."""

    def __init__(self, spans: Sequence[Span], count: int, device: torch.device):
        tokens = sum(span.length for span in spans)
        sources, own = [], []
        size = 0
        for span in spans:
            seen = [torch.arange(start, start + length) for start, length in span.ranges[:-1]]
            before = torch.cat([torch.full((count,), tokens), *seen])
            sources += [before[len(before) - count :], torch.arange(span.start, span.start + span.length)]
            own.append(torch.arange(size + count, size + count + span.length))
            size += count + span.length
        source = torch.cat(sources)
        self.sources = source.to(device)
        """int64 [longer row]: the packed token; `tokens` for a zero."""
        self.own = torch.cat(own).to(device)
        """int64 [tokens]: where each packed token is in the longer row."""
        copies = torch.ones(len(source), dtype=torch.bool)
        copies[self.own.cpu()] = False
        copies &= source < tokens
        places = copies.nonzero()[:, 0]
        order = torch.argsort(source[places], stable=True)
        self.copies = places[order].to(device)
        """int64 [copies]: where tokens are a second time, by the token."""
        self.copied, counts = torch.unique_consecutive(source[places[order]], return_counts=True)
        self.copied = self.copied.to(device)
        """int64: the tokens that are there more than once, in order."""
        self.counts = counts.to(device)
        """int64: how often each of `copied` is among `copies`."""
        token_at = torch.full((len(source) + count,), -1)
        token_at[self.own.cpu()] = torch.arange(tokens)
        self.token_at = token_at.to(device)
        """int64 [longer row + count]: the packed token whose own place it is; -1 for none."""
