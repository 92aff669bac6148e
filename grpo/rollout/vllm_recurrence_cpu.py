"""Gated DeltaNet for vLLM on a CPU, in any precision: vLLM's own operator there is for bfloat16 alone.

States are read from and written to vLLM's pages, so that its scheduler and its prefix cache work as with its own.
Prompts are computed by the chunks of `kernels/gated_delta.py` in float64, single tokens step by step in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first

from grpo.kernels.attention import Span
from grpo.kernels.gated_delta import chunked, rule_dtype, take, unit
from grpo.kernels.recurrence import Recurrence


def delta_net(layer: Any, x: Tensor) -> Tensor:
    """vLLM's `layer` of x [tokens, hidden]."""
    qkvz, ba = layer.in_proj_qkvz(x)[0], layer.in_proj_ba(x)[0]
    qkv, z = qkvz.split([2 * layer.key_dim + layer.value_dim, layer.value_dim], dim=-1)
    b, a = ba.chunk(2, dim=-1)
    out = x.new_zeros(len(x), layer.num_v_heads, layer.head_v_dim)
    metadata = get_forward_context().attn_metadata
    if metadata is not None:
        sequences = metadata[layer.prefix]
        if sequences.num_actual_tokens:
            recur(layer, sequences, qkv, b, a, out)
    return layer._output_projection(out, z.reshape(out.shape))


def recur(layer: Any, sequences: Any, qkv: Tensor, b: Tensor, a: Tensor, out: Tensor) -> None:
    """Write the result for every sequence of the step into `out` [tokens, value heads, value dim]."""
    starts = sequences.non_spec_query_start_loc.tolist()
    slots = sequences.non_spec_state_indices_tensor[: len(starts) - 1]
    decodes, begun = sequences.num_decodes, sequences.has_initial_state
    if decodes:
        conv, states = pages(layer, slots[:decodes])
        taps = torch.cat([conv, qkv[:decodes, :, None]], -1)
        steps = tuple(part[:, 0] for part in inputs(layer, taps, b[:decodes, None], a[:decodes, None]))
        out[:decodes], states = one_step(states, *steps)
        keep(layer, slots[:decodes], taps[..., 1:], states)
    for index in range(decodes, len(starts) - 1):
        here, slot = slice(starts[index], starts[index + 1]), slots[index : index + 1]
        if here.stop > here.start:
            conv, state = pages(layer, slot)
            if begun is None or not begun[index]:
                conv, state = torch.zeros_like(conv), torch.zeros_like(state)
            taps = torch.cat([conv, qkv[here].t()[None]], -1)
            result, state = prompt(state, *(part[0] for part in inputs(layer, taps, b[None, here], a[None, here])))
            out[here] = result.to(out.dtype)
            keep(layer, slot, taps[..., -conv.shape[-1] :], state)


def inputs(layer: Any, taps: Tensor, b: Tensor, a: Tensor) -> tuple[Tensor, ...]:
    """query, key [sequences, tokens, key heads, dim], value, decay and beta, in float32, from the convolution's input
    [sequences, channels, width - 1 + tokens]."""
    weight = layer.conv1d.weight.float()
    mixed = F.silu(F.conv1d(taps.float(), weight, groups=len(weight))).transpose(1, 2).to(taps.dtype).float()
    query, key, value = mixed.split([layer.key_dim, layer.key_dim, layer.value_dim], dim=-1)
    query, key = (part.unflatten(-1, (layer.num_k_heads, layer.head_k_dim)) for part in (query, key))
    value = value.unflatten(-1, (layer.num_v_heads, layer.head_v_dim))
    decay = -layer.A_log.exp() * F.softplus(a.float() + layer.dt_bias.float())
    return query, key, value, decay, b.float().sigmoid()


def one_step(
    states: Tensor, query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    """A token of each sequence: (y [sequences, value heads, value dim], the states after it)."""
    shared = value.shape[1] // key.shape[1]
    query, key = (unit(part).repeat_interleave(shared, 1) for part in (query, key))
    states = states * decay.exp()[..., None, None]
    news = (value - (key[:, :, None] @ states)[:, :, 0]) * beta[..., None]
    states = states + key[..., None] * news[:, :, None]
    return (query[:, :, None] * key.shape[-1] ** -0.5 @ states)[:, :, 0], states


def prompt(
    state: Tensor, query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    """The tokens [tokens, heads, ...] of one sequence: (y, the state after them)."""
    (stage,) = Recurrence([Span(0, len(query))], state.device).stages
    dtype = rule_dtype(value)
    query, key, value = (take(part, stage, dtype) for part in (query, key, value))
    decay, beta = (take(part, stage, dtype) for part in (decay, beta))
    result, state = chunked(query, key, value, decay, beta, state.to(dtype), stage)
    return result.transpose(1, 2).flatten(0, 1)[stage.filled], state


def pages(layer: Any, slots: Tensor) -> tuple[Tensor, Tensor]:
    """What vLLM keeps of sequences: the convolution's last inputs [sequences, channels, width - 1] and the states
    [sequences, value heads, key dim, value dim] in float32."""
    conv, states = (page[slots] for page in layer.kv_cache)
    return conv if is_conv_state_dim_first() else conv.transpose(1, 2), states.float().transpose(-1, -2)


def keep(layer: Any, slots: Tensor, conv: Tensor, states: Tensor) -> None:
    """The counterpart of `pages`."""
    held, states_held = layer.kv_cache
    held[slots] = (conv if is_conv_state_dim_first() else conv.transpose(1, 2)).to(held.dtype)
    states_held[slots] = states.transpose(-1, -2).to(states_held.dtype)
