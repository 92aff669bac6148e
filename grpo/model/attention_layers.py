"""What attention each layer of a decoder has: heads, their size, a window, whose keys and values it sees.

Read from transformers' configuration, of families whose layers are alike and of those whose layers differ. Layers
without attention are not in it. For the sizes of linear layers ask `meta_graph.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

FULL, SLIDING = "full_attention", "sliding_attention"
"""transformers' names of the types of layers that have attention."""


@dataclass(frozen=True)
class AttentionLayer:
    """The attention of one layer."""

    query_heads: int
    key_heads: int
    """Heads of keys, and as many of values."""
    head_size: int
    window: int | None
    """Tokens that one sees, itself among them; None: all before it."""
    keys_of: int
    """The layer whose keys and values it sees: itself, but for layers that have none of their own."""

    @property
    def elements_per_token(self) -> int:
        """Of keys and values."""
        return 2 * self.key_heads * self.head_size


def attention_layers(shape: Any) -> dict[int, AttentionLayer]:
    """Layer number -> its attention. shape: transformers' configuration of a text model; or a plan's Shape, whose
    layers are alike."""
    count = shape.num_hidden_layers
    types = list(getattr(shape, "layer_types", None) or [FULL] * count)[:count]
    with_types = getattr(shape, "layer_types", None) is not None
    window = getattr(shape, "sliding_window", None)
    own = count - (getattr(shape, "num_kv_shared_layers", None) or 0)
    layers = {}
    for number, kind in enumerate(types):
        if kind not in (FULL, SLIDING):
            continue
        sizes = of_layer(shape, number)
        layers[number] = AttentionLayer(
            query_heads=shape.num_attention_heads,
            key_heads=getattr(sizes, "num_key_value_heads", None) or shape.num_attention_heads,
            head_size=getattr(sizes, "head_dim", None) or shape.hidden_size // shape.num_attention_heads,
            window=window if kind == SLIDING or not with_types else None,
            keys_of=number if number < own else max(earlier for earlier in range(own) if types[earlier] == kind),
        )
    return layers


def of_layer(config: Any, number: int) -> Any:
    """The configuration with what is particular about one layer."""
    return config.per_layer_config[number] if getattr(config, "is_heterogeneous", False) else config


def head_sizes(config: Any) -> set[int]:
    """Of the attention heads of all layers."""
    return {layer.head_size for layer in attention_layers(config).values()}
