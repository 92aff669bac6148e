"""What code here may ask of a model's configuration, which transformers makes of its config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

IMAGE_POSITIONS = ("mrope_section", "mrope_interleaved")
"""Entries of `rope_parameters` about positions in images."""


class DecoderConfig(Protocol):
    """What every decoder's configuration has, and some of what a family adds. The rest is asked for by `getattr`.

    A model that also takes images has one around that of its text decoder; `get_text_config` is the latter, and of
    a plain decoder itself.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    rope_parameters: dict[str, Any]
    rms_norm_eps: float
    hidden_act: str
    tie_word_embeddings: bool
    use_cache: bool
    pad_token_id: int | None
    eos_token_id: int | list[int] | None

    head_dim: int
    """Of a head, where the family says so; Llama's and others' is the hidden size over their number."""
    sliding_window: int | None
    """Tokens that a layer with a window sees; only in families that have such layers."""
    original_max_position_embeddings: int
    """Length that longrope's short factors are for; Phi-3 alone."""
    per_layer_config: Mapping[int | str, Any]
    """Number or type of a layer -> the configuration with its own sizes; where `is_heterogeneous`."""
    use_bidirectional_attention: str | bool | None
    """Which tokens see those behind them; Gemma alone."""

    layer_types: list[str]
    """The kind of each layer, where layers differ."""
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    """Of gated DeltaNet: Qwen 3.5 alone."""
    norm_eps: float
    conv_L_cache: int
    """Of LFM2 alone."""

    quantization_config: dict[str, Any]
    """How a checkpoint's weights are quantised, where they are."""

    def get_text_config(self, decoder: bool | None = None) -> DecoderConfig: ...

    def to_dict(self) -> dict[str, Any]: ...

    def to_json_string(self) -> str: ...
