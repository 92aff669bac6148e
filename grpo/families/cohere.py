"""Command R and R7B: attention and MLP side by side, norms that subtract the mean, logits times a factor."""

from grpo.families import Family

FAMILIES = {"cohere": Family(), "cohere2": Family()}
