"""Mixtures of experts: a router sends every token to a few of many MLPs.

How a router chooses, and where a checkpoint keeps the experts, is found and not listed here; see
`grpo/model/graph_experts.py` and `grpo/model/stored_form.py`.
"""

from grpo.model.families.family import Family

FAMILIES = {
    "qwen3_moe": Family(
        models="Qwen 3 with experts: Qwen3-30B-A3B and larger", caveat="a sliding window in all layers or in none"
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
    "olmoe": Family(models="OLMoE"),
    "granitemoe": Family(models="Granite 3 with experts: 1B-A400M, 3B-A800M"),
    "mixtral": Family(models="Mixtral"),
}
