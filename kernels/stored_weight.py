"""A frozen weight in whatever form it is stored: dense, NF4 (nf4.py) or 8 bit (eight_bit.py), told apart by its type.

A form is a pair of tensors, (weight, scales), rows of which are rows of the matrix. Dense: scales are None. NF4: packed
uint8, with scales in the compute dtype. 8 bit: codes, with float32 scales of which several rows may share one.

Not here: the forms themselves, and products whose operands are packed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo.kernels import eight_bit, nf4
from grpo.kernels.eight_bit_gemm import eight_bit_linear
from grpo.kernels.lora_factors import LowRank
from grpo.kernels.lora_sum import dense_linear
from grpo.kernels.nf4_gemm import nf4_linear


def columns(weight: Tensor, scales: Tensor | None) -> int:
    """Of the matrix."""
    in_nf4 = scales is not None and not eight_bit.is_eight_bit(weight)
    return weight.shape[1] * (2 if in_nf4 else 1)


def rows_of(weight: Tensor, scales: Tensor | None, rows: slice) -> tuple[Tensor, Tensor | None]:
    """The form of `rows`, as views. In 8 bit they begin and end where other rows' scales do."""
    if scales is not None and eight_bit.is_eight_bit(weight):
        return weight[rows], eight_bit.row_scales(scales, weight, rows)
    return weight[rows], None if scales is None else scales[rows]


def dequantize(weight: Tensor, scales: Tensor | None, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The matrix in the compute dtype, written to `out`; without `out` a new tensor, or the stored one."""
    if scales is None:
        return weight if out is None else out.copy_(weight)
    if eight_bit.is_eight_bit(weight):
        return eight_bit.dequantize(weight, scales, dtype, out)
    return nf4.dequantize(weight, scales, out)


def linear(
    x: Tensor, weight: Tensor, scales: Tensor | None, bias: Tensor | None, low_rank: LowRank | None, out: Tensor
) -> None:
    """out [M, N] = x [M, K] times the transpose of the matrix, plus bias [N], plus `low_rank`, rounded once."""
    if scales is None:
        dense_linear(x, weight, bias, low_rank, out)
    elif eight_bit.is_eight_bit(weight):
        eight_bit_linear(x, weight, scales, bias, out, low_rank)
    else:
        nf4_linear(x, weight, scales, bias, out, low_rank)
