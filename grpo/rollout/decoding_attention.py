"""Decoding steps' attention by our kernel in vLLM's layers, where it serves them. For vllm_model.py alone.

A layer on FlashAttention keeps it for prompts and for what the kernel does not take: few sequences, sliding windows,
sinks, an fp8 cache. In layers that apply nothing between rotation and attention, rotation and the cache's new entries
are left to the kernel as well, so that a decoding step has one launch there in the place of four.

What is decided for a step is decided from its metadata alone, so that the three places that ask (rotation, cache,
attention) agree, and a CUDA graph is captured with what it is replayed for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

from grpo.kernels.decode_attention import LEAST_PROGRAMS, Cache, NewToken, decode_attention, fits, serves

ROTATE_LAST = ("LlamaAttention", "Qwen2Attention", "Qwen3Attention")
"""vLLM's modules that apply nothing to queries and keys after they are rotated."""


class DecodingImpl(FlashAttentionImpl):
    """FlashAttention, and our kernel for decoding steps of many sequences. An existing layer's object is made one."""

    attention: Any
    """vLLM's layer, which has the cache."""
    cos_sin: Tensor | None = None
    """The rotary table [positions, head size] of a layer whose rotation is done here."""

    def decodes(self, metadata: Any) -> bool:
        """Whether the step that `metadata` describes is one for the kernel."""
        if metadata is None or metadata.max_query_len != 1 or metadata.use_cascade or metadata.causal is not True:
            return False
        if in_pieces():
            return False
        sequences = metadata.num_actual_tokens
        if sequences * self.num_kv_heads < LEAST_PROGRAMS or sequences > len(metadata.seq_lens):
            return False
        longest = metadata.block_table.shape[1] * self.attention.kv_cache.shape[2]
        return fits(sequences, self.num_heads, self.num_kv_heads, self.head_size, longest)

    def forward(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, attn_metadata: Any,
        output: Tensor, *arguments: Any, **options: Any,
    ) -> Tensor:  # fmt: skip
        if not self.decodes(attn_metadata):
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *arguments, **options)
        count = attn_metadata.num_actual_tokens
        keys, values = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        cache = Cache(keys, values, attn_metadata.block_table, attn_metadata.seq_lens)
        new = None if self.cos_sin is None else NewToken(key[:count], value[:count], self.cos_sin)
        decode_attention(query[:count], cache, self.scale, output[:count], new)
        return output

    def do_kv_cache_update(self, layer: nn.Module, *arguments: Any) -> None:
        if self.cos_sin is None or not self.decodes(metadata_of(layer.layer_name)):
            super().do_kv_cache_update(layer, *arguments)


class LateRotary(nn.Module):
    """A layer's rotary module, left out in steps in which the layer's attention rotates."""

    def __init__(self, rotary: nn.Module, layer_name: str, impl: DecodingImpl):
        super().__init__()
        self.rotary, self.layer_name, self.impl = rotary, layer_name, impl

    def forward(self, positions: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        if self.impl.decodes(metadata_of(self.layer_name)):
            return query, key
        return self.rotary(positions, query, key)


def metadata_of(layer_name: str) -> Any:
    """Of the step that runs, for one layer; None while vLLM measures memory."""
    metadata = get_forward_context().attn_metadata
    return metadata.get(layer_name) if isinstance(metadata, dict) else None


def in_pieces() -> bool:
    """Whether the step is pieces of CUDA graphs between layers' attention: rotation was captured in them."""
    return is_forward_context_available() and get_forward_context().cudagraph_runtime_mode == CUDAGraphMode.PIECEWISE


def serve_decoding(model: nn.Module, dtype: torch.dtype) -> int:
    """Give the kernel to the layers of `model`, vLLM's, that it serves; how many these are."""
    served: dict[nn.Module, Any] = {}
    for module in list(model.modules()):
        impl: Any = getattr(module, "impl", None)
        if type(impl) is FlashAttentionImpl and plain(impl, dtype):
            impl.__class__ = DecodingImpl
            impl.attention = module
            served[module] = impl
    for module in list(model.modules()):
        inner: Any = getattr(module, "attn", None)
        if inner in served and type(module).__name__ in ROTATE_LAST and rotates_plainly(module.rotary_emb, inner):
            served[inner].cos_sin = module.rotary_emb.cos_sin_cache
            module.rotary_emb = LateRotary(module.rotary_emb, inner.layer_name, served[inner])
    return len(served)


def plain(impl: FlashAttentionImpl, dtype: torch.dtype) -> bool:
    """Whether a layer asks for nothing that the kernel has not."""
    return (
        serves(impl.num_heads, impl.num_kv_heads, impl.head_size, dtype, dtype)
        and impl.attn_type == "decoder"
        and impl.kv_cache_dtype in ("auto", str(dtype).removeprefix("torch."))
        and impl.kv_sharing_target_layer_name is None
        and impl.alibi_slopes is None
        and impl.sinks is None
        and not impl.logits_soft_cap
        and tuple(impl.sliding_window) == (-1, -1)
        and impl.dcp_world_size == 1
    )


def rotates_plainly(rotary: nn.Module, attention: nn.Module) -> bool:
    """Whether `rotary` turns whole heads by halves, by a row of its table for each position."""
    return (
        isinstance(rotary, RotaryEmbedding)
        and type(rotary).forward_cuda is RotaryEmbedding.forward_cuda
        and rotary.is_neox_style
        and rotary.cos_sin_cache.shape[1] == rotary.head_size == attention.head_size
        and rotary.cos_sin_cache.is_contiguous()
    )
