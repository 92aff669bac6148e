"""Ministral 3: Mistral's decoder whose queries grow with their position.

vLLM serves it by Mistral's class, which reads the growth from an entry that a checkpoint in Hugging Face's form has
not: without it the growth is left out, in silence, beyond the original length.
"""

from typing import Any

from grpo.model.decoder_config import DecoderConfig
from grpo.model.families.family import Family


def growth(config: DecoderConfig) -> dict[str, Any]:
    """The growth of queries as vLLM reads it."""
    parameters = config.rope_parameters
    beta, length = parameters.get("llama_4_scaling_beta"), parameters.get("original_max_position_embeddings")
    return {"llama_4_scaling": {"beta": beta, "original_max_position_embeddings": length}} if beta else {}


FAMILIES = {
    "ministral3": Family(
        models="Ministral 3, from checkpoints that take images too",
        served=growth,
        of_rotary=frozenset({"llama_4_scaling_beta"}),
    )
}
