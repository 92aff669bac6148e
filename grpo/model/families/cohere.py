"""Command R: attention and MLP side by side, norms that subtract the mean, logits times a factor.

Not R7B (cohere2): vLLM since some version gives its windows a token more than transformers does, "to match the training
convention"; where they differ the start-up gate refuses it.
"""

from grpo.model.families.family import Family

FAMILIES = {"cohere": Family(models="Command R, Aya")}
