"""Products with a matrix in pinned host memory, which a GPU is sent slice by slice; plain products for any other.

A GPU could multiply with host memory where it is, but a product reads its operand once for every tile of rows, which
over a bus decides its time. Here each product reads it once, at the speed of a copy, through a scratch tensor.

Not here: copies that overlap with products, which take a tenth of the copies' time, and gradients.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from grpo.kernels.sizes import HEAD_SLICE_BYTES


def mm_transposed(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = x @ weight.T. x [M, K]; weight [N, K], on the CPU while `x` is on a GPU, or beside it; out [M, N]."""
    if not is_elsewhere(weight, x):
        torch.mm(x, weight.t(), out=out)
        return
    for rows, part in slices(weight, x.device):
        torch.mm(x, part.t(), out=out[:, rows])


def mm(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = x @ weight. x [M, N]; weight [N, K] as above; out [M, K]. Slices are added up in float32 at least."""
    if not is_elsewhere(weight, x):
        torch.mm(x, weight, out=out)
        return
    wide = torch.promote_types(x.dtype, torch.float32)
    total = torch.zeros(out.shape, dtype=wide, device=x.device)
    for rows, part in slices(weight, x.device):
        if x.is_cuda and x.dtype != wide:
            total += torch.mm(x[:, rows], part, out_dtype=wide)
        else:
            total.addmm_(x[:, rows].to(wide), part.to(wide))
    out.copy_(total)


def is_elsewhere(weight: Tensor, x: Tensor) -> bool:
    """Whether `weight` has to be sent to where `x` is."""
    return weight.device != x.device


def slices(weight: Tensor, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """Rows of `weight`, and their copy on `device`, which the next slice overwrites."""
    # Columns of a product begin where kernels load whole vectors.
    count = max(8, HEAD_SLICE_BYTES // (weight.shape[1] * weight.itemsize) // 8 * 8)
    scratch = torch.empty(min(count, len(weight)), weight.shape[1], dtype=weight.dtype, device=device)
    for start in range(0, len(weight), count):
        rows = slice(start, min(start + count, len(weight)))
        part = scratch[: rows.stop - start]
        part.copy_(weight[rows], non_blocking=True)
        yield rows, part
