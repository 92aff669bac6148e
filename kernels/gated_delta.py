"""The gated delta rule over packed sequences that may continue a shared prompt: the recurrent part of Qwen 3.5.

For every head and token t, with a state S [key, value] that begins empty or as the prompt left it:

    S <- exp(g_t) S;  S <- S + beta_t k_t (v_t - k_t S);  y_t = q_t S / sqrt(key)

where q and k are divided by their length. Computed by chunks of 64 tokens (Yang et al., 2024, arXiv:2412.06464): within
a chunk by products of matrices and one triangular system, from chunk to chunk by the state. All in float32, whatever
the inputs are, as the state adds up rounding errors over a whole sequence; on a CPU float32 inputs are computed in
float64, since there float32 is chosen to be exact. The backward computes everything again from
the inputs, some heads at a time, so nothing but these is kept.

Not here: the convolution before it (short_conv.py), and the state of a sequence that is being sampled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo.kernels import delta_rule
from grpo.kernels.launch import accumulation_dtype, unit_stride
from grpo.kernels.recurrence import CHUNK, Recurrence, Stage
from grpo.kernels.sizes import DELTA_RULE_BYTES, DELTA_RULE_TENSORS

EPS = 1e-6
"""Added to the square of a length."""

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""query, key, value, decay, beta."""


def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, recurrence: Recurrence
) -> Tensor:
    """y [tokens, value heads, value dim] in the dtype of `value`, with gradients for all five.

    query, key [tokens, key heads, key dim], each for as many neighbouring value heads; value [tokens, value heads,
    value dim]; decay (g, at most 0, float32) and beta [tokens, value heads].
    """
    assert query.shape == key.shape and value.shape[1] % key.shape[1] == 0, (query.shape, key.shape, value.shape)
    assert len(value) == recurrence.tokens, (value.shape, recurrence.tokens)
    inputs = delta_rule.Inputs(query, key, value, decay, beta)
    return FORMS["kernels" if delta_rule.serves(inputs) else "torch"].apply(recurrence, *inputs)


class _GatedDelta(torch.autograd.Function):
    """By torch."""

    @staticmethod
    def forward(ctx: Any, recurrence: Recurrence, *inputs: Tensor) -> Tensor:
        ctx.recurrence = recurrence
        ctx.save_for_backward(*inputs)
        out = torch.empty_like(inputs[2])
        for _, of_values, taken in by_heads(recurrence, inputs):
            for stage, result in zip(recurrence.stages, rule(taken, recurrence.stages), strict=True):
                put(result, stage, out[:, of_values])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        stages, inputs = ctx.recurrence.stages, ctx.saved_tensors
        grads = [torch.empty_like(tensor) for tensor in inputs]
        for of_keys, of_values, taken in by_heads(ctx.recurrence, inputs):
            leaves = [[part.requires_grad_() for part in parts] for parts in taken]
            with torch.enable_grad():
                results = rule(leaves, stages)
            taken_grads = [
                take(grad[:, of_values], stage, result.dtype) * stage.inside[:, None, :, None]
                for stage, result in zip(stages, results, strict=True)
            ]
            flat = [leaf for parts in leaves for leaf in parts]
            found = iter(torch.autograd.grad(results, flat, taken_grads))
            for stage in stages:
                for index, total in enumerate(grads):
                    put(next(found), stage, total[:, of_keys if index < 2 else of_values])
        return None, *grads


class _GatedDeltaKernels(torch.autograd.Function):
    """By delta_rule.py."""

    @staticmethod
    def forward(ctx: Any, recurrence: Recurrence, *inputs: Tensor) -> Tensor:
        inputs = tuple(map(unit_stride, inputs))
        ctx.recurrence = recurrence
        ctx.save_for_backward(*inputs)
        out = torch.empty(inputs[2].shape, dtype=inputs[2].dtype, device=inputs[2].device)
        run = recurrence.run
        for _, of_values, some in head_groups(recurrence, inputs):
            delta_rule.along(some, run, delta_rule.prepare(some, run, EPS), EPS, out[:, of_values])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        run, inputs, grad = ctx.recurrence.run, ctx.saved_tensors, unit_stride(grad)
        grads = [torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in inputs]
        for of_keys, of_values, some in head_groups(ctx.recurrence, inputs):
            made, kept = delta_rule.prepare(some, run, EPS), delta_rule.empty_kept(some, run)
            delta_rule.along(some, run, made, EPS, kept=kept)
            later = delta_rule.back(some, run, made, EPS, grad[:, of_values])
            del made
            heads = (of_keys, of_keys, of_values, of_values, of_values)
            out = [total[:, part] for total, part in zip(grads, heads, strict=True)]
            delta_rule.input_grads(some, run, EPS, grad[:, of_values], kept, later, out)
        return None, *grads


