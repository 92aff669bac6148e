"""A mixture of experts: which experts a token goes to, and what they make of it, with gradient.

Every token's hidden state goes to the `top_k` experts that its router scores highest; each is a gated MLP, and the
results are added with the router's weights. Rows are sorted by expert, so that an expert's are neighbours and one
grouped product does them all. The experts' weights are frozen: gradients reach the input and the router's logits.

Sampling and training call the same functions, so equal logits choose equal experts. Weights in NF4 or MXFP4 are
dequantised for a product, some experts at a time; for the few rows of a decoding step nf4_experts.py multiplies them as
they are.

Not here: the router's own product, adapters' training state, who is asked for which layer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from grpo.kernels import mxfp4, nf4
from grpo.kernels.expert_rows import gated_backward, places, spread_backward, sum_rows
from grpo.kernels.glu import glu, glu_forward
from grpo.kernels.sizes import EXPERTS_BYTES


class ExpertMatrix(NamedTuple):
    """One matrix [out, in] of every expert, one below the other: [experts * out, in], or packed as NF4 or MXFP4."""

    weight: Tensor
    absmax: Tensor | None
    """The scales of what is packed, as nf4.py or mxfp4.py keeps them."""
    experts: int
    bias: Tensor | None = None
    """[experts, out]"""

    @property
    def dtype(self) -> torch.dtype:
        """What it is computed in."""
        if mxfp4.is_stored(self.absmax):
            return torch.bfloat16
        return self.weight.dtype if self.absmax is None else self.absmax.dtype

    @property
    def shape(self) -> tuple[int, int, int]:
        """(experts, out, in)."""
        packed = 1 if self.absmax is None else 2
        return self.experts, self.weight.shape[0] // self.experts, self.weight.shape[1] * packed

    def dense(self, first: int = 0, last: int | None = None) -> Tensor:
        """Experts `first` to `last` as [experts, out, in] in the compute dtype: a view, or dequantised anew."""
        _, out, columns = self.shape
        rows = self._rows(first, last)
        if self.absmax is None:
            return self.weight[rows].view(-1, out, columns)
        return self._dequantize(rows).view(-1, out, columns)

    def dense_beside(self, first: int, last: int, more: Tensor) -> Tensor:
        """[experts, out, in + R]: experts `first` to `last`, and beside each its part of more [experts, out, R]."""
        _, out, columns = self.shape
        rows = self._rows(first, last)
        wide = torch.empty(last - first, out, columns + more.shape[2], dtype=self.dtype, device=self.weight.device)
        wide[..., columns:] = more[first:last]
        left = wide.view(-1, wide.shape[2])[:, :columns]
        if self.absmax is None:
            left.copy_(self.weight[rows])
        else:
            self._dequantize(rows, left)
        return wide

    def _rows(self, first: int, last: int | None) -> slice:
        out = self.shape[1]
        return slice(first * out, (self.experts if last is None else last) * out)

    def _dequantize(self, rows: slice, out: Tensor | None = None) -> Tensor:
        assert self.absmax is not None
        form = mxfp4 if mxfp4.is_stored(self.absmax) else nf4
        return form.dequantize(self.weight[rows], self.absmax[rows], out)


class Experts(NamedTuple):
    """The experts of a block: gate_up [2 * inner, hidden] of each, gate above up, and down [hidden, inner]."""

    gate_up: ExpertMatrix
    down: ExpertMatrix
    activation: str
    """One of `glu.ACTIVATIONS`."""


class ExpertAdapter(NamedTuple):
    """LoRA of every expert on one of its matrices: a [experts, R, in] and b [experts, out, R], which is s B."""

    a: Tensor
    b: Tensor


class ExpertAdapters(NamedTuple):
    """Those of a block."""

    gate_up: ExpertAdapter | None
    down: ExpertAdapter | None
    on: Tensor | None = None
    """One number that their terms are multiplied by while sampling, read on the device; None: 1."""


class Groups(NamedTuple):
    """Rows sorted by expert. `order` int64 [rows]: which pair of a token and one of its experts, counted by tokens, is
    at each place; `ends` int32 [experts]: one past each expert's last row; `place` int64 [rows]: that of each pair."""

    order: Tensor
    ends: Tensor
    place: Tensor


