"""Rows of a mixture of experts on their way from and to tokens: sums of a token's rows, the gradients of such a sum,
and the gated activation's gradient with that of a row's weight.

Between products every pair of a token and one of its experts has a row, top_k times as many as tokens; what can be
done while rows are read or written anyway is done there, and none is laid out in the order of tokens. Each function
has a torch form, for a CPU and for float64. Not here: products, the choice of experts, what autograd keeps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo.kernels import cards
from grpo.kernels.glu import ACTIVATIONS, gated_gradients, glu_backward
from grpo.kernels.launch import accumulation_dtype, is_interpreted, on_device, round_to, triton_supports

COLUMNS = 1024
"""Of a program, at most."""


def places(order: Tensor) -> Tensor:
    """The place of each pair, of which pair is at each place: the inverse of the permutation `order`, int64."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def sum_rows(rows: Tensor, weights: Tensor | None, place: Tensor, top_k: int) -> Tensor:
    """Every token's `top_k` rows, times `weights` [tokens, top_k] where there are some, added up in float32 and rounded
    once: [tokens, columns]. rows [pairs, columns] and place [pairs] as in `places`."""
    tokens, columns = len(place) // top_k, rows.shape[1]
    if not triton_supports(rows):
        of_tokens = rows[place].view(tokens, top_k, columns).to(accumulation_dtype(rows.dtype))
        scaled = of_tokens if weights is None else of_tokens * weights[..., None].to(of_tokens.dtype)
        return scaled.sum(1).to(rows.dtype)
    out = torch.empty(tokens, columns, dtype=rows.dtype, device=rows.device)
    launch_sum(rows, weights, place, out)
    return out


def launch_sum(rows: Tensor, weights: Tensor | None, place: Tensor, out: Tensor) -> None:
    """The Triton form of `sum_rows`; place int32 or int64."""
    tokens, columns = out.shape
    assert rows.is_contiguous() and out.is_contiguous() and place.is_contiguous() and rows.shape[1] == columns
    assert weights is None or (weights.is_contiguous() and weights.numel() == len(place))
    if not tokens:
        return
    top_k, block = len(place) // tokens, min(COLUMNS, triton.next_power_of_2(columns))
    overlapped = rows.is_cuda and cards.card(rows.device).overlaps
    with on_device(rows):
        _sum_kernel[(tokens, triton.cdiv(columns, block))](
            rows, rows if weights is None else weights, place, out, columns, top_k, block, weights is not None,
            is_interpreted(rows), overlapped, num_warps=4, launch_pdl=overlapped,
        )  # fmt: skip


def spread_backward(grad: Tensor, rows: Tensor, weights: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Of `sum_rows` with weights: (dL/d(rows), dL/d(weight) of each row [rows] in float32 or wider).

    grad [tokens, columns]: that of the sums; order [rows]: the pair at each place.
    """
    (pairs, columns), top_k, wide = rows.shape, weights.shape[1], accumulation_dtype(rows.dtype)
    if not triton_supports(rows):
        of_rows = grad[order // top_k].to(wide)
        row_weights = weights.reshape(-1)[order, None].to(wide)
        return (of_rows * row_weights).to(rows.dtype), (of_rows * rows.to(wide)).sum(-1)
    out, sums = torch.empty_like(rows), torch.empty(pairs, dtype=wide, device=rows.device)
    assert grad.is_contiguous() and rows.is_contiguous() and weights.is_contiguous() and order.is_contiguous()
    assert grad.shape == (len(weights), columns) and len(order) == weights.numel() == pairs
    if pairs:
        block = min(COLUMNS, triton.next_power_of_2(columns))
        with on_device(rows):
            _spread_backward_kernel[(pairs,)](
                grad, rows, weights, order, out, sums, columns, top_k, block, is_interpreted(rows), num_warps=4
            )
    return out, sums


def gated_backward(grad: Tensor, gate_up: Tensor, row_weights: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """(dL/d(gate_up) [rows, 2 I], dL/d(a row's weight) [rows] in float32 or wider) for rows weight * (product W^T).

    grad [rows, I]: of what `glu` makes of gate_up [rows, 2 I], but for the weight: that of the weighted row times W.
    """
    rows, inner = grad.shape
    out = torch.empty_like(gate_up)
    wide = accumulation_dtype(gate_up.dtype)
    if not triton_supports(gate_up):
        product, weighted = torch.empty_like(grad), grad * row_weights[:, None].to(grad.dtype)
        glu_backward(weighted, gate_up, activation, product, out)
        return out, (grad.to(wide) * product.to(wide)).sum(-1)
    sums = torch.empty(rows, dtype=wide, device=grad.device)
    assert grad.is_contiguous() and gate_up.is_contiguous() and row_weights.is_contiguous()
    assert gate_up.shape == (rows, 2 * inner) and row_weights.shape == (rows,) and activation in ACTIVATIONS
    if rows:
        block = min(COLUMNS, triton.next_power_of_2(inner))
        with on_device(grad):
            _gated_backward_kernel[(rows,)](
                grad, gate_up, row_weights, out, sums, inner, activation, block, is_interpreted(grad), num_warps=4
            )
    return out, sums


@triton.jit
def _sum_kernel(
    rows_ptr, weights_ptr, place_ptr, out_ptr, columns, TOP_K: tl.constexpr, BLOCK: tl.constexpr,
    WEIGHTED: tl.constexpr, INTERPRETED: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of one token."""
    if OVERLAPPED:
        tl.extra.cuda.gdc_wait()  # this may be launched while what is in front of it runs
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(TOP_K):
        place = tl.load(place_ptr + token * TOP_K + k).to(tl.int64)
        row = tl.load(rows_ptr + place * columns + column, mask=mask, other=0.0).to(tl.float32)
        if WEIGHTED:
            row *= tl.load(weights_ptr + token * TOP_K + k).to(tl.float32)
        total += row
    tl.store(out_ptr + token * columns + column, round_to(total, out_ptr.dtype.element_ty, INTERPRETED), mask=mask)


@triton.jit
def _spread_backward_kernel(
    grad_ptr, rows_ptr, weights_ptr, order_ptr, out_ptr, sums_ptr, columns, TOP_K: tl.constexpr, BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    pair = tl.load(order_ptr + row).to(tl.int64)
    weight = tl.load(weights_ptr + pair).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, columns, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        mask = column < columns
        grad = tl.load(grad_ptr + pair // TOP_K * columns + column, mask=mask, other=0.0).to(tl.float32)
        total += grad * tl.load(rows_ptr + row * columns + column, mask=mask, other=0.0).to(tl.float32)
        value = round_to(grad * weight, out_ptr.dtype.element_ty, INTERPRETED)
        tl.store(out_ptr + row * columns + column, value, mask=mask)
    tl.store(sums_ptr + row, tl.sum(total, 0))


@triton.jit
def _gated_backward_kernel(
    grad_ptr, gate_up_ptr, weights_ptr, out_ptr, sums_ptr, columns, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One row."""
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights_ptr + row).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, columns, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        mask = column < columns
        source = gate_up_ptr + row * 2 * columns + column
        gate = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(source + columns, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row * columns + column, mask=mask, other=0.0).to(tl.float32)
        product, of_gate, of_up = gated_gradients(grad * weight, gate, up, ACTIVATION, DTYPE, INTERPRETED)
        total += grad * product.to(tl.float32)
        target = out_ptr + row * 2 * columns + column
        tl.store(target, of_gate, mask=mask)
        tl.store(target + columns, of_up, mask=mask)
    tl.store(sums_ptr + row, tl.sum(total, 0))
