"""What can be particular about a family of models.

What transformers' configuration and vLLM's own loading say about a family needs no entry: its layout is traced and the
start-up gate compares the two graphs. An entry says what neither tells: another class in vLLM, a part of a
configuration that one of the two reads differently, layers that our kernels may compute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Family:
    """What is particular about the models of one `model_type`; the defaults are those of a family without an entry."""

    models: str = ""
    """Names by which people know its models."""
    caveat: str = ""
    """What differs from the other families, for docs/models.md."""
    vllm_class: str = ""
    """vLLM's name of its class; empty for transformers'."""
    text_as: str = ""
    """The family whose graph is this one's, for a text decoder that transformers has no causal LM of."""
    text_values: dict[str, Any] = field(default_factory=dict)
    """What that family's configuration says for it, in place of its own defaults."""
    activation: tuple[str, tuple[str, ...]] | None = None
    """The key of the MLP's activation, and what vLLM computes of it; None where vLLM reads the key."""
    layers_differ: bool = False
    """Both graphs read sizes of attention that differ by layer (transformers' `per_layer_config`)."""
    head_of_hidden_size: bool = False
    """Heads are, to vLLM, the hidden size over their number, whatever `head_dim` says."""
    always_tied: bool = False
    """Some vLLM from 0.26 on has no output head beside the embedding."""
    needs_window: bool = False
    """transformers makes the mask of a sliding window whether a layer has one or not."""
    window_in_all_or_none: bool = False
    """vLLM gives a sliding window to all layers or to none."""
    window_in_every_other: bool = False
    """vLLM gives the sliding window to the first layer and then to every other one."""
    taken_for_granted: Mapping[str, Any] = field(default_factory=dict)
    """Keys that vLLM does not read -> the value that it computes with."""
    sinks: bool = False
    """Attention has sinks, a score of each head without a value."""
    expert_biases: bool = False
    """Experts and their router add biases; for the memory plan, which sees no graph."""
    served: Callable[[Any], dict[str, Any]] | None = None
    """What vLLM's configuration says otherwise than transformers', of which it is made."""
    of_rotary: frozenset[str] = frozenset()
    """Entries of `rope_parameters` that the family reads elsewhere than in its rotary positions."""
    mixers: Mapping[str, str] = field(default_factory=dict)
    """Where layers differ in kind: the kind, as in `layer_types`, -> the module that its layers alone have."""
    fused_layers: bool = False
    """kernels/ compute what the decoder's layers do (`grpo.policy.fused_layers`)."""
    sees: Literal["", "chunks", "interleaved"] = ""
    """Of a decoder inside a model that takes images: an image is tokens of the prompt, in rows of a grid and seen left
    to right like text. How rotary frequencies are shared out between time, row and column; empty where images of such
    a model are not read."""
    blind: str = ""
    """Why images of such a model are not read, where somebody would expect it."""
    multiplies_logits: frozenset[str] = frozenset()
    """Keys by which the family multiplies its logits, that are divisors in others."""
    unserved: str = ""
    """What its models have that no graph here computes, and which to use in their place; empty for all others."""
    norm_adds_one: bool = False
    """RMSNorm multiplies by the weight plus one."""
    float32_stream: bool = False
    """The stream between layers is in float32 in both graphs, of models in 16 bit: transformers' layers have two plain
    norms of it and add to it what follows each, and vLLM's hand it from norm to norm."""
