"""The decoder of text of Qwen 3.5, dense and with experts, for vLLM, put together from vLLM's own layers.

vLLM's class of the whole model imports its image processing, which needs torchvision, and in older versions does not
tell the engine of its recurrent state, so that it would be served without one. States and their bookkeeping are
vLLM's. The recurrence is computed by `vllm_delta_rule.py`, and on a CPU, where vLLM has it in bfloat16 alone, by
`vllm_recurrence_cpu.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import GemmaRMSNorm
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn import QwenGatedDeltaNetAttention
from vllm.model_executor.layers.mamba.mamba_utils import (
    MambaStateCopyFuncCalculator,
    MambaStateDtypeCalculator,
    MambaStateShapeCalculator,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid
from vllm.model_executor.models.qwen2_moe import Qwen2MoeMLP
from vllm.model_executor.models.qwen3_next import Qwen3NextAttention, Qwen3NextSparseMoeBlock
from vllm.platforms import current_platform

from grpo.kernels import residual_norm, rms_norm
from grpo.rollout import vllm_delta_rule, vllm_recurrence_cpu
from grpo.rollout.vllm_delta_tiles import settle_tiles

STACKED: dict[str, tuple[str, Any]] = {
    "q_proj": ("qkv_proj", "q"),
    "k_proj": ("qkv_proj", "k"),
    "v_proj": ("qkv_proj", "v"),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "in_proj_qkv": ("in_proj_qkvz", (0, 1, 2)),
    "in_proj_z": ("in_proj_qkvz", 3),
    "in_proj_b": ("in_proj_ba", 0),
    "in_proj_a": ("in_proj_ba", 1),
}
"""A checkpoint's module -> (vLLM's, which part of it)."""


EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
"""A checkpoint's matrix of one expert: the experts' module, the expert's number, which of its matrices."""


def load_expert(parameters: dict[str, nn.Parameter], tensor: Tensor, expert: re.Match[str]) -> str:
    """Copy the matrix of one expert to its place among vLLM's; returns the name of the parameter that has it."""
    module, number, kind = expert.groups()
    name = f"{module}.routed_experts.{'w2' if kind == 'down' else 'w13'}_weight"
    matrix = parameters[name].data[int(number)]
    rows = {"gate": slice(0, len(tensor)), "up": slice(len(tensor), None), "down": slice(None)}[kind]
    matrix[rows].copy_(tensor)
    return name


class KeptWeight(UnquantizedLinearMethod):
    """Of a convolution whose weight stays as it is: for its own operator on a CPU vLLM would put another in its place,
    in another order."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Nothing."""


class Norm(GemmaRMSNorm):
    """RMSNorm by its weight plus one. The residual is float32 whatever is computed in, as training has it: rounded
    behind every layer, it is the largest part of what two graphs in 16 bit differ by.

    vLLM's is ten operations of torch where nothing is compiled.
    """

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """x [..., hidden]; the normed, and where there is a residual [tokens, hidden] the new one. Both may be where
        they were given."""
        norm = rms_norm.Norm(self.weight, self.variance_epsilon, unit_offset=True)
        if residual is None:
            return norm.forward(x)
        if x.element_size() == 2:
            stream = residual_norm.add_to_stream(x, residual, self.weight, self.variance_epsilon, unit_offset=True)
            return x, stream
        residual = residual + x
        return norm.forward(residual), residual


