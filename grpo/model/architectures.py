"""Which models can be trained: decoders of text that both vLLM and transformers build, and what adapters act on.

Whether the two agree is not written here: the gate at the start compares them (`grpo/training/self_check.py`). What is
refused here, before anything is read, is what cannot work whatever the gate would say.
"""

from __future__ import annotations

from grpo.config.schema import SEVEN_PROJECTIONS
from grpo.errors import UserError
from grpo.model.decoder_config import DecoderConfig
from grpo.model.families.table import family_of
from grpo.model.layout import fused_linears

MIXTURE = ("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok")
"""Entries of configurations that give away a mixture of experts."""
ALL_LINEAR = "all-linear"
"""peft's word, in any case, for every linear layer but the output head."""
FUSED_NAMES = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Modules that some families have in place of several, which people name all the same."""


def causal_class(model_type: str) -> str | None:
    """transformers' name of the family's causal LM; None where it has none."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    return CLASSES.get(family_of(model_type).text_as or model_type)


def fills_in(model_type: str) -> bool:
    """Whether models of the family fill in masked tokens: some of them can be made decoders too."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as ENCODERS

    return model_type in ENCODERS


def vllm_class(model_type: str) -> str:
    """vLLM's name of the class that serves the family."""
    return family_of(model_type).vllm_class or causal_class(model_type) or model_type


def check_supported(config: DecoderConfig, where: str) -> None:
    """Raise UserError unless `config`, transformers' of a text model, is of a decoder that both graphs can build."""
    reason = unsuited(config)
    if reason:
        raise UserError(f"{where}: architecture {config.model_type!r} is not supported: {reason}")


def unsuited(config: DecoderConfig) -> str | None:
    """Why models of this configuration cannot be trained, and what to do; None for what the gate decides."""
    other = "use a decoder of text"
    if getattr(config, "is_encoder_decoder", False):
        return f"it has an encoder beside its decoder; {other}"
    if fills_in(config.model_type) and not getattr(config, "is_decoder", False):
        if causal_class(config.model_type) is None:
            return f"it is an encoder, as embedding models are, and predicts no next token; {other}"
        unless = "unless config.json says is_decoder = true"
        return f"its models are encoders, which fill in masked tokens and predict no next one, {unless}; {other}"
    if family_of(config.model_type).unserved:
        return family_of(config.model_type).unserved
    if causal_class(config.model_type) is None:
        return f"transformers has no causal language model of it, so it predicts no next token; {other}"
    if not getattr(config, "num_attention_heads", None):
        return f"its configuration has no num_attention_heads, so its layers are no attention; {other} that has it"
    if getattr(config, "kv_lora_rank", None):
        return f"its attention keeps keys and values in latent form (MLA); {other} with plain attention"
    if any((getattr(config, key, None) or 0) > 1 for key in MIXTURE):
        return unsuited_experts(config)
    return None


def unsuited_experts(config: DecoderConfig) -> str | None:
    """Why a mixture of experts cannot be trained; None for one whose experts and router are those computed here."""
    from grpo.model.meta_graph import graph_tensors

    try:
        found = graph_tensors(config).experts
    except UserError as error:
        return str(error)
    if not found:
        return "it is a mixture of experts that transformers does not keep as stacked matrices; use another model"
    return None


def adapter_targets(config: DecoderConfig, target_modules: list[str] | str) -> list[str] | str:
    """`target_modules` in the family's own names: where q, k, v (gate, up) are one module, naming any names it.

    The seven names of a usual decoder, which are the default, stand for all linear layers, whatever a family has, and
    so does "all-linear"; any other text is a pattern and stays as it is. config: a plan's Shape or transformers'.
    Raises UserError for a name of a list that names no linear layer of the model.
    """
    parts = [part for group in fused_linears(config).values() for part in group]
    leaves = dict.fromkeys(part.rpartition(".")[2] for part in parts)
    if isinstance(target_modules, str):
        return list(leaves) if target_modules.lower() == ALL_LINEAR else target_modules
    if set(target_modules) == set(SEVEN_PROJECTIONS):
        return list(leaves)
    family_names = [own_name(name, list(leaves)) for name in target_modules]
    for name, meant in zip(family_names, target_modules, strict=True):
        if {"visual", "vision_tower", "vision_model"} & set(meant.split(".")):
            raise UserError(
                f"lora.target_modules names {meant!r}, which is in the vision tower: it is frozen, and vLLM has none; "
                "name linear layers of the language model alone"
            )
        if not any(part == name or part.endswith(f".{name}") for part in parts):
            raise UserError(
                f"lora.target_modules names {meant!r}, which is no linear layer of this model; name some of "
                f"{', '.join(leaves)}"
            )
    return list(dict.fromkeys(family_names))


def own_name(name: str, leaves: list[str]) -> str:
    """What `name` is called in a model whose linear layers have the names `leaves`."""
    if name in leaves:
        return name
    return next((fused for fused, parts in FUSED_NAMES.items() if name in parts and fused in leaves), name)
