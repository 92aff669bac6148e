"""transformers' model as the training graph's frame: built without weights, with our attention in it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM

from grpo.config.schema import Lora
from grpo.errors import UserError
from grpo.kernels.attention import Packing, packed_attention
from grpo.model.architectures import adapter_targets
from grpo.model.base_weights import BaseWeights
from grpo.model.decoder_config import DecoderConfig
from grpo.model.rope import Rotary
from grpo.policy.experts import install_experts
from grpo.policy.float32_stream import has_float32_stream, install_float32_stream
from grpo.policy.gated_attention import install_gated_attention
from grpo.policy.lora_linear import BaseLinear, LoraLinear
from grpo.policy.packing import packing_of, remember_packing
from grpo.policy.recurrent import install_recurrent_layers

ATTENTION = "grpo_packed"


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    packing: Packing | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface over `packed_attention`. query, key, value [1, heads, tokens, dim]; s_aux
    [heads]: transformers' name of attention sinks."""
    assert attention_mask is None and query.shape[0] == 1, "sequences come packed in one row, without a mask"
    output = packed_attention(
        query[0], key[0], value[0], packing_of(packing, query[:, 0]),
        scale=scaling, window=sliding_window, softcap=softcap, sinks=s_aux,
    )  # fmt: skip
    return output[None], None


AttentionInterface.register(ATTENTION, attend)


def peft_config(base: BaseWeights, lora: Lora, base_name: str) -> LoraConfig:
    """`[lora]` as peft's configuration, with our layer registered for the shared weights."""
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        target_modules=adapter_targets(base.config, lora.target_modules),
        exclude_modules=lora.exclude_modules or None,
        layers_to_transform=lora.layers_to_transform or None,
        layers_pattern=lora.layers_pattern or None,
        rank_pattern=lora.rank_pattern,
        alpha_pattern=lora.alpha_pattern,
        lora_dropout=lora.lora_dropout,
        use_rslora=lora.use_rslora,
        bias=lora.bias,
        # What takes a part of the base is put there by `Policy`: peft would decompose the base that has lost it.
        init_lora_weights=lora.init_lora_weights if lora.init_lora_weights == "gaussian" else True,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name,
    )
    config._register_custom_module({BaseLinear: LoraLinear})
    return config


def build_graph(base: BaseWeights) -> nn.Module:
    """transformers' causal LM with every weight a view of `base`."""
    config = copy.deepcopy(base.config)
    with torch.device("meta"):
        graph = AutoModelForCausalLM.from_config(config, dtype=base.dtype, attn_implementation=ATTENTION)
    for linear in base.linears.values():
        for part in linear.parts:
            set_module(graph, part, BaseLinear(*linear.part(part)))
    if base.experts:
        install_experts(graph, base.experts)
        # By this peft knows whose older adapters named experts one by one, and moves targets of that name to them.
        graph.config.model_type = f"{config.model_type} with routed experts"
    for name, tensor in base.tensors.items():
        # Embedding and head have rows that only vLLM's vocabulary has.
        set_tensor(graph, name, tensor[: base.layout.shapes[name][0]] if tensor.ndim else tensor)
    for layer in graph.model.layers:
        layer.register_forward_pre_hook(remember_packing, with_kwargs=True)
    install_recurrent_layers(graph, base.config.model_type)
    install_gated_attention(graph, base.config.model_type)
    graph.tie_weights()
    rebuild_buffers(graph, config, base.device, base.dtype)
    if has_float32_stream(base):
        install_float32_stream(graph)
    left = [name for name, tensor in [*graph.named_parameters(), *graph.named_buffers()] if tensor.is_meta]
    if left:
        raise UserError(f"{base.source_path}: tensor {left[0]} is missing; pass a complete model")
    return graph.requires_grad_(False)


def rebuild_buffers(
    graph: nn.Module, config: DecoderConfig, device: torch.device, dtype: torch.dtype, longest: int | None = None
) -> None:
    """Compute what a checkpoint has not: rotary frequencies, for `longest` tokens, and scales of Gemma's embeddings."""
    for name, module in list(graph.named_modules()):
        if not any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            continue
        if "rotary" in name:
            set_module(graph, name, Rotary(config, longest, device))
        elif hasattr(module, "embed_scale"):
            scale = getattr(module, "scalar_embed_scale", config.hidden_size**0.5)
            module.embed_scale = torch.tensor(scale, dtype=dtype, device=device)


def set_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` at the dotted `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)


def set_tensor(root: nn.Module, name: str, tensor: Tensor) -> None:
    """Make `tensor` the frozen parameter, or the buffer, at the dotted `name`."""
    parent, _, leaf = name.rpartition(".")
    owner = root.get_submodule(parent)
    if leaf in owner._buffers:
        owner._buffers[leaf] = tensor
    else:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
