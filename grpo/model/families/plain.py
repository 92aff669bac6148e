"""Decoders of the usual kind: tested, and nothing to say about most of them.

`fused_layers` is an allow-list: another family's layer may look alike and have a multiplier somewhere.
"""

from grpo.model.families.family import Family

SILU = ("hidden_act", ("silu",))

FAMILIES = {
    "llama": Family(models="Llama, SmolLM2, and what has their form", activation=SILU, fused_layers=True),
    "mistral": Family(
        models="Mistral, Mistral Small 3 from checkpoints that take images", activation=SILU, fused_layers=True
    ),
    "glm4": Family(models="GLM-4 (0414)", caveat="vLLM refuses float16"),
    "exaone4": Family(models="EXAONE 4"),
    "ernie4_5": Family(models="ERNIE 4.5, dense"),
    "stablelm": Family(models="StableLM 2"),
    "nemotron": Family(models="Nemotron-4, Minitron"),
    "seed_oss": Family(models="Seed-OSS"),
    "olmo2": Family(models="OLMo 2", caveat="vLLM runs it by its Transformers backend"),
    "olmo3": Family(models="OLMo 3"),
    "glm": Family(models="GLM-4 (9B of 2024)"),
    "arcee": Family(models="Arcee AFM"),
    "apertus": Family(models="Apertus"),
    "cwm": Family(models="CWM, the code world model"),
    "helium": Family(models="Helium 1"),
    "hunyuan_v1_dense": Family(models="Hunyuan, dense", of_rotary=frozenset({"alpha"})),
    "jais2": Family(models="Jais 2"),
    "ministral": Family(models="Ministral 8B of 2024"),
    "nanochat": Family(models="nanochat"),
    "olmo": Family(models="OLMo"),
}
