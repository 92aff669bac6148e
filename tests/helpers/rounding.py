"""How far a 16-bit result is from its exact value, in the unit that tells one rounding from two."""

from __future__ import annotations

import torch
from torch import Tensor


def half_units(result: Tensor, exact: Tensor) -> Tensor:
    """|result - exact| in halves of the unit in the last place of `exact`: at most 1 after one rounding to nearest."""
    exact = exact.double()
    exponent = torch.floor(torch.log2(exact.abs().clamp_min(torch.finfo(result.dtype).tiny)))
    return (result.double() - exact).abs() / (torch.exp2(exponent) * torch.finfo(result.dtype).eps / 2)


def share_rounded_more_than_once(result: Tensor, exact: Tensor) -> float:
    """Share of elements further from `exact` than one rounding, and float32 sums before it, can take them.

    A second rounding does that to a fifth of all elements; what cancels to nearly nothing is left out.
    """
    large = exact.abs() > 0.05 * exact.double().square().mean().sqrt()
    return float((half_units(result, exact)[large] > 1.03).double().mean())
