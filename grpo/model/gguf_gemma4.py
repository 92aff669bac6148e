"""transformers' configuration of Gemma 4 from a GGUF file's metadata: transformers reads none with numbers by layer.

The names are those of llama.cpp's `docs/gguf.md`; `grpo/export/gguf_gemma4.py` writes them. For tensors see
`gguf_source.py`.
"""

from __future__ import annotations

from typing import Any

import torch

from grpo.errors import UserError
from grpo.model.attention_layers import FULL, SLIDING
from grpo.model.decoder_config import DecoderConfig

ARCHITECTURE = "gemma4"
"""llama.cpp's name of it."""


def gemma4_config(reader: Any, where: str) -> DecoderConfig:
    """What the file of `reader` (gguf's) says of its decoder. Raises UserError, naming `where`, for what it lacks and
    for what transformers has not."""
    from transformers import AutoConfig

    def known(key: str, default: Any = None) -> Any:
        field = reader.get_field(f"{ARCHITECTURE}.{key}")
        value = default if field is None else field.contents()
        if value is None:
            raise UserError(f"{where}: the GGUF file has no {ARCHITECTURE}.{key}; convert the model again")
        return value

    if known("expert_count", 0):
        raise UserError(f"{where}: the experts of Gemma 4 are not trained here; use a size without them")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    count = known("block_count")
    kinds = [SLIDING if slides else FULL for slides in known("attention.sliding_window_pattern")][:count]
    if len(kinds) != count or set(kinds) != {FULL, SLIDING}:
        raise UserError(f"{where}: attention.sliding_window_pattern is not of {count} layers of both kinds")
    heads, widths = by_layer(known("attention.head_count_kv"), count), by_layer(known("feed_forward_length"), count)
    full = kinds.index(FULL)
    rows = int(tensors["token_embd.weight"].shape[-1])
    values = {
        "vocab_size": rows,
        "hidden_size": known("embedding_length"),
        "intermediate_size": min(widths),
        "use_double_wide_mlp": max(widths) > min(widths),
        "num_hidden_layers": count,
        "num_attention_heads": known("attention.head_count"),
        "num_key_value_heads": heads[kinds.index(SLIDING)],
        "num_global_key_value_heads": heads[full],
        "attention_k_eq_v": f"blk.{full}.attn_v.weight" not in tensors,
        "head_dim": known("attention.key_length_swa"),
        "global_head_dim": known("attention.key_length"),
        "num_kv_shared_layers": known("attention.shared_kv_layers", 0),
        "hidden_size_per_layer_input": known("embedding_length_per_layer_input", 0),
        "vocab_size_per_layer_input": rows,
        "layer_types": kinds,
        "sliding_window": known("attention.sliding_window"),
        "max_position_embeddings": known("context_length"),
        "rms_norm_eps": known("attention.layer_norm_rms_epsilon"),
        "final_logit_softcapping": known("final_logit_softcapping", 0.0) or None,
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_parameters": {
            SLIDING: {"rope_type": "default", "rope_theta": known("rope.freq_base_swa", 10000.0)},
            FULL: {
                "rope_type": "proportional",
                "rope_theta": known("rope.freq_base"),
                "partial_rotary_factor": part_turned(tensors, where),
            },
        },
    }
    for token in ("bos", "eos", "pad"):
        field = reader.get_field(f"tokenizer.ggml.{'padding' if token == 'pad' else token}_token_id")
        values[f"{token}_token_id"] = None if field is None else field.contents()
    return AutoConfig.for_model("gemma4_text", **values)


def by_layer(value: int | list[int], count: int) -> list[int]:
    """A number of each layer, of what may be one for all."""
    return [value] * count if isinstance(value, int) else list(value)


def part_turned(tensors: dict[str, Any], where: str) -> float:
    """The share of a head's frequencies that turn. Raises UserError where `rope_freqs` does something else."""
    if "rope_freqs.weight" not in tensors:
        return 1.0
    divisors = torch.tensor(tensors["rope_freqs.weight"].data.tolist())
    turned = int(torch.isclose(divisors, torch.ones(()), rtol=1e-3).sum())
    if not bool((divisors[:turned] < 2).all()) or not bool((divisors[turned:] > 1e20).all()):
        raise UserError(f"{where}: rotary frequencies (rope_freqs.weight) are scaled in a way that is not Gemma 4's")
    return turned / len(divisors)
