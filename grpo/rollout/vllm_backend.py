"""Which class vLLM builds a model of: ours for families whose own one it cannot load or serve here, or its own.

A class is imported here and registered as what it is. One that vLLM knows by its name alone it would first import in a
process of its own, to ask it what it can do: a second import of everything, the first time on a machine.

Families that vLLM has no class for run by its Transformers backend. That rewrites transformers' class of the decoder so
that torch.compile can take it, in place: the training graph is of the same class and would run the rewritten form.
Nothing is compiled here, so the rewriting is left out.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from vllm import ModelRegistry
from vllm.config.model_arch import ModelArchitectureConfig

from grpo.model.attention_layers import FULL
from grpo.model.decoder_config import DecoderConfig

OURS = {
    "Qwen3_5ForCausalLM": ("grpo.rollout.vllm_qwen3_5", "Qwen3_5Text"),
    "Qwen3_5MoeForCausalLM": ("grpo.rollout.vllm_qwen3_5", "Qwen3_5Text"),
    "Lfm2ForCausalLM": ("grpo.rollout.vllm_lfm2", "Lfm2"),
}
"""vLLM's name of a class -> (module, class) in its place."""


def prepare_class(architecture: str) -> None:
    """Prepare for a model that vLLM knows as `architecture`, before it is built."""
    if architecture in OURS:
        module, name = OURS[architecture]
        ModelRegistry.register_model(architecture, getattr(import_module(module), name))
        return
    known = ModelRegistry.models.get(architecture)
    if known is not None and not by_transformers(known):
        register_imported(architecture)
        return
    from vllm.model_executor.models.transformers.base import Base

    for name in ("_decorate_for_torch_compile", "_decorate_cls_for_torch_compile"):
        if hasattr(Base, name):
            setattr(Base, name, nothing)
    for name in [name for name, model in ModelRegistry.models.items() if by_transformers(model)]:
        register_imported(name)


def by_transformers(model: Any) -> bool:
    """Whether `model`, an entry of vLLM's registry, is its Transformers backend."""
    return getattr(model, "module_name", "").endswith(".transformers")


def register_imported(architecture: str) -> None:
    """Import the class that vLLM knows as `architecture`, unless that is done."""
    known = ModelRegistry.models[architecture]
    if hasattr(known, "module_name"):
        ModelRegistry.register_model(architecture, known.load_model_cls())


def attributes(config: DecoderConfig) -> dict[str, Any]:
    """What vLLM's configuration gets beside its file (`hf_overrides`): a vLLM that does not ask transformers for the
    sizes of each layer knows those of full layers by names of their own."""
    if not getattr(config, "is_heterogeneous", False) or hasattr(ModelArchitectureConfig, "__getitem__"):
        return {}
    full = config.per_layer_config[FULL]
    return {
        "allow_global_per_layer_attribute_access": True,
        "global_head_dim": full.head_dim,
        "num_global_key_value_heads": full.num_key_value_heads,
    }


def nothing(self: Any, *args: Any, **kwargs: Any) -> None:
    """In the place of what rewrites."""
