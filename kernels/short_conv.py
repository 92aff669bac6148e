"""A causal convolution of few taps over packed sequences that may continue a shared prompt, each channel by itself.

    y[t, c] = activation(b[c] + sum_j weight[c, width - 1 - j] x[t - j, c])

where x before a sequence is 0, and before one that continues a prompt the prompt. The weight is frozen. By a
kernel on a GPU, whose backward computes the sum over the taps again and keeps nothing but the input.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo.kernels.launch import (
    accumulation_dtype,
    is_interpreted,
    on_device,
    round_to,
    triton_supports,
    unit_stride,
)
from grpo.kernels.recurrence import Preceding, Recurrence
from grpo.kernels.sizes import CONVOLUTION_BYTES, CONVOLUTION_TENSORS

ROWS, CHANNELS = 16, 128
"""Of a program's tile."""


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
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if triton_supports(x):
            launch_forward(unit_stride(x), weight, bias, preceding, out, silu)
            return out
        for part in channel_groups(x):
            y = convolved(x[:, part], weight[part], None if bias is None else bias[part], preceding)
            out[:, part] = F.silu(y) if silu else y
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        preceding = ctx.recurrence.preceding(weight.shape[1] - 1)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if triton_supports(x):
            by_kernel_back(unit_stride(grad), unit_stride(x), weight, bias, preceding, out, ctx.silu)
            return out, None, None, None, None
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
    together = max(
        1, CONVOLUTION_BYTES // (CONVOLUTION_TENSORS * max(1, len(x)) * accumulation_dtype(x.dtype).itemsize)
    )
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


def launch_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, preceding: Preceding, out: Tensor, silu: bool
) -> None:
    """The kernel's form of `short_conv`."""
    tokens, channels = x.shape
    with on_device(x):
        _forward_kernel[(triton.cdiv(tokens, ROWS), triton.cdiv(channels, CHANNELS))](
            x, weight, x if bias is None else bias, out, preceding.own, preceding.sources, tokens, channels,
            x.stride(0), *weight.stride(), weight.shape[1], bias is not None, silu, ROWS, CHANNELS, is_interpreted(x),
        )  # fmt: skip


def by_kernel_back(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, preceding: Preceding, out: Tensor, silu: bool
) -> None:
    """The gradient of x into `out`: what comes from a token's own sequence, and for a prompt's last tokens what comes
    from the sequences that continue it."""
    launch_backward(grad, x, weight, bias, preceding, preceding.own, out, silu)
    copies = len(preceding.copies)
    if copies:
        places = torch.cat([preceding.copies, preceding.own[preceding.copied]])
        parts = torch.empty(len(places), x.shape[1], dtype=torch.float32, device=x.device)
        launch_backward(grad, x, weight, bias, preceding, places, parts, silu)
        ends = F.pad(preceding.counts.cumsum(0), (1, 0))
        sums = F.pad(parts[:copies].cumsum(0), (0, 0, 1, 0))[ends].diff(dim=0)
        out[preceding.copied] = (parts[copies:] + sums).to(out.dtype)


def launch_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, preceding: Preceding, places: Tensor, out: Tensor,
    silu: bool,
) -> None:  # fmt: skip
    """The gradient at `places` of the longer row, into the rows of `out`."""
    rows, channels = out.shape
    with on_device(x):
        _backward_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(channels, CHANNELS))](
            grad, x, weight, x if bias is None else bias, out, places, preceding.token_at, preceding.sources, rows,
            len(x), channels, grad.stride(0), x.stride(0), *weight.stride(), weight.shape[1], bias is not None, silu,
            ROWS, CHANNELS, is_interpreted(x),
        )  # fmt: skip


@triton.jit
def _taps(
    x_ptr, weight_ptr, bias_ptr, sources_ptr, place, inside, channel, tokens, channels, stride_x, stride_w_c,
    stride_w_t, WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The sum over the taps at `place` [ROWS] of the longer row, float32 [ROWS, CHANNELS]."""
    present = channel < channels
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    if HAS_BIAS:
        total += tl.load(bias_ptr + channel, mask=present, other=0.0).to(tl.float32)[None, :]
    for back in tl.static_range(WIDTH):
        source = tl.load(sources_ptr + place - back, mask=inside, other=0)
        seen = inside & (source < tokens)
        tap = tl.load(weight_ptr + channel * stride_w_c + (WIDTH - 1 - back) * stride_w_t, mask=present, other=0.0)
        value = tl.load(
            x_ptr + source[:, None] * stride_x + channel[None, :], mask=seen[:, None] & present[None, :], other=0.0
        )
        total += value.to(tl.float32) * tap.to(tl.float32)[None, :]
    return total


@triton.jit(do_not_specialize=["tokens"])
def _forward_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, own_ptr, sources_ptr, tokens, channels, stride_x, stride_w_c, stride_w_t,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside = row < tokens
    y = _taps(
        x_ptr, weight_ptr, bias_ptr, sources_ptr, tl.load(own_ptr + row, mask=inside, other=0), inside, channel, tokens,
        channels, stride_x, stride_w_c, stride_w_t, WIDTH, HAS_BIAS, ROWS, CHANNELS,
    )  # fmt: skip
    if SILU:
        y = y * tl.sigmoid(y)
    target = out_ptr + row.to(tl.int64)[:, None] * channels + channel[None, :]
    mask = inside[:, None] & (channel < channels)[None, :]
    tl.store(target, round_to(y, out_ptr.dtype.element_ty, INTERPRETED), mask=mask)


@triton.jit(do_not_specialize=["rows", "tokens"])
def _backward_kernel(
    grad_ptr, x_ptr, weight_ptr, bias_ptr, out_ptr, places_ptr, token_ptr, sources_ptr, rows, tokens, channels,
    stride_grad, stride_x, stride_w_c, stride_w_t,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    present = channel < channels
    place = tl.load(places_ptr + row, mask=row < rows, other=0)
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    for ahead in tl.static_range(WIDTH):
        # Behind a sequence's end come as many places that are no token's own.
        token = tl.load(token_ptr + place + ahead, mask=row < rows, other=-1)
        counted = token >= 0
        mask = counted[:, None] & present[None, :]
        grad = tl.load(grad_ptr + token[:, None] * stride_grad + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        if SILU:
            y = _taps(
                x_ptr, weight_ptr, bias_ptr, sources_ptr, place + ahead, counted, channel, tokens, channels, stride_x,
                stride_w_c, stride_w_t, WIDTH, HAS_BIAS, ROWS, CHANNELS,
            )  # fmt: skip
            gate = tl.sigmoid(y)
            grad *= gate * (1.0 + y * (1.0 - gate))
        tap = tl.load(weight_ptr + channel * stride_w_c + (WIDTH - 1 - ahead) * stride_w_t, mask=present, other=0.0)
        total += grad * tap.to(tl.float32)[None, :]
    target = out_ptr + row.to(tl.int64)[:, None] * channels + channel[None, :]
    mask = (row < rows)[:, None] & present[None, :]
    tl.store(target, round_to(total, out_ptr.dtype.element_ty, INTERPRETED), mask=mask)
