"""Sequences of given lengths in a paged cache, filled at random, whose pages lie in no order."""

import torch
from torch import Tensor

from grpo.kernels.decode_attention import Cache, NewToken


def case(
    lengths: list[int], heads: int, kv_heads: int, size: int, dtype: torch.dtype, device: str,
    longest: int = 96, page: int = 16,
) -> tuple[Tensor, Cache, NewToken]:  # fmt: skip
    """(query, cache, new tokens). Keys and values share a tensor, as vLLM's do; query, keys and values are columns of
    one product's result; pages past a sequence's end are page 0."""
    generator = torch.Generator().manual_seed(sum(lengths) + heads)
    each, count = -(-longest // page), len(lengths)
    held = torch.randn(count * each + 1, page, kv_heads, 2 * size, generator=generator).to(dtype).to(device)
    pages = (torch.randperm(count * each, generator=generator) + 1).view(count, each).int()
    used = torch.arange(each)[None] * page < torch.tensor(lengths)[:, None]
    projected = torch.randn(count, heads + 2 * kv_heads, size, generator=generator).to(dtype).to(device)
    query, keys, values = projected.split([heads, kv_heads, kv_heads], 1)
    angles = torch.arange(longest)[:, None] * 100.0 ** -(torch.arange(size // 2) / (size // 2))[None]
    cos_sin = torch.cat([angles.cos(), angles.sin()], 1).to(dtype).to(device)
    cache = Cache(
        held[..., :size], held[..., size:], pages.where(used, 0).to(device),
        torch.tensor(lengths, dtype=torch.int32, device=device),
    )  # fmt: skip
    return query, cache, NewToken(keys, values, cos_sin)
