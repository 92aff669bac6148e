"""Sequences that begin alike, as a tree: what several of them share is computed once, wherever they part.

The turns of an episode that rewrote its history, and the episodes of a group, share their beginnings up to different
places. Each node of the tree becomes a span that continues its parent's, so that the result is exact; which sequences
go into one row is `training/batch.py`'s, and how attention and recurrent layers read spans is theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

Tokens = np.ndarray
"""int64 [tokens]."""
FEWEST = 16
"""Shorter common beginnings are not worth a span of their own, unless they are a whole prompt."""


@dataclass(eq=False)
class Node:
    """Tokens that follow the parent's."""

    tokens: Tokens
    parent: Node | None = None
    children: list[Node] = field(default_factory=list)

    def below(self) -> Iterator[Node]:
        """All nodes under this one, each before its children."""
        stack = self.children[::-1]
        while stack:
            node = stack.pop()
            yield node
            stack += node.children[::-1]


class PrefixTree:
    """A tree to which sequences are added one after another."""

    def __init__(self) -> None:
        self.root = Node(np.empty(0, np.int64))
        self.ends: list[tuple[Node, int]] = []
        """Of each sequence, the last node of its path and how many tokens it has."""

    def add(self, tokens: Sequence[int], prompt_length: int) -> int:
        """Add a sequence, of which the first `prompt_length` tokens are a prompt; returns how many tokens are new."""
        rest, node, left = np.asarray(tokens, np.int64), self.root, prompt_length
        for child, common in likest(self.root, rest):
            if common < min(len(child.tokens), len(rest)):
                common = worth_sharing(common, left)
                if not common:
                    break
                child = split(child, common)
            node, rest, left = child, rest[common:], left - common
        if len(rest):
            node.children.append(Node(rest, node))
            node = node.children[-1]
        self.ends.append((node, len(tokens)))
        return len(rest)


def likest(node: Node, tokens: Tokens) -> list[tuple[Node, int]]:
    """The path below `node` that begins most like `tokens`: nodes, and how many tokens of each are alike."""
    best: list[tuple[Node, int]] = []
    for child in node.children:
        if common := common_length(child.tokens, tokens):
            deeper = likest(child, tokens[common:]) if common == len(child.tokens) else []
            best = max(best, [(child, common), *deeper], key=lambda path: sum(count for _, count in path))
    return best


def worth_sharing(common: int, prompt: int) -> int:
    """How many of `common` tokens that two sequences begin alike are split off, where a prompt ends after `prompt`."""
    if 0 < prompt <= common < prompt + FEWEST:
        return prompt
    return common if common >= FEWEST else 0


def common_length(one: Tokens, other: Tokens) -> int:
    """How many tokens two sequences begin alike."""
    shorter = min(len(one), len(other))
    differ = np.flatnonzero(one[:shorter] != other[:shorter])
    return int(differ[0]) if len(differ) else shorter


def split(node: Node, length: int) -> Node:
    """A new node of the first `length` tokens of `node`, in its place and above it."""
    parent = node.parent
    assert parent is not None and 0 < length < len(node.tokens)
    upper = Node(node.tokens[:length], parent, [node])
    parent.children[parent.children.index(node)] = upper
    node.tokens, node.parent = node.tokens[length:], upper
    return upper
