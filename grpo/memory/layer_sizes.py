"""The sizes of a decoder layer that decide what training keeps of it, and which kernels compute it.

Nothing here imports torch or allocates. Not here: bytes (`activations.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from grpo.config.schema import Lora
from grpo.kernels.sizes import ADAPTER_COLUMNS
from grpo.memory.states import StateLayers, has_states, largest_layer, state_layers
from grpo.model.adapter_layers import adapted_layers, expert_ranks
from grpo.model.attention_layers import attention_layers
from grpo.model.expert_sizes import ExpertSizes, expert_sizes
from grpo.model.families.table import family_of
from grpo.model.sizes import linear_shapes, mlp_widths

QKV, GATE_UP, DOWN = (
    ("q_proj", "k_proj", "v_proj", "qkv_proj"),
    ("gate_proj", "up_proj", "gate_up_proj", "w1", "w3"),
    ("down_proj", "w2"),
)
"""Linear layers that are one product each."""
MLP = (*GATE_UP, *DOWN)
NORMED_HEADS = ("qwen3", "gemma3_text", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_moe", "lfm2")
"""Families that normalise q and k before the rotation."""
OWN_NORMS = ("qwen3_5_text", "qwen3_5_moe_text")
"""Families whose plain layers have our norms, which keep their input as it is, and the hidden state between layers in
float32 (grpo/policy/gated_attention.py)."""


@dataclass(frozen=True)
class LayerSizes:
    """Numbers per token in a decoder layer, and what its adapters add."""

    hidden: int
    inner: int
    query: int
    """Heads times head dimension."""
    key: int
    """Key-value heads times head dimension."""
    heads: int
    head_dim: int
    layers: int
    vocabulary: int
    norms: int
    """2, or 4 where a norm follows attention and MLP too (Gemma 2 and 3)."""
    normed_heads: bool
    """q and k are normalised before the rotation (Qwen 3, Gemma 3)."""
    input_of_layer: int
    """Numbers that a layer gets of every token beside the hidden state (Gemma 4)."""
    adapted: frozenset[str]
    """Endings of the linear layers that have an adapter."""
    rank: int
    adapter: int
    """Numbers in one layer's A and B."""
    adapter_b: int
    """Numbers in one layer's B."""
    adapter_of_mlp: int
    """Of `adapter`, those of the MLP's."""
    gated: bool = False
    """What attention gives is multiplied by a gate, and norms of plain layers keep their input as it is (Qwen 3.5)."""
    states: tuple[StateLayers, ...] = ()
    """The layers that are not attention, by their kind."""
    experts: ExpertSizes | None = None
    expert_ranks: tuple[int, int] = (0, 0)
    """Of the adapters on every expert's gate_up and on its down; 0: none."""
    float32_stream: bool = False
    """What layers hand on is in float32, whatever they compute in."""
    all_trained: bool = False
    """The weights themselves get gradients; `adapted` names all linear layers then, as those that keep their input."""

    @classmethod
    def of(cls, shape: Any, lora: Lora | None, of_all: Callable[[list[int]], int] = max) -> LayerSizes:
        """Of a plan's Shape or transformers' configuration; every layer as large as one with all adapters there are.
        `lora` None: all weights are trained. Where layers differ, `of_all` makes one size of theirs: that of the
        largest, or `mean_of`."""
        attention = attention_layers(shape).values()
        adapters = {} if lora is None else adapted_layers(shape, lora)
        adapted = frozenset(name.rpartition(".")[2] for name in (linear_shapes(shape) if lora is None else adapters))
        rank = max((adapter.rank for adapter in adapters.values()), default=0)
        first = {n: s for n, s in linear_shapes(shape).items() if ".layers.0." in n and n.rpartition(".")[2] in adapted}
        if mixed := has_states(shape):  # of the layer with the most
            first = largest_layer(shape, adapted)
        return cls(
            gated=shape.model_type in OWN_NORMS,
            states=state_layers(shape, adapted) if mixed else (),
            hidden=shape.hidden_size,
            inner=of_all(mlp_widths(shape)),
            query=of_all([layer.query_heads * layer.head_size for layer in attention]),
            key=of_all([layer.key_heads * layer.head_size for layer in attention]),
            heads=shape.num_attention_heads,
            head_dim=of_all([layer.head_size for layer in attention]),
            layers=shape.num_hidden_layers,
            vocabulary=shape.vocab_size,
            norms=4 if shape.model_type in ("gemma2", "gemma3_text", "gemma4_text") else 2,
            normed_heads=shape.model_type in NORMED_HEADS,
            input_of_layer=getattr(shape, "hidden_size_per_layer_input", None) or 0,
            adapted=adapted,
            rank=rank,
            adapter=sum(rank * sum(size) for size in first.values()),
            adapter_b=sum(rank * size[0] for size in first.values()),
            adapter_of_mlp=sum(rank * sum(size) for name, size in first.items() if name.rpartition(".")[2] in MLP),
            experts=expert_sizes(shape),
            expert_ranks=expert_ranks(shape, lora),
            float32_stream=has_wide_stream(shape),
            all_trained=lora is None,
        )

    def has(self, *endings: str) -> bool:
        return bool(self.adapted & set(endings))

    def beside(self, endings: Sequence[str]) -> int:
        """Columns beside a product of linear layers for what their adapters add (kernels/lora_linear.py)."""
        return -(-self.rank * len(self.adapted & set(endings)) // ADAPTER_COLUMNS) * ADAPTER_COLUMNS


def mean_of(sizes: list[int]) -> int:
    """The mean, rounded up."""
    return -(-sum(sizes) // len(sizes))


def has_wide_stream(shape: Any) -> bool:
    """Whether what layers hand on is in float32 in both graphs, whatever they compute in."""
    return shape.model_type in OWN_NORMS or family_of(shape.model_type).float32_stream


def has_kernels(shape: Any) -> bool:
    """Whether kernels compute what the layers do, as `grpo.policy.fused_layers` asks."""
    return family_of(shape.model_type).fused_layers


def has_mlp_kernels(shape: Any) -> bool:
    """Whether kernels compute the MLPs of layers that are otherwise plain, as `grpo.policy.fused_mlp` asks."""
    return shape.model_type in OWN_NORMS and expert_sizes(shape) is None
