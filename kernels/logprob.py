"""Log-probabilities of chosen tokens and entropies from hidden states, without logits for a whole batch.

The language-model head is frozen, so its gradient is never needed, and the gradient of each token's
log-probability with respect to its hidden state is made while the logits exist, in the forward pass. The backward
pass only scales it by whatever gradient arrives, which makes it exact for any loss on top.

Not here: a head with a bias, one that is trained itself (trained_head.py), and anything about what the
log-probabilities are for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo.kernels.host_matmul import mm, mm_transposed
from grpo.kernels.launch import is_interpreted, next_power_of_2, on_device, round_to, triton_supports
from grpo.kernels.sizes import CPU_BLOCK_BYTES

CPU_CHUNK_BYTES = 24 << 20
"""Logits at once on a CPU, whatever the caller allows: more leaves the caches, and malloc gives it fresh pages each
time (vocabulary 49152, hidden 576, 1024 bfloat16 tokens on two cores: 1.4x slower in one piece)."""
BLOCK_BYTES = {"cpu": CPU_BLOCK_BYTES, "cuda": 128 << 20}
"""Size of each of two wide buffers through which `softmax_stats_` passes a chunk."""


def selected_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk_tokens: int = 1024,
    entropy_gradient: bool = False,
    never: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """log p(target | hidden) and the entropy of p, with p = softmax(softcap(hidden @ weight.T) / temperature).

    hidden: [M, H], after the final norm; float64, float32, bfloat16 or float16. M may be 0.
    weight: [V, H], the head, in the same dtype; must not require a gradient. For `hidden` on a GPU it may be pinned
        on the CPU; then each chunk reads it over the bus twice, or three times with `entropy_gradient`.
    targets: [M], int64 token ids in [0, V).
    temperature: above 0. A model that divides its logits by a constant has it multiplied in here.
    softcap: None, or c for c * tanh(logits / c) (Gemma 2).
    chunk_tokens: rows whose logits exist at once, in `hidden`'s dtype. A CPU may take fewer (`CPU_CHUNK_BYTES`).
    entropy_gradient: let gradients flow through the entropy; costs a second [M, H] and a second product per chunk.
    never: tokens that p gives nothing; not with a softcap, which would bring them back.

    Returns (logprobs [M], entropy [M]) in nats, float64 for float64 inputs and float32 otherwise: the product is
    made in `hidden`'s dtype, as in generation, everything after it in that wider type. The entropy is detached
    unless `entropy_gradient`. For the backward pass one tensor like `hidden` is kept, none where no gradient can
    be asked for. Raises ValueError for arguments outside the above.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden [M, H] and weight [V, H] do not fit: {tuple(hidden.shape)}, {tuple(weight.shape)}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets must have shape [{hidden.shape[0]}], not {list(targets.shape)}")
    if weight.requires_grad:
        raise ValueError("weight requires a gradient; the head must be frozen")
    if temperature <= 0 or chunk_tokens < 1:
        raise ValueError(f"temperature = {temperature} and chunk_tokens = {chunk_tokens} must be positive")
    if never and softcap is not None:
        raise ValueError("tokens cannot be left out under a softcap")
    wants_gradient = hidden.requires_grad and torch.is_grad_enabled()
    logprobs, entropy = _SelectedLogprobs.apply(
        hidden, weight, targets.contiguous(), temperature, softcap, chunk_tokens, wants_gradient, entropy_gradient,
        never,
    )  # fmt: skip
    return logprobs, entropy


