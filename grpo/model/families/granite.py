"""Granite's dense models: multipliers on embedding, residuals, attention and logits, all read by both graphs."""

from grpo.model.families.family import Family

FAMILIES = {"granite": Family(models="Granite 3 and 4, dense")}
