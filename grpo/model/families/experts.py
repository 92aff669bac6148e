"""Mixtures of experts: a router sends every token to a few of many MLPs.

How a router chooses, and where a checkpoint keeps the experts, is found and not listed here; see
`grpo/model/graph_experts.py` and `grpo/model/stored_form.py`.
"""

from typing import Any

from grpo.model.decoder_config import DecoderConfig
from grpo.model.families.family import Family


def unscaled_yarn(config: DecoderConfig) -> dict[str, Any]:
    """Rotary parameters of the kind that vLLM's gpt-oss asks for, of as many positions as the model allows; its table
    is replaced by one of the training graph's."""
    parameters = config.rope_parameters
    scaling = {"rope_type": "yarn", "factor": 1.0, "beta_fast": 32.0, "beta_slow": 1.0}
    length = {"original_max_position_embeddings": config.max_position_embeddings}
    return {"rope_parameters": {"rope_theta": parameters["rope_theta"], **scaling, **length}}


FAMILIES = {
    "qwen3_moe": Family(
        models="Qwen 3 with experts: Qwen3-30B-A3B and larger",
        caveat="a sliding window in all layers or in none",
        float32_stream=True,
    ),
    "qwen3_5_moe_text": Family(
        models="Qwen 3.5 with experts: Qwen3.5-35B-A3B, from checkpoints that take images too",
        caveat="three of four layers are gated DeltaNet, computed in float32 in training",
        vllm_class="Qwen3_5MoeForCausalLM",
        activation=("hidden_act", ("silu",)),
        of_rotary=frozenset({"mrope_section", "mrope_interleaved"}),
        mixers={"linear_attention": "linear_attn", "full_attention": "self_attn"},
        norm_adds_one=True,
    ),
    "olmoe": Family(models="OLMoE", head_of_hidden_size=True, float32_stream=True),
    "granitemoe": Family(models="Granite 3 with experts: 1B-A400M, 3B-A800M", head_of_hidden_size=True),
    "granitemoeshared": Family(models="Granite with experts, one of them for all tokens", head_of_hidden_size=True),
    "granitemoe_swa": Family(models="Granite with experts, windows and sinks", sinks=True, head_of_hidden_size=True),
    "flex_olmo": Family(models="FlexOlmo"),
    "mellum": Family(models="Mellum with experts"),
    "qwen2_moe": Family(models="Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B", head_of_hidden_size=True, float32_stream=True),
    "mixtral": Family(models="Mixtral", float32_stream=True),
    "gpt_oss": Family(
        models="gpt-oss: 20B and 120B",
        caveat="MXFP4 is kept as it is; attention with sinks",
        needs_window=True,
        window_in_every_other=True,
        taken_for_granted={"rms_norm_eps": 1e-5, "attention_bias": True},
        served=unscaled_yarn,
        sinks=True,
        expert_biases=True,
        float32_stream=True,
    ),
}
