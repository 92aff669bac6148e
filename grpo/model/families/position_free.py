"""SmolLM3: some layers know no positions. Only vLLM's Transformers backend has it."""

from grpo.model.families.family import Family

FAMILIES = {"smollm3": Family(models="SmolLM3", caveat="vLLM runs it by its Transformers backend")}
