"""A causal convolution of few taps over packed sequences that may continue a shared prompt, each channel by itself.

    y[t, c] = activation(b[c] + sum_j weight[c, width - 1 - j] x[t - j, c])

where x before a sequence is 0, and before one that continues a prompt the prompt. The weight is frozen.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo.kernels.launch import accumulation_dtype
from grpo.kernels.recurrence import Preceding, Recurrence
from grpo.kernels.sizes import CONVOLUTION_BYTES

TENSORS = 8
"""How many tensors as large as the input exist at once in a backward pass, about."""


def short_conv(x: Tensor, weight: Tensor, bias: Tensor | None, recurrence: Recurrence, *, silu: bool = False) -> Tensor:
    """y [tokens, channels] for x [tokens, channels] and weight [channels, width], computed in float32 and rounded once.

    With gradient for x alone.
    """
    assert x.shape == (recurrence.tokens, len(weight)), (x.shape, weight.shape, recurrence.tokens)
    return _ShortConv.apply(x, weight, bias, recurrence, silu)


class _ShortConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, recurrence: Recurrence, silu: bool) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.recurrence, ctx.silu = recurrence, silu
        preceding = recurrence.preceding(weight.shape[1] - 1)
        out = torch.empty_like(x)
        for part in channel_groups(x):
            y = convolved(x[:, part], weight[part], None if bias is None else bias[part], preceding)
            out[:, part] = F.silu(y) if silu else y
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        preceding = ctx.recurrence.preceding(weight.shape[1] - 1)
        out = torch.empty_like(x)
        for part in channel_groups(x):
            some = grad[:, part].to(accumulation_dtype(x.dtype))
            if ctx.silu:
                y = convolved(x[:, part], weight[part], None if bias is None else bias[part], preceding)
                gate = torch.sigmoid(y)
                some = some * gate * (1 + y * (1 - gate))
            out[:, part] = convolved_back(some, weight[part], preceding)
        return out, None, None, None, None


def channel_groups(x: Tensor) -> Iterator[slice]:
    """Channels of x [tokens, channels] that are computed together."""
    together = max(1, CONVOLUTION_BYTES // (TENSORS * max(1, len(x)) * accumulation_dtype(x.dtype).itemsize))
    for first in range(0, x.shape[1], together):
        yield slice(first, first + together)


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None, preceding: Preceding) -> Tensor:
    """The sum over the taps, in float32."""
    longer = F.pad(x, (0, 0, 0, 1)).index_select(0, preceding.sources)
    taps = weight.to(accumulation_dtype(x.dtype)).unbind(1)
    y = longer[preceding.own] * taps[-1]
    for back, tap in enumerate(taps[-2::-1], start=1):
        y.addcmul_(longer[preceding.own - back].to(y.dtype), tap.expand_as(y))
    return y if bias is None else y + bias


def convolved_back(grad: Tensor, weight: Tensor, preceding: Preceding) -> Tensor:
    """The gradient of x [tokens, channels] from that of the sum over the taps, in the dtype of `grad`."""
    longer = grad.new_zeros(len(preceding.sources) + weight.shape[1], grad.shape[1])
    longer[preceding.own] = grad
    taps = weight.to(grad.dtype).unbind(1)
    rows = torch.arange(len(preceding.sources), device=grad.device)
    total = sum(longer[rows + back] * tap for back, tap in enumerate(taps[::-1]))
    assert isinstance(total, Tensor)
    own = total[preceding.own]
    if len(preceding.copies):  # a prompt's last tokens, of which each completion has a copy
        ends = F.pad(preceding.counts.cumsum(0), (1, 0))
        sums = F.pad(total[preceding.copies].cumsum(0), (0, 0, 1, 0))[ends].diff(dim=0)
        own[preceding.copied] += sums
    return own
