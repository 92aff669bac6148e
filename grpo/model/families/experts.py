"""Mixtures of experts: a router sends every token to a few of many MLPs.

How a router chooses, and where a checkpoint keeps the experts, is found and not listed here; see
`grpo/model/graph_experts.py` and `grpo/model/stored_form.py`.
"""

from grpo.model.families.family import Family

FAMILIES = {
    "qwen3_moe": Family(
        models="Qwen 3 with experts: Qwen3-30B-A3B and larger", caveat="a sliding window in all layers or in none"
    ),
    "olmoe": Family(models="OLMoE"),
    "granitemoe": Family(models="Granite 3 with experts: 1B-A400M, 3B-A800M"),
    "mixtral": Family(models="Mixtral"),
}
