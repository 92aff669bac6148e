"""Memory of what sampling keeps of a sequence, by kinds of layers: keys and values of every token, or one state.

vLLM keeps both in pages of one size, laid out here as it does: a page of keys and values is made as long as the state
is large, and a page is one for as many layers as the kind with the fewest has. Nothing here imports torch or allocates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import Any

from grpo.kernels.sizes import (
    CONVOLUTION_BYTES,
    CONVOLUTION_TENSORS,
    DELTA_CHUNK,
    DELTA_RULE_BYTES,
    DELTA_RULE_TENSORS,
    delta_rule_bytes,
)
from grpo.model.sizes import linear_shapes

STATE_ITEMSIZE = 4
"""Bytes of a number of a recurrent state, which is float32 whatever is computed in."""
SPAN = 256
"""Tokens of a span of a packed row, about: a chunk of each is not full, and each has states of its own."""
ALMOST_ALIKE = 1.5
"""Where the commonest kind has fewer than so many times the layers of the rarest, pages are for the former's number."""


@dataclass(frozen=True)
class Pages:
    """How vLLM lays out what it keeps."""

    block: int
    """Tokens in a block of keys and values."""
    size: int
    """Bytes of a block, of keys and values or of a state, over the layers that share it."""
    attention_groups: int
    """Blocks that every `block` tokens take."""
    state_groups: int
    """Blocks that a sequence's states take, whatever its length."""

    def blocks(self, length: int, states: int = 1) -> int:
        """Of one sequence of so many tokens, with so many states kept of each layer."""
        return ceil(length / self.block) * self.attention_groups + states * self.state_groups