def head_groups(recurrence: Recurrence, inputs: Sequence[Tensor]) -> Iterator[tuple[slice, slice, delta_rule.Inputs]]:
    """Heads that the kernels compute together: (those of keys, those of values, their inputs)."""
    query, _, value, _, _ = inputs
    key_heads, shared = query.shape[1], value.shape[1] // query.shape[1]
    one = shared * delta_rule.bytes_of_head(recurrence.run, query.shape[2], value.shape[2])
    together = max(1, DELTA_RULE_BYTES // one)
    for first in range(0, key_heads, together):
        of_keys = slice(first, min(first + together, key_heads))
        of_values = slice(of_keys.start * shared, of_keys.stop * shared)
        heads = (of_keys, of_keys, of_values, of_values, of_values)
        some = [tensor.detach()[:, part] for tensor, part in zip(inputs, heads, strict=True)]
        yield of_keys, of_values, delta_rule.Inputs(*some)


FORMS: dict[str, type[torch.autograd.Function]] = {"torch": _GatedDelta, "kernels": _GatedDeltaKernels}
"""What `gated_delta_rule` chooses from: each takes the recurrence and its five tensors."""


def by_heads(recurrence: Recurrence, inputs: Sequence[Tensor]) -> Iterator[tuple[slice, slice, list[list[Tensor]]]]:
    """Heads that are computed together: (those of keys, those of values, their inputs laid out for each stage)."""
    query, _, value, _, _ = inputs
    key_heads, shared = query.shape[1], value.shape[1] // query.shape[1]
    dtype = rule_dtype(value)
    tokens = sum(stage.tokens.numel() for stage in recurrence.stages)
    one = tokens * shared * (query.shape[2] + value.shape[2]) * dtype.itemsize * DELTA_RULE_TENSORS
    together = max(1, DELTA_RULE_BYTES // one)
    for first in range(0, key_heads, together):
        of_keys = slice(first, min(first + together, key_heads))
        of_values = slice(of_keys.start * shared, of_keys.stop * shared)
        heads = (of_keys, of_keys, of_values, of_values, of_values)
        taken = [
            [take(tensor.detach()[:, part], stage, dtype) for tensor, part in zip(inputs, heads, strict=True)]
            for stage in recurrence.stages
        ]
        yield of_keys, of_values, taken


def rule_dtype(value: Tensor) -> torch.dtype:
    """What the rule is computed in for such values."""
    exact = value.dtype == torch.float32 and value.device.type == "cpu"
    return torch.float64 if exact else accumulation_dtype(value.dtype)


def take(tensor: Tensor, stage: Stage, dtype: torch.dtype) -> Tensor:
    """[tokens, heads, ...] laid out by chunks: [chunks, heads, CHUNK, ...]."""
    return tensor[stage.tokens].transpose(1, 2).to(dtype, memory_format=torch.contiguous_format)


def put(chunks: Tensor, stage: Stage, out: Tensor) -> None:
    """The tokens of `chunks`, laid out as by `take`, into their places of `out` [tokens, heads, ...]."""
    flat = chunks.transpose(1, 2).flatten(0, 1)
    out.index_copy_(0, stage.packed, flat.index_select(0, stage.filled).to(out.dtype))


def rule(taken: Sequence[Sequence[Tensor]], stages: Sequence[Stage]) -> list[Tensor]:
    """y of every stage [chunks, heads, CHUNK, value dim] from its inputs as `take` lays them out."""
    states: Tensor | None = None
    results = []
    for parts, stage in zip(taken, stages, strict=True):
        query, key, value, decay, beta = parts
        heads, shape = value.shape[1], (key.shape[-1], value.shape[-1])
        if stage.parents is None or states is None:
            begin = value.new_zeros(stage.running[0], heads, *shape)
        else:  # a product, whose gradient adds up a prompt's completions in one order
            begin = (stage.parents.to(states.dtype) @ states.flatten(1)).unflatten(1, states.shape[1:])
        result, states = chunked(query, key, value, decay, beta, begin, stage)
        results.append(result)
    return results


def chunked(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, begin: Tensor, stage: Stage
) -> tuple[Tensor, Tensor]:
    """(y, the state after each span [spans, heads, key dim, value dim]) from `begin`, the states before.

    query, key [chunks, key heads, CHUNK, key dim], value [chunks, heads, CHUNK, value dim], decay and beta [chunks,
    heads, CHUNK].
    """
    shared = value.shape[1] // key.shape[1]
    query, key = (unit(part).repeat_interleave(shared, 1) for part in (query, key))
    query = query * key.shape[-1] ** -0.5
    # What lies beyond a span's end changes nothing: it forgets nothing and writes nothing.
    decay, beta = (part * stage.inside[:, None] for part in (decay, beta))
    passed = decay.cumsum(-1)
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=value.device).triu(1)
    between = (passed[..., :, None] - passed[..., None, :]).masked_fill(later, float("-inf")).exp()
    weighted = key * beta[..., None]
    system = (weighted @ key.transpose(-1, -2)) * between
    right = torch.cat([value * beta[..., None], weighted * passed.exp()[..., None]], -1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    written, read = solved.split([value.shape[-1], key.shape[-1]], -1)
    within = (query @ key.transpose(-1, -2)) * between
    query = query * passed.exp()[..., None]
    key = key * (passed[..., -1:] - passed).exp()[..., None]
    return scan(query, key, written, read, within, passed[..., -1].exp(), begin, stage.running)


def scan(
    query: Tensor, key: Tensor, written: Tensor, read: Tensor, within: Tensor, kept: Tensor, state: Tensor,
    running: Sequence[int],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The state from chunk to chunk, and what each reads of it; see `chunked`."""
    outputs, finished, first = [], [], 0
    for step, count in enumerate(running):
        now = slice(first, first + count)
        news = written[now] - read[now] @ state
        outputs.append(query[now] @ state + within[now] @ news)
        state = state * kept[now][..., None, None] + key[now].transpose(-1, -2) @ news
        left = running[step + 1] if step + 1 < len(running) else 0
        finished.append(state[left:])
        state, first = state[:left], first + count
    return torch.cat(outputs), torch.cat(finished[::-1])


def unit(x: Tensor) -> Tensor:
    """`x` [..., dim] divided by its length."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPS)
