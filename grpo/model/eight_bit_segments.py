"""Rows of a fused linear layer in 8 bit: the codes of a checkpoint as they are, int8 of what it holds otherwise.

Parts whose codes are of one kind, with scales for groups of as many columns, are stacked and share a tensor.
`base_weights.py` owns what is made here; the arithmetic of a memory plan is in `sizes.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from math import gcd

import torch
from torch import Tensor

from grpo.kernels import eight_bit
from grpo.model.weight_source import EightBitTensor, Packed, dense


def in_eight_bit(weight: Tensor | Packed, device: torch.device) -> EightBitTensor:
    """`weight` on `device`: a checkpoint's codes, or int8 of its values."""
    if isinstance(weight, EightBitTensor):
        return EightBitTensor(weight.codes.to(device), weight.scales.to(device))
    return EightBitTensor(*eight_bit.quantize(dense(weight).to(device)))


def stacked(weights: Sequence[EightBitTensor]) -> list[EightBitTensor]:
    """`weights` one below the other, neighbours of one kind in one."""
    kinds = groupby(weights, lambda one: (one.codes.dtype, one.scales.shape[1]))
    return [stack(list(group)) for _, group in kinds]


def stack(weights: list[EightBitTensor]) -> EightBitTensor:
    """`weights` of one kind, with scales for as many rows as go into all of theirs."""
    if len(weights) == 1:
        return weights[0]
    shared = [one.codes.shape[0] // one.scales.shape[0] for one in weights]
    common = gcd(*shared)
    scales = [one.scales.repeat_interleave(rows // common, 0) for one, rows in zip(weights, shared, strict=True)]
    # torch joins no FP8 tensors on every device; their bytes it does.
    codes = torch.cat([one.codes.view(torch.uint8) for one in weights]).view(weights[0].codes.dtype)
    return EightBitTensor(codes, torch.cat(scales))