def route(logits: Tensor, top_k: int, renormalize: bool, chosen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Each token's experts and their weights: (float [tokens, top_k] in the logits' dtype, int64 [tokens, top_k]).

    logits [tokens, experts]. The largest `top_k` of their softmax (float32), or those that are `chosen` already.
    """
    probabilities = torch.softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
    if chosen is None:
        weights, chosen = torch.topk(probabilities, top_k, dim=-1)
    else:
        weights = probabilities.gather(-1, chosen)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights.to(logits.dtype), chosen


def group(chosen: Tensor, experts: int) -> Groups:
    """The pairs of `chosen` [tokens, top_k], sorted by expert and, within one, by token; the host is not waited for."""
    narrow = torch.int16 if experts < 1 << 15 else chosen.dtype  # a sort on a GPU passes over every byte of a key
    sorted_experts, order = torch.sort(chosen.reshape(-1).to(narrow), stable=True)
    numbers = torch.arange(1, experts + 1, device=chosen.device, dtype=narrow)
    return Groups(order, torch.searchsorted(sorted_experts, numbers, out_int32=True), places(order))


def experts_mlp(
    x: Tensor, experts: Experts, chosen: Tensor, weights: Tensor, adapters: ExpertAdapters | None = None
) -> Tensor:
    """x [tokens, hidden] through each token's experts, summed with `weights`, rounded once; with gradient for x,
    weights [tokens, top_k] and the adapters' factors."""
    if adapters is not None:
        return adapted_mlp(x, experts, group(chosen, experts.gate_up.experts), weights, adapters)
    if torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad):
        return _ExpertsMlp.apply(x, weights, chosen, experts)
    return forward(x, experts, group(chosen, experts.gate_up.experts), weights)[0]


