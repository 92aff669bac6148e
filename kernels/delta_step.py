"""Gated DeltaNet while sampling, on pages of states: one token of each sequence, and the convolution of prompts.

One token is one launch: the convolution over its channels, the gates, the rule of gated_delta.py, and the gated norm

    y <- y / rms(y) * weight * silu(gate)

of what it gives. Everything is in float32 but for what training rounds, which is rounded here too: the convolution's
result and the rule's. So both graphs make the same numbers of the same inputs.

Pages are vLLM's: of each sequence the convolution's last inputs [width - 1, channels] and the states [heads, value dim,
key dim] in float32. Page 0 belongs to nobody: rows that a captured graph has too many point there.

Not here: the rule over prompts (delta_rule.py), gradients.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo.kernels.delta_rule import Tile
from grpo.kernels.launch import is_interpreted, on_device, round_to

STEP = Tile(32, 4, 1)
"""Of `step`: how much of a state's value dimension a program has at a time."""
ROWS, CHANNELS = 16, 128
"""Of a program's tile of `convolve`."""


class Weights(NamedTuple):
    """What a layer has beside its linear layers."""

    conv: Tensor
    """[channels, width]: those of all queries, then of all keys, then of all values."""
    decay: Tensor
    """A_log [heads]."""
    offset: Tensor
    """dt_bias [heads]."""
    norm: Tensor
    """[value dim]"""
    norm_eps: float
    length_eps: float
    """Added to the squares of the lengths of queries and keys."""
    key_heads: int

    @property
    def heads(self) -> int:
        return len(self.decay)

    @property
    def dims(self) -> tuple[int, int]:
        """Of keys and of values."""
        value = len(self.norm)
        return (len(self.conv) - self.heads * value) // (2 * self.key_heads), value


class Sequences(NamedTuple):
    """Prompts, or parts of them, side by side in a batch."""

    ends: Tensor
    """[sequences + 1]: where each begins and ends."""
    chunks: Tensor
    """[chunks, 2]: its sequence, and its number there."""
    slots: Tensor
    """[sequences]: the pages."""
    begun: Tensor
    """bool [sequences]: whether there were tokens before, which the pages know."""


def step(
    x: Tensor, b: Tensor, a: Tensor, gate: Tensor, weights: Weights, conv: Tensor, states: Tensor, slots: Tensor,
    out: Tensor,
) -> None:  # fmt: skip
    """Write the gated norm of each row's result into `out` [rows, heads * value dim], 0 where the page is 0.

    x [rows, channels], b and a [rows, heads], gate like `out`: last strides 1. conv [pages, width - 1, channels] and
    states float32 [pages, heads, value dim, key dim] are brought up to date. slots: integers [rows].
    """
    heads, (dim, value_dim), (channels, width) = weights.heads, weights.dims, weights.conv.shape
    assert x.shape[1] == channels and out.shape == gate.shape == (len(x), heads * value_dim), (x.shape, out.shape)
    assert a.shape == b.shape == (len(x), heads) and heads % weights.key_heads == 0 and len(slots) == len(x)
    assert conv.shape[1:] == (width - 1, channels) and states.shape[1:] == (heads, value_dim, dim), (conv.shape, dim)
    assert states.dtype == torch.float32 and states[0].is_contiguous() and slots.stride(0) == 1
    assert all(part.stride(1) == 1 for part in (x, a, b, gate, out)) and x.dtype == conv.dtype == out.dtype
    assert all(part.is_contiguous() for part in (weights.decay, weights.offset, weights.norm))
    with on_device(x):
        _step_kernel[(len(x), weights.key_heads)](
            x, b, a, gate, weights.conv, weights.decay, weights.offset, weights.norm, conv, states, slots, out,
            x.stride(0), b.stride(0), a.stride(0), gate.stride(0), out.stride(0), *weights.conv.stride(),
            *conv.stride(), states.stride(0), weights.key_heads, dim, value_dim, dim**-0.5, weights.length_eps,
            weights.norm_eps, heads // weights.key_heads, width, triton.next_power_of_2(dim),
            triton.next_power_of_2(value_dim), min(STEP.columns, triton.next_power_of_2(value_dim)), is_interpreted(x),
            num_warps=STEP.warps, num_stages=STEP.stages,
        )  # fmt: skip


