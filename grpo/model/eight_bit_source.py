"""Reading 8-bit weights of safetensors: the entries that go with a weight, and the blocks that its scales belong to.

bitsandbytes has `weight` int8 and `SCB`, the absmax of every row; transformers' FP8 `weight_scale_inv`,
compressed-tensors' and ModelOpt's `weight_scale`, all to be multiplied with, whatever they are called. Codes are taken
as they are, and scales become float32. What a configuration says is read in `quantization.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from math import ceil, gcd

import torch
from torch import Tensor

from grpo.kernels.eight_bit import FP8, INT8, LARGEST_CODE
from grpo.model.quantization import FORM, SCALES, ZERO_POINT, Block, Quantization
from grpo.model.weight_source import EightBitTensor

CODES = {"I8": "int8", "F8_E4M3": "FP8"}
"""safetensors' names of the types that are read -> ours."""

Read = Callable[[str], Tensor]
"""Gives the stored tensor of a name."""


def scales_name(weight: str, stored: Container[str]) -> str | None:
    """Which of the entries `stored` holds the scales of `weight`; None where there are none."""
    layer = weight.removesuffix(".weight")
    return next((name for name in (f"{layer}.{entry}" for entry in SCALES) if name in stored), None)


def read_eight_bit(name: str, stored: Container[str], read: Read, stated: Quantization) -> EightBitTensor:
    """The weight `name` [out, in] with its scales. Raises ValueError for entries that do not belong together."""
    codes, layer = read(name), name.removesuffix(".weight")
    if codes.ndim != 2:
        raise ValueError(f"{name} has {codes.ndim} dimensions, not two")
    scales = scales_name(name, stored)
    if scales is None:
        raise ValueError(f"{name} is {codes.dtype} without scales")
    if len(found := [entry for entry in SCALES if f"{layer}.{entry}" in stored]) > 1:
        raise ValueError(f"{name} has scales twice, {' and '.join(found)}")
    if scales.endswith(".SCB") and codes.dtype != INT8:
        raise ValueError(f"{scales} goes with int8, and {name} is {codes.dtype}")
    if f"{layer}.{FORM}" in stored and int(read(f"{layer}.{FORM}")) != 0:
        raise ValueError(f"{layer}.{FORM} is not that of codes row after row")
    if f"{layer}.{ZERO_POINT}" in stored and bool(read(f"{layer}.{ZERO_POINT}").float().any()):
        raise ValueError(f"{layer}.{ZERO_POINT} is not zero")
    if codes.dtype == FP8 and bool((codes.view(torch.uint8) & 0x7F == 0x7F).any()):
        raise ValueError(f"{name} has values that are no numbers")
    values = read(scales)
    if not values.dtype.is_floating_point:
        raise ValueError(f"{scales} is {values.dtype}, not a float")
    factors = values.float() / LARGEST_CODE if scales.endswith(".SCB") else values.float()
    if not bool(factors.isfinite().all()):
        raise ValueError(f"{scales} has values that are not finite")
    return EightBitTensor(codes, shared_scales(factors, codes, stated.blocks, scales))


def shared_scales(scales: Tensor, codes: Tensor, blocks: tuple[Block, ...], name: str) -> Tensor:
    """`scales` as kernels/eight_bit.py has them: [out / R, groups of columns], R a divisor of the rows.

    blocks: those that the configuration names. Scales of another number than that of these blocks are one for the
    tensor, one a row, or one for equal parts of a row; any other is a ValueError.
    """
    rows, columns = codes.shape
    if scales.numel() == 1:
        return scales.reshape(1, 1)
    if scales.ndim == 1:
        scales = scales[:, None]
    for block in (*blocks, (1, None), even_block(scales, rows, columns)):
        tall, wide = block[0] or rows, block[1] or columns
        if tuple(scales.shape) == (ceil(rows / tall), ceil(columns / wide)):
            return by_divisors(scales, (rows, columns), tall, wide)
    raise ValueError(f"{name} of shape {list(scales.shape)} does not fit a weight of shape {[rows, columns]}")


def even_block(scales: Tensor, rows: int, columns: int) -> Block:
    """The block of which a weight has a whole number both ways."""
    if scales.ndim != 2 or not scales.numel() or rows % scales.shape[0] or columns % scales.shape[1]:
        return None, None
    return rows // scales.shape[0], columns // scales.shape[1]


def by_divisors(scales: Tensor, shape: tuple[int, int], tall: int, wide: int) -> Tensor:
    """`scales` of blocks [tall, wide], repeated until their rows divide the weight's and their width is a power of two,
    which for the blocks that there are they do and is."""
    rows, columns = shape
    shared = gcd(rows, tall)
    if shared != tall:
        scales = scales.repeat_interleave(tall // shared, 0)[: rows // shared]
    if wide < columns and wide & (wide - 1):
        width = wide & -wide
        scales = scales.repeat_interleave(wide // width, 1)[:, : ceil(columns / width)]
    return scales.contiguous()
