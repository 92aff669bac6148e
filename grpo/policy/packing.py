"""Sequences laid out in one row without padding, what they share once, and the decoder run over it."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import compress, groupby
from typing import Any

import torch
from torch import Tensor, nn

from grpo.kernels.attention import Packing, Span
from grpo.kernels.launch import int64_tensor, to_device
from grpo.policy.image_rows import ImageRows, deepstack
from grpo.policy.prefix_tree import Node, PrefixTree

_packing: ContextVar[Packing | None] = ContextVar("packing", default=None)
"""That of the layer which runs: some families' layers do not pass on to their modules what they are called with."""

running_routes: ContextVar[Tensor | None] = ContextVar("routes", default=None)
"""The experts that sampling chose for the tokens of the layer that runs [tokens, layers, top_k], the layers being those
that have experts; None: routers choose."""


def remember_packing(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A hook before a decoder layer."""
    _packing.set(kwargs.get("packing"))
    running_routes.set(kwargs.get("routes"))


def packing_of(packing: Packing | None, row: Tensor) -> Packing:
    """The packing of `row` [1, tokens, ...]: as given, or the running layer's, or of one sequence."""
    return packing or _packing.get() or Packing.of_lengths([row.shape[1]], row.device)


@dataclass
class PackedRow:
    """Sequences laid out one after another, what they share only once."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    """Of each token in its own sequence."""
    spans: list[Span] = field(default_factory=list)
    predicting: list[int] = field(default_factory=list)
    """For every completion token, the place in the row that predicts it."""
    sources: list[tuple[int, int, int]] = field(default_factory=list)
    """(sequence, first position in it, tokens) of each span; of several sequences that share it, one."""

    def append(self, tokens: Sequence[int], first_position: int, sequence: int, prefix: Span | None = None) -> None:
        """Add `tokens` of a sequence as a span that continues `prefix`."""
        if not tokens:
            return
        self.sources.append((sequence, first_position, len(tokens)))
        place = len(self.tokens), len(tokens)
        self.spans.append(prefix.continued(*place) if prefix else Span(*place))
        self.positions += range(first_position, first_position + len(tokens))
        self.tokens += tokens


def packed_row(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], sampled: Sequence[bool] | None = None
) -> PackedRow:
    """`completions` after their `prompts`, a prompt shared by neighbours once.

    `sampled`: which of all completion tokens are predicted; None: each.
    """
    row, number = PackedRow(), 0
    pairs = zip(prompts, completions, strict=True)
    for prompt, members in groupby(pairs, key=lambda pair: list(pair[0])):
        fed = [list(completion[:-1]) for _, completion in members]
        first, number = number, number + len(fed)
        if len(fed) == 1:
            row.append(prompt + fed[0], 0, first)
            row.predicting += range(len(row.tokens) - len(fed[0]) - 1, len(row.tokens))
            continue
        row.append(prompt, 0, first)
        shared = row.spans[-1]
        for member, suffix in enumerate(fed):
            row.predicting += [shared.start + shared.length - 1, *range(len(row.tokens), len(row.tokens) + len(suffix))]
            row.append(suffix, len(prompt), first + member, prefix=shared)
    if sampled is not None:
        row.predicting = list(compress(row.predicting, sampled))
    return row


def tree_row(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], sampled: Sequence[bool] | None = None
) -> PackedRow:
    """The same with every beginning that sequences share computed once, also where they part within their turns."""
    tree, row = PrefixTree(), PackedRow()
    for prompt, completion in zip(prompts, completions, strict=True):
        tree.add([*prompt, *completion[:-1]], len(prompt))
    spans: dict[int, Span] = {}
    passing = sequences_through(tree)
    for node in tree.root.below():
        before = spans.get(id(node.parent))
        row.append(node.tokens.tolist(), before.keys if before else 0, passing[id(node)], prefix=before)
        spans[id(node)] = row.spans[-1]
    for prompt, (end, length) in zip(prompts, tree.ends, strict=True):
        places = [place for start, count in spans[id(end)].ranges for place in range(start, start + count)]
        row.predicting += places[len(prompt) - 1 : length]
    if sampled is not None:
        row.predicting = list(compress(row.predicting, sampled))
    return row


def sequences_through(tree: PrefixTree) -> dict[int, int]:
    """id of each node -> a sequence on whose path it is, with all its tokens: others may end within it."""
    passing: dict[int, int] = {}
    for number, (end, length) in enumerate(tree.ends):
        node: Node | None = end
        while node is not None:
            if id(node) not in passing or length > tree.ends[passing[id(node)]][1]:
                passing[id(node)] = number
            node = node.parent
    return passing


def routes_of(row: PackedRow, routes: Sequence[Tensor | None] | None, device: torch.device) -> Tensor | None:
    """The experts of every token of `row` [tokens, layers, top_k]; None where those of one sequence are not known."""
    if routes is None or not routes or any(each is None for each in routes):
        return None
    known = [each for each in routes if each is not None]
    parts = [known[sequence][first : first + count] for sequence, first, count in row.sources]
    return torch.cat([part.to(device) for part in parts])


def predicting_states(
    decoder: nn.Module,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    device: torch.device,
    sampled: Sequence[bool] | None = None,
    *,
    tree: bool = False,
    routes: Sequence[Tensor | None] | None = None,
    images: ImageRows | None = None,
) -> tuple[Tensor, Tensor]:
    """(`decoder`'s output where each completion token is predicted [tokens, hidden], those tokens [tokens]).

    Only tokens that are `sampled` count, where it is given: what an environment wrote is context and no more. With
    `tree`, sequences share more than whole prompts. `routes` as in `Policy.score`; `images`: those of the sequences.
    """
    given = (prompts, completions) if images is None else (images.prompts, images.completions)
    row = (tree_row if tree else packed_row)(*given, sampled)
    shared = {"use_cache": False, "packing": Packing(row.spans, device), "routes": routes_of(row, routes, device)}
    targets = [token for completion in completions for token in completion]
    targets = targets if sampled is None else list(compress(targets, sampled))
    # Before the decoder, and so that the host waits for no copy: it gets ahead of the GPU and stays there.
    tokens, positions, predicting, chosen = (
        to_device(int64_tensor(numbers), device) for numbers in (row.tokens, row.positions, row.predicting, targets)
    )
    if images is None:
        result = decoder(input_ids=tokens[None], position_ids=positions[None], **shared)
    else:
        inputs, seen, at = images.embedded(tokens, decoder.get_input_embeddings())
        with deepstack(decoder.layers, seen, at, images.vision):
            result = decoder(inputs_embeds=inputs[None], position_ids=images.positions(row.sources, device), **shared)
    return result.last_hidden_state[0].index_select(0, predicting), chosen
