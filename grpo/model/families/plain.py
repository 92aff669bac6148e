"""Decoders of the usual kind: tested, and nothing to say about most of them.

`fused_layers` is an allow-list: another family's layer may look alike and have a multiplier somewhere.
"""

from grpo.model.families.family import Family

SILU = ("hidden_act", ("silu",))

FAMILIES = {
    "llama": Family(activation=SILU, fused_layers=True),
    "mistral": Family(activation=SILU, fused_layers=True),
    "glm4": Family(),
    "exaone4": Family(),
    "ernie4_5": Family(),
    "stablelm": Family(),
    "nemotron": Family(),
    "seed_oss": Family(),
    "olmo2": Family(),
    "olmo3": Family(),
    "glm": Family(),
    "arcee": Family(),
}
