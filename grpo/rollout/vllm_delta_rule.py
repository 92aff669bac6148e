"""Gated DeltaNet while sampling on a GPU, by kernels of ours, with vLLM's pages and bookkeeping.

vLLM's own round where training does not: products of the convolution's taps, queries and keys after they are divided by
their lengths, beta of single tokens, states at the ends of a prompt's chunks. A sequence's state carries all of it on.
And a token of theirs is eight launches where ours is one, and there is nothing to tune at the first start of a machine.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first

from grpo.kernels import delta_rule, delta_step
from grpo.kernels.gated_delta import EPS
from grpo.kernels.gated_norm import gated_norm_forward
from grpo.kernels.recurrence import CHUNK, Order, Run


def serves(layer: Any, x: Tensor) -> bool:
    """Whether `delta_net` computes vLLM's `layer` of x [tokens, hidden]."""
    return (
        delta_rule.serves_on(x.device, x.dtype, (layer.head_k_dim, layer.head_v_dim))
        and layer.norm.activation in ("silu", "swish")
        and layer.activation == "silu"
        and layer.conv1d.bias is None
    )


def delta_net(layer: Any, x: Tensor) -> Tensor:
    """vLLM's `layer` of x [tokens, hidden]."""
    qkvz, ba = layer.in_proj_qkvz(x)[0], layer.in_proj_ba(x)[0]
    qkv, gate = qkvz.split([2 * layer.key_dim + layer.value_dim, layer.value_dim], dim=-1)
    out = torch.empty(len(x), layer.value_dim, dtype=x.dtype, device=x.device)
    metadata = get_forward_context().attn_metadata
    done = 0
    if metadata is not None:
        sequences = metadata[layer.prefix]
        if sequences.spec_sequence_masks is not None:
            raise RuntimeError("gated DeltaNet has no kernel for speculative decoding")
        done, decodes = sequences.num_actual_tokens, sequences.num_decodes
        if decodes:
            now = slice(decodes if sequences.num_prefills else done)
            tokens(layer, sequences.non_spec_state_indices_tensor[now], qkv[now], gate[now], ba[now], out[now])
        if sequences.num_prefills:
            now = slice(decodes, done)
            prompts(layer, sequences, qkv[now], gate[now], ba[now], out[now])
    if done < len(out):
        out[done:].zero_()
    return layer.out_proj(out)[0]


def pages(layer: Any) -> tuple[Tensor, Tensor]:
    """What vLLM keeps of sequences: the convolution's last inputs [pages, width - 1, channels], and the states."""
    conv, states = layer.kv_cache
    return conv.transpose(1, 2) if is_conv_state_dim_first() else conv, states


def weights_of(layer: Any) -> delta_step.Weights:
    conv = layer.conv1d.weight[:, 0]
    key_heads = layer.num_k_heads
    return delta_step.Weights(conv, layer.A_log, layer.dt_bias, layer.norm.weight, layer.norm.eps, EPS, key_heads)


def tokens(layer: Any, slots: Tensor, qkv: Tensor, gate: Tensor, ba: Tensor, out: Tensor) -> None:
    """A token of each sequence."""
    b, a = ba.chunk(2, dim=-1)
    delta_step.step(qkv, b, a, gate, weights_of(layer), *pages(layer), slots, out)


def prompts(layer: Any, sequences: Any, qkv: Tensor, gate: Tensor, ba: Tensor, out: Tensor) -> None:
    """Sequences of several tokens."""
    conv, states = pages(layer)
    ends, slots, begun = (
        sequences.prefill_query_start_loc, sequences.prefill_state_indices, sequences.prefill_has_initial_state,
    )  # fmt: skip
    ours = delta_step.Sequences(ends, sequences.chunk_indices, slots, begun)
    run = run_of(ours, sequences.chunk_offsets)
    mixed = delta_step.convolve(qkv, layer.conv1d.weight[:, 0], conv, ours, CHUNK)
    query, key, value = mixed.split([layer.key_dim, layer.key_dim, layer.value_dim], dim=-1)
    query, key = (part.unflatten(-1, (layer.num_k_heads, layer.head_k_dim)) for part in (query, key))
    value = value.unflatten(-1, (layer.num_v_heads, layer.head_v_dim))
    b, a = ba.float().chunk(2, dim=-1)
    decay = -layer.A_log.float().exp() * F.softplus(a + layer.dt_bias.float())
    inputs = delta_rule.Inputs(query, key, value, decay, b.sigmoid())
    begin = torch.where(begun[:, None, None, None], states[slots], 0.0).transpose(-1, -2).contiguous()
    result = torch.empty_like(value, memory_format=torch.contiguous_format)
    after = delta_rule.along(inputs, run, delta_rule.prepare(inputs, run, EPS), EPS, result, begin=begin)
    states[slots] = after.transpose(-1, -2)
    gate, out = (part.unflatten(-1, value.shape[1:]) for part in (gate, out))
    gated_norm_forward(result, gate, layer.norm.weight, layer.norm.eps, out)


_latest: tuple[Tensor | None, Run | None] = (None, None)
"""Of all layers: the chunks of the batch that was computed last."""


def run_of(sequences: delta_step.Sequences, chunk_offsets: Tensor) -> Run:
    """The chunks of a batch, made once for all layers."""
    global _latest
    indices, run = _latest
    if indices is not sequences.chunks or run is None:
        run = run_of_sequences(sequences.ends, sequences.chunks, chunk_offsets)
        _latest = sequences.chunks, run
    return run


def run_of_sequences(ends: Tensor, chunk_indices: Tensor, chunk_offsets: Tensor) -> Run:
    """The chunks of sequences side by side, each of which continues the state of its number.

    ends [sequences + 1]; chunk_indices [chunks, 2]: sequence and number in it; chunk_offsets [sequences + 1].
    """
    sequence, number = chunk_indices.long().unbind(1)
    starts = ends[sequence] + CHUNK * number
    counts = (ends[sequence + 1] - starts).clamp(max=CHUNK)
    own = torch.arange(len(ends) - 1, device=ends.device)
    spans = torch.stack([ends[:-1], ends.diff(), chunk_offsets[:-1].to(ends), own.to(ends)], 1)
    return Run(starts.int(), counts.int(), [Order(spans.int().contiguous(), None)])
