"""Moving weights that are trained in place, for a moment: how the start-up gate sees that generation reads them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from grpo.policy.full_policy import FullPolicy

EVERY = 64
"""One row in so many of each weight is moved, of each norm and bias one number: what is put aside is small."""


@contextmanager
@torch.no_grad()
def moved_weights(policy: FullPolicy, noise: float) -> Iterator[None]:
    """Inside, rows of every weight of `policy` have noise of `noise` times their own size added, the same at each call;
    afterwards they have the bits that they had."""
    rows = [parameter.data[::EVERY] for parameter in policy.parameters()]
    kept = [part.clone() for part in rows]
    generator = torch.Generator().manual_seed(1)
    for part in rows:
        size = part.float().square().mean().sqrt()
        part.add_((torch.randn(part.shape, generator=generator).to(part.device) * size * noise).to(part.dtype))
    try:
        yield
    finally:
        for part, before in zip(rows, kept, strict=True):
            part.copy_(before)
