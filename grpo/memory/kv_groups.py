"""How vLLM lays out keys and values of layers that differ: windows beside full attention, heads of several sizes.

vLLM puts layers of a kind into groups of equally many, gives every group its own blocks out of one pool, and makes
blocks of all groups equally large: layers with smaller keys have more tokens in one. Layers that see the keys of an
earlier one take nothing. For layers with states see `states.py`. Nothing here imports torch or allocates.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil
from typing import Any

from grpo.memory.states import ALMOST_ALIKE
from grpo.model.attention_layers import attention_layers

Kind = tuple[int, int | None]
"""Elements of keys and values of a token, and the window."""


@dataclass(frozen=True)
class Groups:
    """The groups of layers of one kind."""

    count: int
    block: int
    """Tokens in a block."""
    window: int | None

    def blocks(self, length: int, in_flight: int) -> int:
        """That a sequence of so many tokens takes at once, of which `in_flight` are computed in a step at the most."""
        if self.window is None:
            return self.count * ceil(length / self.block)
        return self.count * (ceil(min(self.window - 1 + in_flight, length) / self.block) + 1)


@dataclass(frozen=True)
class KeyPool:
    """What keys and values are kept in."""

    block_bytes: int
    groups: tuple[Groups, ...]

    @classmethod
    def of(cls, shape: Any, itemsize: int, block: int) -> KeyPool:
        """shape: a plan's Shape or transformers' configuration; `block`: tokens in a block of the largest layers."""
        layers = attention_layers(shape).items()
        own = [layer for number, layer in layers if layer.keys_of == number]
        kinds = count((layer.elements_per_token, layer.window) for layer in own)
        if len({window for _, window in kinds}) == 1:  # all need equally many tokens: one group, whatever their sizes
            in_all = sum(elements * layers for (elements, _), layers in kinds.items())
            return cls(in_all * itemsize * block, (Groups(1, block, next(iter(kinds))[1]),))
        fewest, most = min(kinds.values()), max(kinds.values())
        together = most if most < ALMOST_ALIKE * fewest else fewest
        largest = max(elements for elements, _ in kinds)
        groups = (
            # A page that does not fit into the largest evenly is padded to it.
            Groups(ceil(layers / together), block * (1 if largest % elements else largest // elements), window)
            for (elements, window), layers in kinds.items()
        )
        return cls(largest * itemsize * block * together, tuple(groups))

    def blocks(self, length: int, in_flight: int) -> int:
        """That one sequence takes at its full length."""
        return sum(group.blocks(length, in_flight) for group in self.groups)


def count(kinds: Iterable[Kind]) -> dict[Kind, int]:
    """How many layers each kind has."""
    found: dict[Kind, int] = {}
    for kind in kinds:
        found[kind] = found.get(kind, 0) + 1
    return found
