"""What a GGUF file says of Gemma 4, whose layers differ: heads, widths and windows by layer, embeddings of each layer.

llama.cpp has in its code that scores are not scaled, that values are the keys where a layer has no matrix of them, and
that a file's full layers turn by `rope_freqs`: divisors of the frequencies, which stop where the turned part of a head
ends. Names: `docs/gguf.md` of the ggml project.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo.errors import UserError
from grpo.model.attention_layers import FULL, SLIDING, attention_layers
from grpo.model.decoder_config import DecoderConfig
from grpo.model.meta_graph import graph_tensors
from grpo.model.rope import frequencies

NEVER_TURNS = 1e30
"""llama.cpp's divisor of a frequency that is none."""


def add_gemma4(writer: Any, config: DecoderConfig) -> dict[str, Tensor]:
    """Add what the decoder of transformers' `config` is made of; the tensors that belong to it, by name.

    Raises UserError for what llama.cpp has not.
    """
    layers = attention_layers(config)
    kinds = list(config.layer_types[: config.num_hidden_layers])
    if set(kinds) != {FULL, SLIDING}:
        raise UserError("llama.cpp has Gemma 4 with layers of both kinds alone; export merged-16bit instead")
    if getattr(config, "enable_moe_block", False):
        raise UserError("the experts of Gemma 4 are not written to a GGUF file; export merged-16bit instead")
    full, sliding = (layers[kinds.index(kind)] for kind in (FULL, SLIDING))
    linears = graph_tensors(config).linears
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_embedding_length_per_layer_input(getattr(config, "hidden_size_per_layer_input", 0) or 0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_feed_forward_length([linears[f"model.layers.{number}.mlp.up_proj"].rows for number in range(len(kinds))])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv([layers[number].key_heads for number in range(len(kinds))])
    writer.add_shared_kv_layers(getattr(config, "num_kv_shared_layers", 0) or 0)
    writer.add_sliding_window(config.sliding_window)
    writer.add_sliding_window_pattern([kind == SLIDING for kind in kinds])
    for head, suffix in ((full.head_size, ""), (sliding.head_size, "_swa")):
        getattr(writer, f"add_key_length{suffix}")(head)
        getattr(writer, f"add_value_length{suffix}")(head)
        getattr(writer, f"add_rope_dimension_count{suffix}")(head)
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        writer.add_final_logit_softcapping(cap)
    writer.add_rope_freq_base(config.rope_parameters[FULL]["rope_theta"])
    writer.add_rope_freq_base_swa(config.rope_parameters[SLIDING]["rope_theta"])
    return {"rope_freqs.weight": full_divisors(config, full.head_size)}


def full_divisors(config: DecoderConfig, head: int) -> Tensor:
    """By what the frequencies of full layers are divided, float32 [head / 2]. Raises UserError for sliding layers that
    are scaled, and for a factor of cosines: llama.cpp has neither here."""
    (turning, factor), (sliding, sliding_factor) = (frequencies(config)[kind] for kind in (FULL, SLIDING))
    base = config.rope_parameters[SLIDING]["rope_theta"]
    plain = base ** (-torch.arange(0, 2 * len(sliding), 2, dtype=torch.float64) / (2 * len(sliding)))
    if factor != 1 or sliding_factor != 1 or not torch.allclose(plain.float(), sliding, rtol=1e-4):
        raise UserError("llama.cpp has no Gemma 4 with this rotary scaling; export merged-16bit instead")
    base = config.rope_parameters[FULL]["rope_theta"]
    plain = (base ** (-torch.arange(0, head, 2, dtype=torch.float64) / head)).float()
    divisors = torch.full((head // 2,), NEVER_TURNS)
    turns = turning > 0
    divisors[: len(turning)][turns] = plain[: len(turning)][turns] / turning[turns]
    return divisors