def convolve(x: Tensor, weight: Tensor, conv: Tensor, sequences: Sequences, chunk: int) -> Tensor:
    """SiLU of the convolution of x [tokens, channels], whose sequences continue `conv` where they have begun; `conv`,
    as of `step`, is brought up to date. chunk: tokens of one of `sequences.chunks`."""
    (channels, width), count = weight.shape, len(sequences.slots)
    assert x.shape[1] == channels and conv.shape[1:] == (width - 1, channels), (x.shape, conv.shape)
    assert x.stride(1) == 1 and chunk % ROWS == 0 and width <= ROWS
    assert all(part.is_contiguous() for part in sequences)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    shared = (*sequences[:3], sequences.begun.view(torch.uint8), x.stride(0), *conv.stride())
    across = triton.cdiv(channels, CHANNELS)
    with on_device(x):
        _convolve_kernel[(len(sequences.chunks) * (chunk // ROWS), across)](
            x, weight, conv, out, *shared, *weight.stride(), channels, width, chunk, ROWS, CHANNELS, is_interpreted(x),
        )  # fmt: skip
        _keep_kernel[(count, across)](x, conv, *shared, channels, width, triton.next_power_of_2(width), CHANNELS)
    return out


@triton.jit
def _tapped(
    x_ptr, weight_ptr, conv_ptr, channel, present, stride_w_c, stride_w_t, stride_c_t, stride_c_c,
    WIDTH: tl.constexpr, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """SiLU of the convolution at one token, rounded to DTYPE, of channels whose page is moved on by it."""
    x = tl.load(x_ptr + channel, mask=present, other=0.0)
    weight_ptrs = weight_ptr + channel * stride_w_c
    page_ptrs = conv_ptr + channel * stride_c_c
    tap = tl.load(weight_ptrs + (WIDTH - 1) * stride_w_t, mask=present, other=0.0)
    total = x.to(tl.float32) * tap.to(tl.float32)
    for back in tl.static_range(1, WIDTH):
        before = tl.load(page_ptrs + (WIDTH - 1 - back) * stride_c_t, mask=present, other=0.0)
        tap = tl.load(weight_ptrs + (WIDTH - 1 - back) * stride_w_t, mask=present, other=0.0)
        total += before.to(tl.float32) * tap.to(tl.float32)
    # Several threads may read one place, and one of them writes it.
    tl.debug_barrier()
    for place in tl.static_range(WIDTH - 2):
        moved = tl.load(page_ptrs + (place + 1) * stride_c_t, mask=present, other=0.0)
        tl.store(page_ptrs + place * stride_c_t, moved, mask=present)
    if WIDTH > 1:
        tl.store(page_ptrs + (WIDTH - 2) * stride_c_t, x, mask=present)
    return round_to(total * tl.sigmoid(total), DTYPE, INTERPRETED).to(tl.float32)


@triton.jit
def _step_kernel(
    x_ptr, b_ptr, a_ptr, gate_ptr, weight_ptr, log_ptr, offset_ptr, norm_ptr, conv_ptr, states_ptr, slot_ptr, out_ptr,
    stride_x, stride_b, stride_a, stride_g, stride_o, stride_w_c, stride_w_t, stride_c_s, stride_c_t, stride_c_c,
    stride_s, key_heads, dim, value_dim, scale, eps, norm_eps,
    SHARED: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, WHOLE: tl.constexpr, V: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A sequence's token, for the heads of one head of keys."""
    row, key_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slot_ptr + row).to(tl.int64)
    x_ptr += row * stride_x
    conv_ptr += slot * stride_c_s
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    whole = tl.arange(0, WHOLE)
    if slot <= 0:
        for number in range(SHARED):
            target = out_ptr + row * stride_o + (key_head * SHARED + number) * value_dim + whole
            tl.store(target, tl.zeros([WHOLE], tl.float32).to(DTYPE), mask=whole < value_dim)
        return
    column = tl.arange(0, K)
    present = column < dim
    channel = key_head * dim + column
    q = _tapped(
        x_ptr, weight_ptr, conv_ptr, channel, present, stride_w_c, stride_w_t, stride_c_t, stride_c_c, WIDTH, DTYPE,
        INTERPRETED,
    )  # fmt: skip
    k = _tapped(
        x_ptr, weight_ptr, conv_ptr, key_heads * dim + channel, present, stride_w_c, stride_w_t, stride_c_t, stride_c_c,
        WIDTH, DTYPE, INTERPRETED,
    )  # fmt: skip
    for number in range(SHARED):
        # Where the result will be, the values wait for their turn.
        head = key_head * SHARED + number
        v = _tapped(
            x_ptr, weight_ptr, conv_ptr, 2 * key_heads * dim + head * value_dim + whole, whole < value_dim, stride_w_c,
            stride_w_t, stride_c_t, stride_c_c, WIDTH, DTYPE, INTERPRETED,
        )  # fmt: skip
        tl.store(out_ptr + row * stride_o + head * value_dim + whole, v.to(DTYPE), mask=whole < value_dim)
    q *= scale / tl.sqrt(tl.sum(q * q) + eps)
    k *= 1.0 / tl.sqrt(tl.sum(k * k) + eps)
    tl.debug_barrier()
    value = tl.arange(0, V)
    states_ptr += slot * stride_s + key_head * SHARED * value_dim * dim
    place = value[:, None] * dim + column[None, :]
    coming = tl.load(states_ptr + place, mask=(value < value_dim)[:, None] & present[None, :], other=0.0)
    for number in range(SHARED):
        head = key_head * SHARED + number
        t = tl.load(a_ptr + row * stride_a + head).to(tl.float32) + tl.load(offset_ptr + head).to(tl.float32)
        grown = tl.where(t <= 20.0, tl.log(1.0 + tl.exp(tl.minimum(t, 20.0))), t)
        kept = tl.exp(-tl.exp(tl.load(log_ptr + head).to(tl.float32)) * grown)
        beta = tl.sigmoid(tl.load(b_ptr + row * stride_b + head).to(tl.float32))
        out_head = out_ptr + row * stride_o + head * value_dim
        squares = 0.0
        for first in range(0, value_dim, V):
            inside = first + value < value_dim
            own = states_ptr + (number * value_dim + first) * dim + place
            state = coming * kept
            # The next part of the states, of this head or of the next one, is on its way meanwhile.
            last = first + V >= value_dim
            next_first = tl.where(last, 0, first + V)
            next_head = tl.where(last, number + 1, number)
            next_end = tl.where(next_head < SHARED, value_dim, 0)
            source = states_ptr + (next_head * value_dim + next_first) * dim + place
            mask = (next_first + value < next_end)[:, None] & present[None, :]
            coming = tl.load(source, mask=mask, other=0.0)
            v = tl.load(out_head + first + value, mask=inside, other=0.0).to(tl.float32)
            news = (v - tl.sum(state * k[None, :], 1)) * beta
            state += news[:, None] * k[None, :]
            tl.store(own, state, mask=inside[:, None] & present[None, :])
            y = round_to(tl.sum(state * q[None, :], 1), DTYPE, INTERPRETED)
            # Several threads may have read what one of them writes over.
            tl.debug_barrier()
            tl.store(out_head + first + value, y, mask=inside)
            squares += tl.sum(y.to(tl.float32) * y.to(tl.float32))
        # What other threads have stored is read.
        tl.debug_barrier()
        y = tl.load(out_head + whole, mask=whole < value_dim, other=0.0).to(tl.float32)
        z = tl.load(gate_ptr + row * stride_g + head * value_dim + whole, mask=whole < value_dim, other=0.0)
        z = z.to(tl.float32)
        norm = tl.load(norm_ptr + whole, mask=whole < value_dim, other=0.0).to(tl.float32)
        y = y / tl.sqrt(squares / value_dim + norm_eps) * norm * (z * tl.sigmoid(z))
        tl.debug_barrier()
        tl.store(out_head + whole, round_to(y, DTYPE, INTERPRETED), mask=whole < value_dim)


@triton.jit
def _convolve_kernel(
    x_ptr, weight_ptr, conv_ptr, out_ptr, ends_ptr, chunks_ptr, slot_ptr, begun_ptr, stride_x, stride_c_s, stride_c_t,
    stride_c_c, stride_w_c, stride_w_t, channels,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Some rows of a chunk, some channels."""
    chunk = tl.program_id(0) // (CHUNK // ROWS)
    sequence = tl.load(chunks_ptr + 2 * chunk)
    begin, end = tl.load(ends_ptr + sequence).to(tl.int64), tl.load(ends_ptr + sequence + 1).to(tl.int64)
    first = tl.load(chunks_ptr + 2 * chunk + 1) * CHUNK + tl.program_id(0) % (CHUNK // ROWS) * ROWS
    place = first + tl.arange(0, ROWS)
    inside = begin + place < end
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    present = channel < channels
    oldest = tl.where(tl.load(begun_ptr + sequence) != 0, 1 - WIDTH, 0)
    page_ptrs = conv_ptr + tl.load(slot_ptr + sequence).to(tl.int64) * stride_c_s + (channel * stride_c_c)[None, :]
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    for back in tl.static_range(WIDTH):
        source = place - back
        own = inside & (source >= 0)
        value = tl.load(
            x_ptr + (begin + source)[:, None] * stride_x + channel[None, :], mask=own[:, None] & present[None, :],
            other=0.0,
        ).to(tl.float32)  # fmt: skip
        before = inside & (source < 0) & (source >= oldest)
        value += tl.load(
            page_ptrs + ((WIDTH - 1 + source) * stride_c_t)[:, None], mask=before[:, None] & present[None, :], other=0.0
        ).to(tl.float32)
        tap = tl.load(weight_ptr + channel * stride_w_c + (WIDTH - 1 - back) * stride_w_t, mask=present, other=0.0)
        total += value * tap.to(tl.float32)[None, :]
    y = round_to(total * tl.sigmoid(total), out_ptr.dtype.element_ty, INTERPRETED)
    target = out_ptr + (begin + place)[:, None] * channels + channel[None, :]
    tl.store(target, y, mask=inside[:, None] & present[None, :])


@triton.jit
def _keep_kernel(
    x_ptr, conv_ptr, ends_ptr, chunks_ptr, slot_ptr, begun_ptr, stride_x, stride_c_s, stride_c_t, stride_c_c, channels,
    WIDTH: tl.constexpr, W: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A sequence's last inputs into its page, some channels."""
    sequence = tl.program_id(0)
    begin, end = tl.load(ends_ptr + sequence).to(tl.int64), tl.load(ends_ptr + sequence + 1).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    place = tl.arange(0, W)
    kept = (place < WIDTH - 1)[:, None] & (channel < channels)[None, :]
    source = end - begin - (WIDTH - 1) + place
    own = (source >= 0)[:, None]
    x = tl.load(x_ptr + (begin + source)[:, None] * stride_x + channel[None, :], mask=kept & own, other=0.0)
    page_ptrs = conv_ptr + tl.load(slot_ptr + sequence).to(tl.int64) * stride_c_s + (channel * stride_c_c)[None, :]
    oldest = tl.where(tl.load(begun_ptr + sequence) != 0, 1 - WIDTH, 0)
    before = kept & ((source < 0) & (source >= oldest))[:, None]
    old = tl.load(page_ptrs + ((WIDTH - 1 + source) * stride_c_t)[:, None], mask=before, other=0.0)
    tl.debug_barrier()
    tl.store(page_ptrs + (place * stride_c_t)[:, None], tl.where(own, x, old), mask=kept)
