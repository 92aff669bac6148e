"""Draw one token a row from softmax(logits / temperature), and its logprob, without writing a probability.

The Gumbel-max trick: argmax_v(logit_v / T + g_v) with g_v = -log(e_v), e_v exponential, is distributed as the softmax
(Gumbel, 1954; Maddison et al., 2014, arXiv:1411.0030). One pass over the logits finds it together with the running
maximum and sum of exponentials that the logprob needs; a second, tiny kernel combines the pieces of a row.

Not here: top-p, top-k and penalties, which need a sorted or rewritten row; greedy decoding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo.kernels.launch import on_device

PIECE = 8192
"""Columns per program: a row of 128k tokens keeps 16 programs busy."""
BLOCK = 1024


def sample_tokens(logits: Tensor, temperature: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """(token ids int32 [M], their logprobs float32 [M]) drawn from `logits` [M, V], any float dtype, last stride 1.

    temperature: float32 [M], above zero. seed: non-negative, below 2^63; the same seed, rows and logits give the same
    tokens, and every (seed, row, token) has a random number of its own. Arithmetic is float32.
    """
    if logits.is_cuda:
        return launch_sample(logits, temperature, seed)
    scaled = logits.float() / temperature[:, None]
    generator = torch.Generator().manual_seed(seed)
    noise = torch.empty_like(scaled).exponential_(generator=generator)
    tokens = (scaled - noise.log()).argmax(1)
    return tokens.int(), scaled.log_softmax(1).gather(1, tokens[:, None])[:, 0]


def launch_sample(logits: Tensor, temperature: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """The kernels; also in Triton's interpreter."""
    rows, vocabulary = logits.shape
    assert logits.stride(1) == 1 and temperature.shape == (rows,) and temperature.is_contiguous()
    assert temperature.dtype == torch.float32 and 0 <= seed < 2**63
    pieces = triton.cdiv(vocabulary, PIECE)
    partial = torch.empty(4, rows, pieces, dtype=torch.float32, device=logits.device)
    best = torch.empty(rows, pieces, dtype=torch.int32, device=logits.device)
    tokens = torch.empty(rows, dtype=torch.int32, device=logits.device)
    logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    with on_device(logits):
        _piece_kernel[(pieces, rows)](
            logits, temperature, *partial, best, logits.stride(0), vocabulary, pieces, seed, PIECE, BLOCK
        )
        _combine_kernel[(rows,)](*partial, best, tokens, logprobs, pieces, triton.next_power_of_2(pieces))
    return tokens, logprobs


@triton.jit(do_not_specialize=["seed"])
def _piece_kernel(
    logits_ptr, temperature_ptr, maxima_ptr, sums_ptr, scores_ptr, chosen_ptr, best_ptr,
    stride_m, vocabulary, pieces, seed,
    PIECE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One piece of a row: largest scaled logit, sum of exponentials below it, best score, its logit and place."""
    row = tl.program_id(1).to(tl.int64)
    inverse = 1.0 / tl.load(temperature_ptr + row)
    row_ptr = logits_ptr + row * stride_m
    start = tl.program_id(0) * PIECE
    maximum = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    score = tl.full([BLOCK], float("-inf"), tl.float32)
    best_logit = tl.full([BLOCK], float("-inf"), tl.float32)
    best_column = tl.zeros([BLOCK], tl.int32)
    lane = tl.arange(0, BLOCK)
    for offset in range(0, PIECE, 4 * BLOCK):
        column = start + offset + lane
        # One call of the generator makes four numbers.
        bits = tl.randint4x(seed, row * (pieces * PIECE) + column)
        for quarter in tl.static_range(4):
            x = tl.load(row_ptr + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32) * inverse
            higher = tl.maximum(maximum, x)
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp(maximum - shift) + tl.exp(x - shift)
            maximum = higher
            noisy = x - tl.log(_exponential(bits[quarter]))
            better = noisy > score
            score = tl.where(better, noisy, score)
            best_logit = tl.where(better, x, best_logit)
            best_column = tl.where(better, column, best_column)
            column += BLOCK
    top = tl.max(maximum, 0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    won = lane == tl.argmax(score, 0)
    out = row * pieces + tl.program_id(0)
    tl.store(maxima_ptr + out, top)
    tl.store(sums_ptr + out, tl.sum(total * tl.exp(maximum - shift), 0))
    tl.store(scores_ptr + out, tl.max(score, 0))
    tl.store(chosen_ptr + out, tl.sum(tl.where(won, best_logit, 0.0), 0))
    tl.store(best_ptr + out, tl.sum(tl.where(won, best_column, 0), 0))


@triton.jit
def _exponential(bits):
    """A standard exponential number from 32 random bits, exact to float32 where it is tiny: there the winners are."""
    v = (bits.to(tl.uint32, bitcast=True).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    rest = 1.0 - v
    # -log(1 - v) without the rounding of 1 - v (Kahan's log1p); v = 1 gives infinity, which never wins.
    return tl.where(rest == 1.0, v, tl.log(rest) * (v / (rest - 1.0)))


@triton.jit
def _combine_kernel(
    maxima_ptr, sums_ptr, scores_ptr, chosen_ptr, best_ptr, tokens_ptr, logprobs_ptr, pieces, WIDTH: tl.constexpr
):
    row = tl.program_id(0)
    piece = tl.arange(0, WIDTH)
    inside = piece < pieces
    offset = row * pieces + piece
    maximum = tl.load(maxima_ptr + offset, mask=inside, other=float("-inf"))
    score = tl.load(scores_ptr + offset, mask=inside, other=float("-inf"))
    top = tl.max(maximum, 0)
    total = tl.sum(tl.load(sums_ptr + offset, mask=inside, other=0.0) * tl.exp(maximum - top), 0)
    winner = piece == tl.argmax(score, 0)
    value = tl.sum(tl.where(winner, tl.load(chosen_ptr + offset, mask=inside, other=0.0), 0.0), 0)
    tl.store(tokens_ptr + row, tl.sum(tl.where(winner, tl.load(best_ptr + offset, mask=inside, other=0), 0), 0))
    tl.store(logprobs_ptr + row, value - top - tl.log(total))
