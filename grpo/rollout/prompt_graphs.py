"""CUDA graphs for the steps of vLLM in which turns begin: which sizes, and what vLLM is told. For engine.py alone.

Without them the host launches such a step kernel by kernel, which for a small model takes as long as a dozen decoding
steps. vLLM's "breakable" graphs are pieces between layers' attention, which is launched as it always was: how many
tokens each sequence reads may differ, and padding reaches none of them. Nothing is compiled for them.

Not for layers with states or experts, or models that see images: those read prompts without graphs. Neither torch nor
vLLM is imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from grpo.run.compile_ahead import capture_sizes

STEPS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
"""Tokens of a step that reads prompts, padded to the next: at most half of them in vain."""

GRAPH_BYTES = 128 << 20
"""What a captured step may hold at a time, about: a layer's hidden states, its products and their operands."""


def most_tokens(config: Any, itemsize: int, wanted: int) -> int:
    """Of a step that is captured: `wanted`, or as many as leave the graphs' memory small. A larger model's steps of
    more tokens keep the GPU busy for longer than their launches take."""
    widest = getattr(config, "intermediate_size", None)
    widest = max(widest) if isinstance(widest, list | tuple) else widest or 4 * config.hidden_size
    return min(wanted, GRAPH_BYTES // ((3 * widest + 6 * config.hidden_size) * itemsize))


def graph_sizes(max_num_seqs: int, graph_tokens: int) -> list[int]:
    """Tokens of the steps to capture: decoding ones of so many sequences, others of up to `graph_tokens`."""
    return sorted({*capture_sizes(max_num_seqs), *(size for size in STEPS if size <= graph_tokens)})


def compilation(max_num_seqs: int, graph_tokens: int) -> dict[str, Any]:
    """vLLM's `compilation_config`."""
    return {
        "mode": 0,
        "cudagraph_mode": "FULL_AND_PIECEWISE" if graph_tokens >= STEPS[0] else "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": graph_sizes(max_num_seqs, graph_tokens),
    }


@contextmanager
def left_out(dispatcher: Any) -> Iterator[None]:
    """Within it no step is a graph, so that layers' Python runs: vLLM's `dispatcher` finds none before it is ready."""
    ready, dispatcher.keys_initialized = dispatcher.keys_initialized, False
    try:
        yield
    finally:
        dispatcher.keys_initialized = ready


def split_as_ever(builders: Any, max_num_seqs: int) -> None:
    """Let FlashAttention cut up the sequences of larger steps by its own rule, as it does where only decoding is
    captured: what a graph would need set aside for that is a gigabyte for a large model, and slower."""
    for builder in builders:
        if hasattr(builder, "max_cudagraph_size"):
            builder.max_cudagraph_size = max_num_seqs
