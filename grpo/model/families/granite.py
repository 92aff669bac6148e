"""Granite's dense models: multipliers on embedding, residuals, attention and logits, all read by both graphs.

HyperCLOVA X is of their form, and multiplies its logits by what Granite divides them by.
"""

from grpo.model.families.family import Family

FAMILIES = {
    "granite": Family(models="Granite 3 and 4, dense"),
    "granite_swa": Family(
        models="Granite with windows and sinks, dense",
        caveat="rotary positions of one base, or none, in each layer",
        sinks=True,
    ),
    "hyperclovax": Family(models="HyperCLOVA X SEED", multiplies_logits=frozenset({"logits_scaling"})),
}
