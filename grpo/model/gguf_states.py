"""Names and forms that GGUF files have otherwise: of layers with a state, Qwen 3.5's gated DeltaNet and the short
convolutions of LFM2, and of norms.

llama.cpp keeps -exp(A_log) in place of A_log, a convolution's weight [channels, taps] without the dimension of one
between them, and heads of values in the order in which they meet heads of keys in turn: the first of every head of
keys, then the second of every one; transformers has those of one head of keys side by side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo.model.decoder_config import DecoderConfig
from grpo.model.families.table import family_of

CONVOLUTIONS = (".linear_attn.conv1d.weight", ".conv.conv.weight")
PER_HEAD = (".in_proj_a.weight", ".in_proj_b.weight", ".A_log", ".dt_bias")
"""Of gated DeltaNet: one row, or number, for each head of values."""


def named_for_gguf(name: str) -> str:
    """transformers' `name` as the gguf package's table of names has it."""
    if name.endswith(".layer_scalar"):
        return f"{name}.weight"
    return f"{name.removesuffix('.dt_bias')}.dt_proj.bias" if name.endswith(".dt_bias") else name


def adds_one(name: str, config: DecoderConfig) -> bool:
    """Whether llama.cpp keeps the norm's weight `name` plus one."""
    one_more = family_of(config.model_type).norm_adds_one
    return one_more and name.endswith("norm.weight") and not name.endswith(".linear_attn.norm.weight")


def shape_in_gguf(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of transformers' tensor `name` of `shape`."""
    return (shape[0], shape[2]) if name.endswith(CONVOLUTIONS) else shape


def shape_from_gguf(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The other way."""
    return (shape[0], 1, shape[1]) if name.endswith(CONVOLUTIONS) else shape


def to_gguf(name: str, weight: Tensor, config: DecoderConfig) -> Tensor:
    """transformers' tensor `name` float32 as llama.cpp computes with it."""
    weight = ordered(name, weight, config, back=False)
    if name.endswith(CONVOLUTIONS):
        weight = weight.squeeze(1)
    if name.endswith(".A_log"):
        return -torch.exp(weight)
    return weight + 1 if adds_one(name, config) else weight


def from_gguf(name: str, weight: Tensor, config: DecoderConfig) -> Tensor:
    """The other way."""
    if name.endswith(CONVOLUTIONS):
        weight = weight.unsqueeze(1)
    if name.endswith(".A_log"):
        weight = torch.log(-weight)
    weight = ordered(name, weight, config, back=True)
    return weight - 1 if adds_one(name, config) else weight


def ordered(name: str, weight: Tensor, config: DecoderConfig, *, back: bool) -> Tensor:
    """`weight` with its heads of values in llama.cpp's order, or back in transformers'."""
    if ".linear_attn." not in name:
        return weight
    keys, dim = config.linear_num_key_heads, config.linear_value_head_dim
    shared = config.linear_num_value_heads // keys
    heads = (shared, keys) if back else (keys, shared)
    if name.endswith(PER_HEAD):
        return swapped(weight, heads)
    if name.endswith(".in_proj_z.weight"):
        return swapped(weight, (*heads, dim))
    if name.endswith(".out_proj.weight"):
        return swapped(weight.t(), (*heads, dim)).t().contiguous()
    if name.endswith((".in_proj_qkv.weight", ".conv1d.weight")):
        before = 2 * keys * config.linear_key_head_dim
        return torch.cat([weight[:before], swapped(weight[before:], (*heads, dim))])
    return weight


def swapped(weight: Tensor, rows: tuple[int, ...]) -> Tensor:
    """`weight` [rows, ...] with the first two parts of its rows, which are counted by `rows`, changed over."""
    return weight.reshape(*rows, *weight.shape[1:]).transpose(0, 1).reshape(weight.shape)
