"""Phi 3 and 4, mini too: q, k and v are one module in transformers as well."""

from grpo.model.families.family import Family

FAMILIES = {"phi3": Family(activation=("hidden_act", ("silu",)), fused_layers=True)}