class GatedDeltaNet(QwenGatedDeltaNetAttention):
    """vLLM's layer, computed by kernels of ours where they serve, and on a CPU in any precision."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.conv1d.quant_method = KeptWeight()
        if not current_platform.is_cpu():
            settle_tiles()

    def forward(self, hidden_states: Tensor) -> Tensor:
        if current_platform.is_cpu():
            return vllm_recurrence_cpu.delta_net(self, hidden_states)
        if vllm_delta_rule.serves(self, hidden_states):
            return vllm_delta_rule.delta_net(self, hidden_states)
        return super().forward(hidden_states)


class DecoderLayer(nn.Module):
    """Attention or gated DeltaNet, and an MLP."""

    def __init__(self, vllm_config: VllmConfig, number: int, prefix: str):
        super().__init__()
        config = vllm_config.model_config.hf_text_config
        if config.layer_types[number] == "linear_attention":
            self.linear_attn = GatedDeltaNet(config, vllm_config=vllm_config, prefix=f"{prefix}.linear_attn")
        else:
            self.self_attn = Qwen3NextAttention(
                config, vllm_config.model_config, vllm_config.cache_config, vllm_config.quant_config,
                prefix=f"{prefix}.self_attn",
            )  # fmt: skip
            # vLLM's kernel for norm and rotation rounds once where training rounds four times.
            self.self_attn.use_fused_qk_norm_rope_gate = False
            for name in ("q_norm", "k_norm"):
                setattr(self.self_attn, name, Norm(config.head_dim, eps=config.rms_norm_eps))
        if getattr(config, "num_experts", 0):
            self.mlp: nn.Module = Qwen3NextSparseMoeBlock(vllm_config, prefix=f"{prefix}.mlp")
        else:
            self.mlp = Qwen2MoeMLP(
                config.hidden_size, config.intermediate_size, config.hidden_act, vllm_config.quant_config,
                prefix=f"{prefix}.mlp",
            )  # fmt: skip
        self.input_layernorm = Norm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Norm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, residual: Tensor | None, positions: Tensor) -> tuple[Tensor, Tensor]:
        """x and residual [tokens, hidden]; what is to be added to the residual, and that."""
        if residual is None:
            residual, x = x, self.input_layernorm(x)
        else:
            x, residual = self.input_layernorm(x, residual)
        if hasattr(self, "linear_attn"):
            x = self.linear_attn(hidden_states=x)
        else:
            x = self.self_attn(hidden_states=x, positions=positions)
        x, residual = self.post_attention_layernorm(x, residual)
        return self.mlp(x), residual


class Decoder(nn.Module):
    """The layers between embedding and output head."""

    def __init__(self, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        config = vllm_config.model_config.hf_text_config
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(vllm_config, number, f"{prefix}.layers.{number}") for number in range(config.num_hidden_layers)
        )
        self.norm = Norm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, input_ids: Tensor | None, positions: Tensor, inputs_embeds: Tensor | None = None) -> Tensor:
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        residual = None
        for layer in self.layers:
            x, residual = layer(x, residual, positions)
        return self.norm(x, residual)[0]


class Qwen3_5Text(nn.Module, HasInnerState, IsHybrid):
    """The causal LM, as vLLM's engine asks for one with attention and states."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config = vllm_config.model_config.hf_text_config
        self.config = config
        self.model = Decoder(vllm_config, f"{prefix}.model".lstrip("."))
        if config.tie_word_embeddings:
            self.lm_head: nn.Module = self.model.embed_tokens
        else:
            self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, prefix="lm_head")
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        return self.model(input_ids, positions, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Copy each of a checkpoint's tensors where it belongs: what the trace of the layout watches."""
        parameters, loaded = dict(self.named_parameters()), set()
        for name, tensor in weights:
            if expert := EXPERT.fullmatch(name):
                loaded.add(load_expert(parameters, tensor, expert))
                continue
            module, _, kind = name.rpartition(".")
            owner, _, leaf = module.rpartition(".")
            fused, part = STACKED.get(leaf, (leaf, None))
            target = f"{owner}.{fused}.{kind}" if owner else name
            parameter = parameters[target]
            load = getattr(parameter, "weight_loader", None)
            if part is not None:
                parameter.weight_loader(parameter, tensor, part)
            elif load is not None:
                load(parameter, tensor)
            else:
                parameter.data.copy_(tensor)
            loaded.add(target)
        return loaded

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        cache = vllm_config.cache_config
        return MambaStateDtypeCalculator.gated_delta_net_state_dtype(
            vllm_config.model_config.dtype, cache.mamba_cache_dtype, cache.mamba_ssm_cache_dtype
        )

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        config = vllm_config.model_config.hf_text_config
        return MambaStateShapeCalculator.gated_delta_net_state_shape(
            vllm_config.parallel_config.tensor_parallel_size,
            config.linear_num_key_heads,
            config.linear_num_value_heads,
            config.linear_key_head_dim,
            config.linear_value_head_dim,
            config.linear_conv_kernel_dim,
            0,
        )

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[Any, ...]:
        return MambaStateCopyFuncCalculator.gated_delta_net_state_copy_func()
