"""Bytes and shapes of a model's weights, by arithmetic from its configuration.

Torch is not imported, for a dry run. For what a run takes beside its weights see `grpo.memory`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

from grpo.config.schema import Model
from grpo.errors import UserError
from grpo.model.layout import EMBEDDING, HEAD, fused_linears
from grpo.model.quantization import Block, quantization

AUTO_SHARE = 0.05
"""What `keep_16bit = "auto"` may take, of the memory that all linear layers in 16 bit would take beyond NF4."""
VOCABULARY_PADDING = 64
"""vLLM rounds the vocabulary up to a multiple of this."""


def nf4_bytes(rows: int, columns: int, itemsize: int) -> int:
    """A weight as kernels/nf4.py stores it: rows of whole pairs of blocks, each block with its scale."""
    return rows * math.ceil(columns / 128) * (64 + 2 * itemsize)


def eight_bit_bytes(shapes: Sequence[tuple[int, int]], block: Block) -> int:
    """Weights (out, in) that are stacked, as kernels/eight_bit.py stores them: a byte each, and a float32 scale for
    each `block`, of which rows are divided until all weights have a whole number of them."""
    shared = math.gcd(*(math.gcd(rows, block[0] or rows) for rows, _ in shapes))
    columns = shapes[0][1]
    wide = block[1] or columns
    wide = wide if wide >= columns else wide & -wide
    return sum(rows * columns + rows // shared * math.ceil(columns / wide) * 4 for rows, _ in shapes)


def stored_block(shape: Any) -> Block:
    """What shares a scale when a model of `shape` is held in 8 bit: as its checkpoint has it, else each row."""
    stored = quantization({"quantization_config": getattr(shape, "quantization_config", None)})
    return stored.blocks[0] if stored.blocks else (1, None)


def runs_of(names: Sequence[str], kept: Callable[[str], bool]) -> Iterator[tuple[bool, list[str]]]:
    """Neighbours among `names` that all are `kept`, or all are not."""
    for alike, group in groupby(names, kept):
        yield alike, list(group)


def embedding_bytes(shape: Any, itemsize: int) -> int:
    """The token embedding, or an output head, with vLLM's padding."""
    return -(-shape.vocab_size // VOCABULARY_PADDING) * VOCABULARY_PADDING * shape.hidden_size * itemsize


def layer_embedding_bytes(shape: Any, itemsize: int) -> int:
    """The embedding of every layer, where there is one (Gemma 4), with vLLM's padding."""
    width = shape.num_hidden_layers * (getattr(shape, "hidden_size_per_layer_input", None) or 0)
    rows = getattr(shape, "vocab_size_per_layer_input", 0) if width else 0
    return -(-rows // VOCABULARY_PADDING) * VOCABULARY_PADDING * width * itemsize


def weights_on_host(model: Model, shape: Any) -> dict[str, str]:
    """Parameters that `model` wants in host memory, each with the key that says so. Of a model whose embedding is its
    output head that one tensor, for `offload_head`. Raises UserError for `offload_embedding` there."""
    tied = shape.tie_word_embeddings
    if model.offload_embedding and tied:
        raise UserError(
            f"model.offload_embedding: the token embedding of {model.name} is its output head too, all of which the "
            "GPU needs for every token; leave it out, or set model.offload_head = true, which moves both and is slow"
        )
    on_host = {EMBEDDING: "model.offload_embedding"} if model.offload_embedding else {}
    return on_host | ({EMBEDDING if tied else HEAD: "model.offload_head"} if model.offload_head else {})


def pinned_bytes(size: int) -> int:
    """What pinning `size` bytes takes: torch rounds up to a power of two."""
    return 1 << (size - 1).bit_length() if size else 0


def mlp_widths(shape: Any) -> list[int]:
    """The MLP's inner size in every layer of transformers' configuration; in one of a plan's Shape, all being alike."""
    widths = [columns for name, (_, columns) in linear_shapes(shape).items() if name.endswith("mlp.down_proj")]
    return widths or [shape.intermediate_size]


def linear_shapes(shape: Any) -> dict[str, tuple[int, int]]:
    """Module name -> (out, in) of every linear layer of the decoder's blocks.

    Of transformers' configuration as its graph has them; of a plan's Shape, for which nothing is imported, by the sizes
    that decoders of the usual kind have.
    """
    if hasattr(shape, "to_dict"):
        from grpo.model.meta_graph import graph_tensors

        return {name: (linear.rows, linear.columns) for name, linear in graph_tensors(shape).linears.items()}
    hidden, inner = shape.hidden_size, shape.intermediate_size
    query, key_value = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    by_leaf = {
        "q_proj": (query, hidden),
        "k_proj": (key_value, hidden),
        "v_proj": (key_value, hidden),
        "qkv_proj": (query + 2 * key_value, hidden),
        "o_proj": (hidden, query),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "gate_up_proj": (2 * inner, hidden),
        "down_proj": (hidden, inner),
    }
    parts = [part for group in fused_linears(shape).values() for part in group]
    return {part: by_leaf[part.rpartition(".")[2]] for part in parts}