def chunk_rows(hidden: Tensor, vocabulary: int, chunk_tokens: int) -> int:
    """Rows of `hidden` whose logits exist at once."""
    chunk = max(1, min(chunk_tokens, hidden.shape[0]))
    if hidden.device.type == "cpu":
        chunk = max(1, min(chunk, CPU_CHUNK_BYTES // (vocabulary * hidden.itemsize)))
    return chunk


OUT_OF_REACH = -30_000.0
"""A logit that no sampling draws, finite in every dtype so that entropies stay numbers."""


def put_out_of_reach(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    """`logits` [..., V], in place with no probability for `tokens`."""
    for token in tokens:
        logits[..., token] = OUT_OF_REACH
    return logits


class _SelectedLogprobs(torch.autograd.Function):
    """Chunks of rows: product, `softmax_stats_`, product. Saves d logprob / d hidden, and d entropy / d hidden."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        softcap: float | None,
        chunk_tokens: int,
        wants_gradient: bool,
        entropy_gradient: bool,
        never: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        rows, vocabulary = hidden.shape[0], weight.shape[0]
        chunk = chunk_rows(hidden, vocabulary, chunk_tokens)
        logprobs = hidden.new_empty(rows, dtype=_wide(hidden.dtype))
        entropy = torch.empty_like(logprobs)
        logits = hidden.new_empty(chunk, vocabulary)
        logprob_grad = torch.empty_like(hidden) if wants_gradient else None
        entropy_grad = torch.empty_like(hidden) if wants_gradient and entropy_gradient else None
        entropy_logits_grad = torch.empty_like(logits) if entropy_grad is not None else None

        for start in range(0, rows, chunk):
            part = slice(start, min(start + chunk, rows))
            size = part.stop - start
            mm_transposed(hidden[part], weight, out=logits[:size])
            put_out_of_reach(logits[:size], never)
            stats = softmax_stats_(
                logits[:size],
                targets[part],
                temperature,
                softcap,
                gradient=wants_gradient,
                entropy_gradient=None if entropy_logits_grad is None else entropy_logits_grad[:size],
            )
            logprobs[part], entropy[part] = stats
            if logprob_grad is not None:
                mm(logits[:size], weight, out=logprob_grad[part])
            if entropy_grad is not None and entropy_logits_grad is not None:
                mm(entropy_logits_grad[:size], weight, out=entropy_grad[part])

        ctx.scale = -1.0 / temperature
        ctx.save_for_backward(logprob_grad, entropy_grad)
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        logprob_grad, entropy_grad = ctx.saved_tensors
        scaled = (grad_logprobs * ctx.scale)[:, None]
        if entropy_grad is not None:
            wide = scaled * logprob_grad + (grad_entropy * ctx.scale)[:, None] * entropy_grad
            return wide.to(logprob_grad.dtype), *[None] * 8
        # The product is computed in the wider type and rounded once, without a tensor of that type.
        grad_hidden = torch.mul(scaled, logprob_grad, out=torch.empty_like(logprob_grad))
        return grad_hidden, *[None] * 8


class SoftmaxStats(NamedTuple):
    """Per row of a chunk: log-probability of the target and entropy, both [C], in nats."""

    logprobs: Tensor
    entropy: Tensor


def softmax_stats_(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
    *,
    gradient: bool,
    entropy_gradient: Tensor | None = None,
) -> SoftmaxStats:
    """Statistics of softmax(softcap(logits) / temperature); everything between the two matrix products.

    logits: [C, V], raw products. With `gradient` they are overwritten by -temperature * d logprob / d logits, which is
        p - onehot(target), times 1 - tanh(logits / softcap)^2 under a softcap; otherwise they are left alone.
    entropy_gradient: [C, V] in `logits`' dtype to receive -temperature * d entropy / d logits, or None.

    One kernel on a GPU. Elsewhere the rows go through a small workspace in float32 (float64 for float64), so a chunk
    exists once, in its dtype.
    """
    if triton_supports(logits):
        return launch_softmax_stats(
            logits, targets, temperature, softcap, gradient=gradient, entropy_gradient=entropy_gradient
        )
    wide = _wide(logits.dtype)
    rows, vocabulary = logits.shape
    block_bytes = BLOCK_BYTES.get(logits.device.type, BLOCK_BYTES["cuda"])
    block = max(1, block_bytes // (vocabulary * wide.itemsize))
    workspace = logits.new_empty(2, min(block, rows), vocabulary, dtype=wide)
    logprobs = logits.new_empty(rows, dtype=wide)
    entropy = torch.empty_like(logprobs)
    for start in range(0, rows, block):
        part = slice(start, min(start + block, rows))
        x, logs = workspace[:, : part.stop - start]
        index = targets[part, None]
        slope = None
        x.copy_(logits[part])
        if softcap is not None:
            x.div_(softcap).tanh_()
            slope = 1 - x * x if gradient else None
            x.mul_(softcap)
        if temperature != 1.0:
            x.div_(temperature)
        torch.log_softmax(x, -1, out=logs)
        logprobs[part] = logs.gather(-1, index)[:, 0]
        p = torch.exp(logs, out=x)
        entropy[part] = -logs.mul_(p).sum(-1)
        if entropy_gradient is not None:
            logs.addcmul_(p, entropy[part, None])
            entropy_gradient[part] = logs if slope is None else logs.mul_(slope)
        if gradient:
            # In float32, so that p - 1 of a confident token does not round to 0.
            p.scatter_add_(-1, index, p.new_full(index.shape, -1.0))
            logits[part] = p if slope is None else p.mul_(slope)
    return SoftmaxStats(logprobs, entropy)


def launch_softmax_stats(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
    *,
    gradient: bool,
    entropy_gradient: Tensor | None = None,
) -> SoftmaxStats:
    """The Triton form of `softmax_stats_`: a row is read from memory once, from the cache again, and written once."""
    rows, vocabulary = logits.shape
    second = logits if entropy_gradient is None else entropy_gradient
    assert rows > 0 and logits.stride(1) == second.stride(1) == targets.stride(0) == 1 and targets.dtype == torch.int64
    logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    entropy = torch.empty_like(logprobs)
    block = min(ROW_BLOCK, next_power_of_2(vocabulary))
    with on_device(logits):
        _softmax_stats_kernel[(rows,)](
            logits, targets, second, logprobs, entropy, vocabulary, logits.stride(0), second.stride(0),
            1.0 / temperature, softcap or 1.0, softcap is not None, gradient, entropy_gradient is not None, block,
            is_interpreted(logits), num_warps=8,
        )  # fmt: skip
    return SoftmaxStats(logprobs, entropy)


ROW_BLOCK = 4096
"""Columns of a row that a program handles at once."""


@triton.jit
def _curve(x, cap):
    """tanh(x / cap), in a form that saturates."""
    return 1.0 - 2.0 / (tl.exp(x * (2.0 / cap)) + 1.0)


@triton.jit
def _tempered(x, cap, inverse_temperature, SOFTCAP: tl.constexpr):
    """cap tanh(x / cap), or x, over the temperature."""
    if SOFTCAP:
        x = cap * _curve(x, cap)
    return x * inverse_temperature


@triton.jit
def _softmax_stats_kernel(
    logits_ptr, targets_ptr, entropy_grad_ptr, logprobs_ptr, entropy_ptr, vocabulary,
    stride_m, stride_entropy_grad_m, inverse_temperature, cap,
    SOFTCAP: tl.constexpr, GRADIENT: tl.constexpr, ENTROPY_GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One row: maximum, sum of exponentials and their weighted sum in one pass, gradients in another."""
    row = tl.program_id(0).to(tl.int64)
    source = logits_ptr + row * stride_m
    target = tl.load(targets_ptr + row)
    chosen = _tempered(tl.load(source + target).to(tl.float32), cap, inverse_temperature, SOFTCAP)
    largest = -3e38  # not -inf: the first rescaling multiplies it by 0
    total = 0.0
    weighted = 0.0
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < vocabulary
        raw = tl.load(source + column, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(inside, _tempered(raw, cap, inverse_temperature, SOFTCAP), float("-inf"))
        higher = tl.maximum(largest, tl.max(x, 0))
        scale = tl.exp(largest - higher)
        power = tl.exp(x - higher)
        # Relative to the maximum: a difference of large numbers would cost the entropy its digits.
        moved = (weighted + (largest - higher) * total) * scale
        weighted = moved + tl.sum(tl.where(inside, power * (x - higher), 0.0), 0)
        total = total * scale + tl.sum(power, 0)
        largest = higher
    normaliser = largest + tl.log(total)
    entropy = tl.log(total) - weighted / total
    tl.store(logprobs_ptr + row, chosen - normaliser)
    tl.store(entropy_ptr + row, entropy)
    if GRADIENT:
        for start in range(0, vocabulary, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < vocabulary
            raw = tl.load(source + column, mask=inside, other=0.0).to(tl.float32)
            log = _tempered(raw, cap, inverse_temperature, SOFTCAP) - normaliser
            p = tl.exp(log)
            # In float32, so that p - 1 of a confident token does not round to 0.
            first = tl.where(column == target, p - 1.0, p)
            other = p * (log + entropy)
            if SOFTCAP:
                curve = _curve(raw, cap)
                first *= 1.0 - curve * curve
                other *= 1.0 - curve * curve
            if ENTROPY_GRADIENT:
                target_ptrs = entropy_grad_ptr + row * stride_entropy_grad_m + column
                tl.store(target_ptrs, round_to(other, entropy_grad_ptr.dtype.element_ty, INTERPRETED), mask=inside)
            tl.store(source + column, round_to(first, logits_ptr.dtype.element_ty, INTERPRETED), mask=inside)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