def adapted_mlp(
    x: Tensor, experts: Experts, groups: Groups, weights: Tensor, adapters: ExpertAdapters, *, by_pieces: bool = True
) -> Tensor:
    """The same with adapters, of which rows and inner products are kept for the backward."""
    top_k, (ends, on) = weights.shape[1], (groups.ends, adapters.on)
    gate_up = adapted(x[groups.order // top_k], experts.gate_up, ends, adapters.gate_up, on, by_pieces)
    rows = adapted(glu(gate_up, experts.activation), experts.down, ends, adapters.down, on, by_pieces)
    return _Combine.apply(rows, weights, groups.order, groups.place)


def adapted(
    x: Tensor, matrix: ExpertMatrix, ends: Tensor, adapter: ExpertAdapter | None, on: Tensor | None, by_pieces: bool
) -> Tensor:
    """Sorted rows x times W^T of their experts plus (x A^T) (s B)^T, rounded once."""
    if adapter is None:
        return _Adapted.apply(x, None, None, matrix, ends, by_pieces)
    x_lora_a = _ByExpert.apply(x, adapter.a, ends)
    if on is not None:
        x_lora_a = x_lora_a * on
    return _Adapted.apply(x, x_lora_a, adapter.b, matrix, ends, by_pieces)


class _ByExpert(torch.autograd.Function):
    """Sorted rows x [rows, in] times the transpose of a [experts, R, in], which is trained."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, a, ends)
        return multiply(x, a, ends, transposed=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a, ends = ctx.saved_tensors
        return multiply(grad, a, ends, transposed=True), outer(grad, x, ends), None


class _Adapted(torch.autograd.Function):
    """x W^T + x_lora_a b^T by one product with [W | b]; W, dequantised again in the backward, is frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, x_lora_a: Tensor | None, b: Tensor | None, matrix: ExpertMatrix, ends: Tensor,
        by_pieces: bool,
    ) -> Tensor:  # fmt: skip
        ctx.matrix = matrix
        ctx.save_for_backward(x_lora_a, b, ends)
        low_rank = None if x_lora_a is None or b is None else (x_lora_a, b)
        return grouped(x, matrix, ends, low_rank=low_rank, by_pieces=by_pieces)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_lora_a, b, ends = ctx.saved_tensors
        x_grad = grouped(grad, ctx.matrix, ends, transposed=True) if ctx.needs_input_grad[0] else None
        if b is None:
            return x_grad, None, None, None, None, None
        return x_grad, multiply(grad, b, ends, transposed=True), outer(grad, x_lora_a, ends), None, None, None


def outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """[experts, M, N]: of each expert the transpose of its rows of left [rows, M] times those of right [rows, N]."""
    columns, step = (left.shape[1], right.shape[1]), 16 // left.element_size()
    left, right = (F.pad(each, (0, -each.shape[1] % step)).contiguous() for each in (left, right))
    result = F.grouped_mm(left.t(), right, offs=ends)[:, : columns[0], : columns[1]]
    empty = torch.diff(ends, prepend=ends.new_zeros(1)) == 0  # of which a library may leave what was there
    return result.masked_fill(empty[:, None, None], 0)


def sampled_mlp(
    x: Tensor, experts: Experts, chosen: Tensor, weights: Tensor, adapters: ExpertAdapters | None = None
) -> Tensor:
    """`experts_mlp` without gradient and without waiting for the device: packed matrices are dequantised whole."""
    if adapters is not None:
        return adapted_mlp(x, experts, group(chosen, experts.gate_up.experts), weights, adapters, by_pieces=False)
    return forward(x, experts, group(chosen, experts.gate_up.experts), weights, by_pieces=False)[0]


def forward(
    x: Tensor, experts: Experts, groups: Groups, weights: Tensor, *, by_pieces: bool = True
) -> tuple[Tensor, Tensor]:
    """(The result [tokens, hidden], gate and up of every row [rows, 2 * inner] for the backward)."""
    top_k = weights.shape[1]
    gate_up = grouped(x[groups.order // top_k], experts.gate_up, groups.ends, by_pieces=by_pieces)
    inner = glu_forward(gate_up, experts.activation)
    rows = grouped(inner, experts.down, groups.ends, by_pieces=by_pieces)
    return sum_rows(rows, weights.contiguous(), groups.place, top_k), gate_up


class _Combine(torch.autograd.Function):
    """Every token's rows times their weights, added up and rounded once; keeps the rows once."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, order: Tensor, place: Tensor) -> Tensor:
        weights = weights.contiguous()
        ctx.save_for_backward(rows, weights, order, place)
        return sum_rows(rows, weights, place, weights.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weights, order, place = ctx.saved_tensors
        rows_grad, flat = spread_backward(grad.contiguous(), rows, weights, order)
        return rows_grad, flat[place].view_as(weights).to(weights.dtype), None, None


class _ExpertsMlp(torch.autograd.Function):
    """Keeps gate and up, and where rows are; everything else is computed again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, chosen: Tensor, experts: Experts) -> Tensor:
        groups = group(chosen, experts.gate_up.experts)
        result, gate_up = forward(x, experts, groups, weights)
        ctx.experts = experts
        ctx.save_for_backward(weights, chosen, gate_up, *groups)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, chosen, gate_up, order, ends, place = ctx.saved_tensors
        experts, top_k = ctx.experts, weights.shape[1]
        inner = grouped(grad[order // top_k], experts.down, ends, transposed=True)  # but for the rows' weights
        row_weights = weights.reshape(-1)[order]
        gate_up_grad, of_rows = gated_backward(inner, gate_up, row_weights, experts.activation)
        del inner
        weights_grad = of_rows[place].view_as(weights)
        if experts.down.bias is not None:  # a row's result has it too
            of_experts = grad.to(of_rows.dtype) @ experts.down.bias.t().to(of_rows.dtype)
            weights_grad = weights_grad + of_experts.gather(1, chosen)
        x_rows = grouped(gate_up_grad, experts.gate_up, ends, transposed=True)
        return sum_rows(x_rows, None, place, top_k), weights_grad.to(weights.dtype), None, None


def grouped(
    x: Tensor,
    matrix: ExpertMatrix,
    ends: Tensor,
    *,
    transposed: bool = False,
    by_pieces: bool = True,
    low_rank: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Rows of x, sorted by expert, times W^T of their experts; `transposed`: times W. By pieces the host is waited for,
    and no more than EXPERTS_BYTES are dequantised at once. low_rank: s [rows, R] and b [experts, out, R], of which s
    b^T is added before the sum is rounded."""
    experts, out, columns = matrix.shape
    more = None if transposed else columns_beside(matrix, low_rank)
    if more is not None:
        of_adapter = x[:, :0] if low_rank is None else low_rank[0]
        ones = x.new_zeros(len(x), more.shape[2] - of_adapter.shape[1])
        ones[:, :1] = 1
        x = torch.cat([x, of_adapter, ones], 1)

    def weight(first: int, last: int) -> Tensor:
        return matrix.dense(first, last) if more is None else matrix.dense_beside(first, last, more)

    step = max(1, EXPERTS_BYTES // (out * x.shape[1] * x.element_size()))
    if not by_pieces or step >= experts or (matrix.absmax is None and more is None):
        return multiply(x, weight(0, experts), ends, transposed)
    result = x.new_empty(x.shape[0], columns if transposed else out)
    rows = [0, *ends.tolist()]
    for first in range(0, experts, step):
        last = min(first + step, experts)
        part = slice(rows[first], rows[last])
        if part.stop > part.start:
            here = ends[first:last] - part.start
            result[part] = multiply(x[part], weight(first, last), here, transposed)
    return result


def columns_beside(matrix: ExpertMatrix, low_rank: tuple[Tensor, Tensor] | None) -> Tensor | None:
    """[experts, out, R + ...] that W is widened by, so that one product rounds once: an adapter's b, then the bias for
    a column of ones and zeros up to whole 16 bytes. None: nothing."""
    parts = [] if low_rank is None else [low_rank[1]]
    if matrix.bias is not None:
        parts.append(matrix.bias[..., None])
    if not parts:
        return None
    width = sum(part.shape[2] for part in parts)
    filled = -(width + matrix.shape[2]) % (16 // matrix.dtype.itemsize)
    return F.pad(torch.cat(parts, 2), (0, filled))


def multiply(x: Tensor, weight: Tensor, ends: Tensor, transposed: bool) -> Tensor:
    """The grouped product with weight [experts, out, in]."""
    out = weight.shape[2 if transposed else 1]
    weight = weight if transposed else weight.mT  # [experts, in, out]
    step = 16 // x.element_size()
    if x.shape[1] % step or out % step:  # strides are whole 16 bytes
        more_in, more_out = -x.shape[1] % step, -out % step
        x, weight = F.pad(x, (0, more_in)), F.pad(weight, (0, more_out, 0, more_in))
    return F.grouped_mm(x.contiguous(), weight, offs=ends)[:, :out].contiguous()
