"""Phi 3 and 4, mini too: q, k and v are one module in transformers as well."""

from grpo.model.families.family import Family

FAMILIES = {
    "phi3": Family(
        models="Phi-3, Phi-4, Phi-4-mini",
        caveat="longrope: the long factors serve a run whose sequences may exceed the original length, for all of them",
        activation=("hidden_act", ("silu",)),
        fused_layers=True,
    )
}
