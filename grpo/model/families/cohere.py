"""Command: attention and MLP side by side, norms that subtract the mean, logits times a factor.

vLLM since some version gives the windows of the second generation a token more than transformers does; here they are
those of transformers in both graphs (`grpo/rollout/vllm_model.py`).
"""

from grpo.model.families.family import Family

WINDOWS = "windows are of as many tokens as its configuration says"

FAMILIES = {
    "cohere": Family(models="Command R, Aya"),
    "cohere2": Family(models="Command R7B, Command A", caveat=WINDOWS),
    "cohere2_moe": Family(models="Command with experts", caveat=WINDOWS),
}
