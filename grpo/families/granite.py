"""Granite's dense models: multipliers on embedding, residuals, attention and logits, all read by both graphs."""

from grpo.families import Family

FAMILIES = {"granite": Family()}
