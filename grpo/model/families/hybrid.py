"""Decoders of which only some layers are attention: a state of fixed size goes from token to token in the others.

`grpo/policy/recurrent.py` computes those layers over packed rows, and an adapter is on all linear layers by default:
the seven names of a usual decoder would leave most layers of these without one.
"""

from typing import Any

from grpo.model.decoder_config import DecoderConfig
from grpo.model.families.family import Family


def widths(config: DecoderConfig) -> dict[str, Any]:
    """Of convolutions and MLP, which vLLM reads from entries that transformers does not know."""
    return {"conv_dim": config.hidden_size, "block_dim": config.hidden_size}


FAMILIES = {
    "qwen3_5_text": Family(
        models="Qwen 3.5, 3.6 and 3.8, dense, from checkpoints that take images too",
        caveat="three of four layers are gated DeltaNet, whose sums are in float32 in training",
        vllm_class="Qwen3_5ForCausalLM",
        activation=("hidden_act", ("silu",)),
        of_rotary=frozenset({"mrope_section", "mrope_interleaved"}),
        mixers={"linear_attention": "linear_attn", "full_attention": "self_attn"},
        norm_adds_one=True,
        sees="interleaved",
    ),
    "lfm2": Family(
        models="LFM2, LFM2.5, dense",
        caveat="most layers are short convolutions",
        head_of_hidden_size=True,
        served=widths,
        mixers={"conv": "conv", "full_attention": "self_attn"},
    ),
}