@dataclass(frozen=True)
class StateLayers:
    """In training: the layers of a kind that carries a state, and what one of them is made of."""

    layers: int
    hidden: int
    convolved: int
    """Channels of the convolution."""
    values: int
    """Numbers of all value heads; 0 where there is only a convolution."""
    heads: int
    """Value heads."""
    adapted: int
    """Linear layers outside the MLP that have an adapter."""
    key_heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    """Of a head."""

    def kept(self, itemsize: int, rank: int) -> int:
        """Bytes per token that a layer saves beside norms and MLP (grpo/policy/recurrent.py)."""
        numbers = self.hidden + rank * self.adapted
        if not self.values:  # the three gates, the convolution's input, its result, and what the last product takes
            return (numbers + 6 * self.hidden) * itemsize
        # The convolution's input and result; the rule's, its normed form and gate; what decay and beta are made of.
        size = (2 * self.convolved + 3 * self.values) * itemsize + 12 * self.heads
        return numbers * itemsize + size

    def backward(self, tokens: int, itemsize: int, *, kernels: bool) -> int:
        """Bytes that the backward of the layer's own part allocates; `kernels`: whether it is theirs."""
        convolution = tokens * 2 * self.convolved * itemsize
        if not kernels:
            convolution += min(CONVOLUTION_BYTES, CONVOLUTION_TENSORS * 4 * tokens * self.convolved)
        if not self.values:
            return convolution
        # Of the result, and of queries, keys and values, which are then put beside one another.
        gradients = tokens * (self.convolved + self.values) * itemsize
        # Gone by then: the rule's result, its normed form and gate; there already: the input's gradient by the gate.
        gone = tokens * (3 * self.values - self.hidden) * itemsize
        return max(convolution + gradients, gradients + self.rule_bytes(tokens, kernels=kernels)) - gone

    def rule_bytes(self, tokens: int, *, kernels: bool) -> int:
        """Of the delta rule's backward: what as many heads take as are computed together."""
        if kernels:
            chunks, spans = -(-tokens // DELTA_CHUNK), -(-tokens // SPAN)
            one = delta_rule_bytes(chunks + spans, spans, self.key_dim, self.value_dim)
        else:
            one = DELTA_RULE_TENSORS * 4 * tokens * (self.key_dim + self.value_dim)
        one *= self.heads // self.key_heads
        return min(self.key_heads, max(1, DELTA_RULE_BYTES // one)) * one


def state_layers(shape: Any, adapted: frozenset[str]) -> tuple[StateLayers, ...]:
    """Of transformers' configuration, for every kind; `adapted`: endings of linear layers that have an adapter."""
    kinds = layer_kinds(shape)
    parts = adapted - {"gate_proj", "up_proj", "down_proj", "q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3"}
    result = []
    for kind in dict.fromkeys(kind for kind in kinds if state_bytes(shape, kind, 1)):
        values = shape.linear_num_value_heads * shape.linear_value_head_dim if kind == "linear_attention" else 0
        keys = shape.linear_num_key_heads * shape.linear_key_head_dim if values else 0
        heads = shape.linear_num_value_heads if values else 0
        convolved = 2 * keys + values or shape.hidden_size
        layer = StateLayers(kinds.count(kind), shape.hidden_size, convolved, values, heads, len(parts))
        if values:
            dims = shape.linear_key_head_dim, shape.linear_value_head_dim
            layer = replace(layer, key_heads=shape.linear_num_key_heads, key_dim=dims[0], value_dim=dims[1])
        result.append(layer)
    return tuple(result)


def largest_layer(shape: Any, adapted: frozenset[str]) -> dict[str, tuple[int, int]]:
    """The adapted linear layers, by name, of the decoder layer that has the most numbers in them."""
    by_layer: dict[str, dict[str, tuple[int, int]]] = {}
    for name, size in linear_shapes(shape).items():
        if name.rpartition(".")[2] in adapted:
            by_layer.setdefault(name.split(".")[2], {})[name] = size
    return max(by_layer.values(), key=lambda layer: sum(map(sum, layer.values())))


def layer_kinds(shape: Any) -> list[str]:
    """The kind of every layer: of a plan's Shape, which has attention alone, or transformers' configuration."""
    kinds = getattr(shape, "layer_types", None)
    return list(kinds[: shape.num_hidden_layers]) if kinds else ["full_attention"] * shape.num_hidden_layers


def state_bytes(shape: Any, kind: str, itemsize: int) -> int:
    """Of one layer of that kind; 0 for attention."""
    if kind == "linear_attention":
        keys = shape.linear_num_key_heads * shape.linear_key_head_dim
        values = shape.linear_num_value_heads * shape.linear_value_head_dim
        before = (2 * keys + values) * (shape.linear_conv_kernel_dim - 1) * itemsize
        return before + values * shape.linear_key_head_dim * STATE_ITEMSIZE
    return shape.hidden_size * (shape.conv_L_cache - 1) * itemsize if kind == "conv" else 0


def has_states(shape: Any) -> bool:
    """Whether some layers keep a state."""
    return any(state_bytes(shape, kind, 1) for kind in set(layer_kinds(shape)))


def attention_layers(shape: Any) -> int:
    """How many layers keep keys and values of every token."""
    return sum(not state_bytes(shape, kind, 1) for kind in layer_kinds(shape))


def pages(shape: Any, itemsize: int, token_bytes: int, block: int) -> Pages:
    """token_bytes: of keys and values of one token in one layer; `block`: tokens in a block where there are no states.

    Sliding windows are served as full attention is.
    """
    kinds = layer_kinds(shape)
    largest = max(state_bytes(shape, kind, itemsize) for kind in kinds)
    attention = attention_layers(shape)
    with_state = len(kinds) - attention
    if not with_state or not attention:
        return Pages(block, block * token_bytes * attention, 1, 0)
    block *= ceil(largest / (block * token_bytes))
    fewest, most = sorted((attention, with_state))
    together = most if most < ALMOST_ALIKE * fewest else fewest
    return Pages(block, block * token_bytes * together, ceil(attention / together), ceil(with_state / together))
