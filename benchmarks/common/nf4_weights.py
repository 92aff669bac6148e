"""Random NF4 weights of a layer, ours and bitsandbytes', and timing a product with them from cold memory.

bitsandbytes multiplies q, k, v and gate, up one after the other, as vLLM's integration of it does.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from grpo.kernels import nf4, nf4_gemm
from grpo.kernels.nf4_tuner import microseconds

COLD_BYTES = 160e6
"""What the copies that one graph reads add up to, at least: three times the L2 cache of an H100."""
MOST_COPIES = 96


class Weight:
    """Copies of one random weight in one form, for cold reads, and the product that reads one of them."""

    def __init__(self, copies: list, multiply: Callable[[Tensor, Any], Any]):
        self.copies, self.multiply = copies, multiply

    def microseconds(self, x: Tensor) -> float:
        return microseconds(self.copies, partial(self.multiply, x))


def copies_for(size: float) -> int:
    return max(2, min(MOST_COPIES, math.ceil(COLD_BYTES / size)))


def random_weight(features: int, columns: int) -> Tensor:
    return torch.randn(features, columns, dtype=torch.bfloat16, device="cuda") * 0.02


def packed_weight(dense: Tensor) -> Weight:
    features, columns = dense.shape
    copies = []
    for _ in range(copies_for(dense.numel() * 0.53125)):
        copies.append(nf4.allocate(features, columns, torch.bfloat16, "cuda"))
        nf4.quantize_rows(*copies[-1], 0, dense)
    return Weight(copies, lambda x, copy: nf4_gemm.nf4_linear(x, *copy))


def bitsandbytes_copies(dense: Tensor, parts: tuple[int, ...], count: int) -> list[Any]:
    """`dense`, split into `parts`, as bitsandbytes stores it; none where it is not installed, which is said."""
    try:
        from bitsandbytes.functional import quantize_4bit
    except ImportError as error:
        warnings.warn(f"bitsandbytes is left out: {error}", stacklevel=1)
        return []
    return [
        [quantize_4bit(part.contiguous(), quant_type="nf4", blocksize=64) for part in dense.split(parts)]
        for _ in range(count)
    ]


def bitsandbytes_product(x: Tensor, copy: Any) -> list[Tensor]:
    import bitsandbytes

    return [bitsandbytes.matmul_4bit(x, codes.t(), state) for codes, state in copy]
