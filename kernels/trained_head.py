"""Log-probabilities of chosen tokens where the head is trained too: logits are made in the forward and again in the
backward pass, a chunk of tokens at a time.

`logprob.py` needs no logits in its backward, because what it gives for a hidden state is only scaled there. A head's
gradient sums over tokens, each with its own weight, which is known in the backward pass alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo.kernels import logprob
from grpo.kernels.host_matmul import mm, mm_transposed
from grpo.kernels.weight_gradient import add_outer


def token_logprobs(
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
    """`logprob.selected_logprobs`, for a head `weight` [V, H] that may require a gradient; it is added to
    `weight.grad`. Arguments, results and errors are the same."""
    settings: dict[str, Any] = {"temperature": temperature, "softcap": softcap, "chunk_tokens": chunk_tokens}
    settings["never"] = never
    if not (weight.requires_grad and torch.is_grad_enabled()):
        settings["entropy_gradient"] = entropy_gradient
        return logprob.selected_logprobs(hidden, weight.detach(), targets, **settings)
    with torch.no_grad():
        stats = logprob.selected_logprobs(hidden, weight.detach(), targets, **settings)
    chunk = logprob.chunk_rows(hidden, weight.shape[0], chunk_tokens)
    logprobs, entropy = _TrainedHead.apply(
        hidden, weight, targets.contiguous(), *stats, (temperature, softcap, chunk, entropy_gradient, never)
    )
    return logprobs, entropy


class _TrainedHead(torch.autograd.Function):
    """Gives the statistics that were computed; its backward computes the logits again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        logprobs: Tensor,
        entropy: Tensor,
        settings: tuple[float, float | None, int, bool, Sequence[int]],
    ) -> tuple[Tensor, Tensor]:
        ctx.settings, ctx.weight = settings, weight
        ctx.save_for_backward(hidden, targets)
        logprobs, entropy = logprobs.view_as(logprobs), entropy.view_as(entropy)
        if not settings[3]:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, targets = ctx.saved_tensors
        weight = ctx.weight.detach()
        temperature, softcap, chunk, entropy_gradient, never = ctx.settings
        hidden_grad = torch.empty_like(hidden)
        logits = hidden.new_empty(min(chunk, len(hidden)), weight.shape[0])
        of_entropy = torch.empty_like(logits) if entropy_gradient else None
        for start in range(0, len(hidden), chunk):
            rows = slice(start, min(start + chunk, len(hidden)))
            grads, size = logits[: rows.stop - start], rows.stop - start
            other = None if of_entropy is None else of_entropy[:size]
            mm_transposed(hidden[rows], weight, out=grads)
            logprob.put_out_of_reach(grads, never)
            logprob.softmax_stats_(grads, targets[rows], temperature, softcap, gradient=True, entropy_gradient=other)
            grads.mul_((grad_logprobs[rows] * (-1.0 / temperature))[:, None])
            if other is not None and grad_entropy is not None:
                grads.addcmul_(other, (grad_entropy[rows] * (-1.0 / temperature))[:, None].to(other.dtype))
            mm(grads, weight, out=hidden_grad[rows])
            add_outer(ctx.weight, grads, hidden[rows])
        return hidden_grad, None, None, None, None, None
