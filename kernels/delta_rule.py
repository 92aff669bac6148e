"""Triton kernels of the gated delta rule, forward and backward; gated_delta.py has the rule and its torch form.

A chunk of 64 tokens with unit queries q and keys k, values v, running sums g of its decays and G their total, and with
the state S before it:

    N = T (beta (v - e^g (k S)))        what its tokens write, where T (1 + L) = 1, L_ij = beta_i e^(g_i - g_j) k_i k_j
    y = e^g q S / sqrt(dim) + P N       where P_ij = e^(g_i - g_j) q_i k_j / sqrt(dim), for j up to i
    S <- e^G S + (e^(G - g) k)^T N

T and P of all chunks are made first, then the states run along the spans. The backward runs along them in the other
direction, with R = T^T dN the gradient of what T is applied to, and then has all that the inputs' gradients need:
dL = -R N^T, dP = dy N^T, and products with S.

Sums are in float32. Products run on tensor cores: what comes in bfloat16 goes in as it is, the lengths of queries and
keys are divided by afterwards, and a float32 matrix goes in as the sum of two of bfloat16, with 16 bits of its 24.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo.kernels.launch import is_interpreted, on_device, round_to
from grpo.kernels.recurrence import CHUNK, Run
from grpo.kernels.sizes import delta_rule_bytes

MOST_DIM = 128
"""Of keys and of values: a program holds a state, or a part of one, in registers."""
LEAST_CAPABILITY = (8, 0)


class Tile(NamedTuple):
    """How much of a state's value dimension a program has, and how it is run."""

    columns: int
    warps: int
    stages: int


PREPARE, ALONG, BACK, GRADS = Tile(0, 4, 1), Tile(32, 4, 1), Tile(32, 4, 1), Tile(32, 8, 1)


class Inputs(NamedTuple):
    """query, key [tokens, key heads, dim], value [tokens, heads, dim], decay and beta [tokens, heads].

    The last strides of the first three are 1."""

    query: Tensor
    key: Tensor
    value: Tensor
    decay: Tensor
    beta: Tensor

    @property
    def heads(self) -> int:
        return self.value.shape[1]

    @property
    def shared(self) -> int:
        """Neighbouring heads of values that have one of keys."""
        return self.heads // self.key.shape[1]

    @property
    def products(self) -> str:
        """How kernels multiply."""
        if self.value.dtype == torch.float32:
            return "float32"
        return "interpreted" if is_interpreted(self.value) else "pieces"

    @property
    def dims(self) -> tuple[int, int]:
        """Of keys and of values."""
        return self.key.shape[2], self.value.shape[2]

    def strides(self, *others: Tensor) -> list[int]:
        """Of token and head, for each and for `others`."""
        return [stride for tensor in (*self, *others) for stride in tensor.stride()[:2]]


class Prepared(NamedTuple):
    """T and P of every chunk, float32 [chunks, heads, CHUNK, CHUNK]."""

    solve: Tensor
    within: Tensor


class Kept(NamedTuple):
    """What a backward needs, float32: N [chunks, heads, CHUNK, value dim], and the states before the chunks
    [chunks, heads, key dim, value dim]."""

    news: Tensor
    states: Tensor


def serves(inputs: Inputs) -> bool:
    """Whether the kernels compute this."""
    return serves_on(inputs.value.device, inputs.value.dtype, inputs.dims)


def serves_on(device: torch.device, dtype: torch.dtype, dims: tuple[int, int]) -> bool:
    """Whether the kernels compute heads of these sizes: in bfloat16, on a GPU with tensor cores for it."""
    return (
        device.type == "cuda"
        and dtype == torch.bfloat16
        and max(dims) <= MOST_DIM
        and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY
    )


def bytes_of_head(run: Run, dim: int, value_dim: int) -> int:
    """Bytes of what a backward keeps for one head of values."""
    return delta_rule_bytes(len(run.starts), max(len(order.spans) for order in run.orders), dim, value_dim)


def block(size: int) -> int:
    """Of a tile that holds `size` numbers."""
    return max(16, triton.next_power_of_2(size))


def prepare(inputs: Inputs, run: Run, eps: float) -> Prepared:
    """T and P."""
    chunks, (dim, _) = len(run.starts), inputs.dims
    made = Prepared(*(inputs.value.new_empty(chunks, inputs.heads, CHUNK, CHUNK, dtype=torch.float32) for _ in "TP"))
    with on_device(inputs.value):
        _prepare_kernel[(chunks, inputs.key.shape[1])](
            *inputs, *made, run.starts, run.counts, *inputs.strides(), inputs.heads, dim, dim**-0.5, eps,
            inputs.shared, CHUNK, block(dim), inputs.products, num_warps=PREPARE.warps, num_stages=PREPARE.stages,
        )  # fmt: skip
    return made


def along(
    inputs: Inputs,
    run: Run,
    made: Prepared,
    eps: float,
    out: Tensor | None = None,
    kept: Kept | None = None,
    begin: Tensor | None = None,
) -> Tensor:
    """Run the states along the spans: y into `out` [tokens, heads, value dim], and what is kept.

    begin: float32 [spans, heads, key dim, value dim], the states that the first order's spans continue, where these
    name some. Returns the states after the last order's spans, laid out like it.
    """
    heads, (dim, value_dim) = inputs.heads, inputs.dims
    states = inputs.value.new_empty(1, dtype=torch.float32) if begin is None else begin
    columns = min(ALONG.columns, block(value_dim))
    for order in run.orders:
        before, states = states, states.new_empty(len(order.spans), heads, dim, value_dim)
        with on_device(states):
            _along_kernel[(len(order.spans), heads, triton.cdiv(value_dim, columns))](
                *inputs, *made, inputs.value if out is None else out, *(kept or made), before, states, order.spans,
                *inputs.strides(inputs.value if out is None else out), heads, dim, value_dim, dim**-0.5, eps,
                inputs.shared, CHUNK, block(dim), columns, inputs.products, out is not None, kept is not None,
                is_interpreted(states), num_warps=ALONG.warps, num_stages=ALONG.stages,
            )  # fmt: skip
    return states


def back(inputs: Inputs, run: Run, made: Prepared, eps: float, grad: Tensor) -> Kept:
    """R, and the gradients of the states after the chunks, from `grad` = dL/dy [tokens, heads, value dim]."""
    heads, (dim, value_dim) = inputs.heads, inputs.dims
    kept = empty_kept(inputs, run)
    columns = min(BACK.columns, block(value_dim))
    later: Tensor | None = None
    parents: Tensor | None = None
    for order in reversed(run.orders):
        after = kept.news.new_zeros(len(order.spans), heads, dim, value_dim)
        if later is not None and parents is not None:
            # One order of adding up a prompt's completions.
            torch.mm(parents.t(), later.flatten(1), out=after.flatten(1))
        parents = order.parents
        later = torch.empty_like(after)
        with on_device(after):
            _back_kernel[(len(order.spans), heads, triton.cdiv(value_dim, columns))](
                *inputs, *made, grad, *kept, after, later, order.spans, *inputs.strides(grad), heads, dim, value_dim,
                dim**-0.5, eps, inputs.shared, CHUNK, block(dim), columns, inputs.products, num_warps=BACK.warps,
                num_stages=BACK.stages,
            )  # fmt: skip
    return kept


def input_grads(
    inputs: Inputs, run: Run, eps: float, grad: Tensor, kept: Kept, later: Kept, out: Sequence[Tensor]
) -> None:
    """The gradients of `inputs` into `out`, laid out like them; kept: of `along`; later: of `back`."""
    dim, value_dim = inputs.dims
    columns = min(GRADS.columns, block(value_dim))
    with on_device(grad):
        _grads_kernel[(len(run.starts), inputs.key.shape[1])](
            *inputs, grad, *kept, *later, *out, run.starts, run.counts, *inputs.strides(grad, *out), inputs.heads, dim,
            value_dim, dim**-0.5, eps, inputs.shared, CHUNK, block(dim), columns, inputs.products, is_interpreted(grad),
            num_warps=GRADS.warps, num_stages=GRADS.stages,
        )  # fmt: skip


def empty_kept(inputs: Inputs, run: Run) -> Kept:
    """Memory for what a backward needs."""
    chunks, heads, (dim, value_dim) = len(run.starts), inputs.heads, inputs.dims
    new = inputs.value.new_empty
    return Kept(
        new(chunks, heads, CHUNK, value_dim, dtype=torch.float32),
        new(chunks, heads, dim, value_dim, dtype=torch.float32),
    )


@triton.jit
def _pieces(x):
    """The two of bfloat16 whose sum float32 `x` is, but for what 16 bits leave out."""
    high = x.to(tl.bfloat16)
    return high, (x - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _multiply(left, right, PRODUCTS: tl.constexpr):
    """left @ right as they are. Triton's interpreter does not multiply bfloat16."""
    if PRODUCTS == "interpreted":
        return tl.dot(left.to(tl.float32), right.to(tl.float32))
    else:
        return tl.dot(left, right, input_precision="ieee")


@triton.jit
def _dot(left, right, PRODUCTS: tl.constexpr):
    """left @ right in float32, of which one or both are float32 and otherwise of the inputs' type."""
    if PRODUCTS == "float32":
        return tl.dot(left, right, input_precision="ieee")
    elif left.dtype == tl.bfloat16:
        high, low = _pieces(right.to(tl.float32))
        return _multiply(left, high, PRODUCTS) + _multiply(left, low, PRODUCTS)
    elif right.dtype == tl.bfloat16:
        high, low = _pieces(left.to(tl.float32))
        return _multiply(high, right, PRODUCTS) + _multiply(low, right, PRODUCTS)
    else:
        high, low = _pieces(left.to(tl.float32))
        right_high, right_low = _pieces(right.to(tl.float32))
        rest = _multiply(low, right_high, PRODUCTS) + _multiply(high, right_low, PRODUCTS)
        return rest + _multiply(high, right_high, PRODUCTS)


@triton.jit
def _rows(ptr, token, inside, stride, dim, eps, K: tl.constexpr):
    """[C, K] rows as they are, 0 beyond the end, and what each is multiplied with to have the length 1."""
    column = tl.arange(0, K)[None, :]
    x = tl.load(ptr + token[:, None] * stride + column, mask=inside[:, None] & (column < dim), other=0.0)
    wide = x.to(tl.float32)
    return x, 1.0 / tl.sqrt(tl.sum(wide * wide, 1) + eps)


@triton.jit
def _numbers(ptr, token, inside, stride):
    """float32 [C], 0 beyond the end."""
    return tl.load(ptr + token * stride, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _between(passed, C: tl.constexpr):
    """e^(g_i - g_j) for j up to i, else 0."""
    row, column = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    return tl.exp(tl.where(row >= column, passed[:, None] - passed[None, :], float("-inf")))


@triton.jit
def _inverse(lower, C: tl.constexpr):
    """The inverse of 1 + lower, which is strictly lower triangular: from blocks on the diagonal to those twice as wide,
    [[X, 0], [B, Y]]^-1 = [[X^-1, 0], [-Y^-1 B X^-1, Y^-1]]."""
    row, column = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    result = tl.where(row == column, 1.0, 0.0)
    result -= tl.where(row // 2 == column // 2, lower, 0.0)
    for level in range(1, 6):
        below = tl.where((row >> (level + 1) == column >> (level + 1)) & (row >> level != column >> level), lower, 0.0)
        product = tl.dot(below, result, input_precision="tf32x3")
        result -= tl.dot(result, product, input_precision="tf32x3")
    return result


@triton.jit
def _prepare_kernel(
    query_ptr, key_ptr, value_ptr, decay_ptr, beta_ptr, solve_ptr, within_ptr, start_ptr, count_ptr,
    stride_q_t, stride_q_h, stride_k_t, stride_k_h, stride_v_t, stride_v_h, stride_d_t, stride_d_h, stride_b_t,
    stride_b_h, heads, dim, scale, eps,
    SHARED: tl.constexpr, C: tl.constexpr, K: tl.constexpr, PRODUCTS: tl.constexpr,
):  # fmt: skip
    """T and P of one chunk, for the heads of one head of keys."""
    chunk, key_head = tl.program_id(0), tl.program_id(1)
    place = tl.arange(0, C)
    token = tl.load(start_ptr + chunk).to(tl.int64) + place
    inside = place < tl.load(count_ptr + chunk)
    q, q_scale = _rows(query_ptr + key_head * stride_q_h, token, inside, stride_q_t, dim, eps, K)
    k, k_scale = _rows(key_ptr + key_head * stride_k_h, token, inside, stride_k_t, dim, eps, K)
    kk = _multiply(k, tl.trans(k), PRODUCTS) * k_scale[:, None] * k_scale[None, :]
    qk = _multiply(q, tl.trans(k), PRODUCTS) * (q_scale * scale)[:, None] * k_scale[None, :]
    row, column = place[:, None], place[None, :]
    for number in range(SHARED):
        head = key_head * SHARED + number
        passed = tl.cumsum(_numbers(decay_ptr + head * stride_d_h, token, inside, stride_d_t), 0)
        beta = _numbers(beta_ptr + head * stride_b_h, token, inside, stride_b_t)
        between = _between(passed, C)
        target = (chunk.to(tl.int64) * heads + head) * C * C + row * C + column
        tl.store(within_ptr + target, qk * between)
        lower = tl.where(row > column, kk * between * beta[:, None], 0.0)
        tl.store(solve_ptr + target, _inverse(lower, C))


@triton.jit
def _along_kernel(
    query_ptr, key_ptr, value_ptr, decay_ptr, beta_ptr, solve_ptr, within_ptr, out_ptr, news_ptr, states_ptr,
    before_ptr, after_ptr, span_ptr,
    stride_q_t, stride_q_h, stride_k_t, stride_k_h, stride_v_t, stride_v_h, stride_d_t, stride_d_h, stride_b_t,
    stride_b_h, stride_o_t, stride_o_h, heads, dim, value_dim, scale, eps,
    SHARED: tl.constexpr, C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, PRODUCTS: tl.constexpr,
    HAS_OUT: tl.constexpr, KEEP: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The state of one head along one span, V of its columns."""
    span, head = tl.program_id(0), tl.program_id(1)
    column = tl.program_id(2) * V + tl.arange(0, V)[None, :]
    row = tl.arange(0, K)[:, None]
    place = tl.arange(0, C)
    square = place[:, None] * C + place[None, :]
    start, length = tl.load(span_ptr + 4 * span).to(tl.int64), tl.load(span_ptr + 4 * span + 1)
    first, parent = tl.load(span_ptr + 4 * span + 2).to(tl.int64), tl.load(span_ptr + 4 * span + 3)
    whole = (row < dim) & (column < value_dim)
    own = head * dim * value_dim + row * value_dim + column
    size = heads * dim * value_dim
    state = tl.zeros([K, V], tl.float32)
    if parent >= 0:
        state = tl.load(before_ptr + parent.to(tl.int64) * size + own, mask=whole, other=0.0)
    for number in range(tl.cdiv(length, C)):
        token, inside = start + number * C + place, place < length - number * C
        chunk = (first + number) * heads + head
        k, k_scale = _rows(key_ptr + head // SHARED * stride_k_h, token, inside, stride_k_t, dim, eps, K)
        decay = _numbers(decay_ptr + head * stride_d_h, token, inside, stride_d_t)
        beta = _numbers(beta_ptr + head * stride_b_h, token, inside, stride_b_t)
        passed, total = tl.cumsum(decay, 0), tl.sum(decay)
        tokens = inside[:, None] & (column < value_dim)
        v = tl.load(value_ptr + head * stride_v_h + token[:, None] * stride_v_t + column, mask=tokens, other=0.0)
        found = _dot(k, state, PRODUCTS) * (tl.exp(passed) * k_scale)[:, None]
        news = _dot(tl.load(solve_ptr + chunk * C * C + square), (v.to(tl.float32) - found) * beta[:, None], PRODUCTS)
        if HAS_OUT:
            q, q_scale = _rows(query_ptr + head // SHARED * stride_q_h, token, inside, stride_q_t, dim, eps, K)
            y = _dot(q, state, PRODUCTS) * (tl.exp(passed) * scale * q_scale)[:, None]
            y += _dot(tl.load(within_ptr + chunk * C * C + square), news, PRODUCTS)
            target = out_ptr + head * stride_o_h + token[:, None] * stride_o_t + column
            tl.store(target, round_to(y, out_ptr.dtype.element_ty, INTERPRETED), mask=tokens)
        if KEEP:
            tl.store(states_ptr + chunk * dim * value_dim + row * value_dim + column, state, mask=whole)
            target = news_ptr + chunk * C * value_dim + place[:, None] * value_dim + column
            tl.store(target, news, mask=column < value_dim)
        state = state * tl.exp(total) + _dot(tl.trans(k), news * (tl.exp(total - passed) * k_scale)[:, None], PRODUCTS)
    tl.store(after_ptr + span.to(tl.int64) * size + own, state, mask=whole)


@triton.jit
def _back_kernel(
    query_ptr, key_ptr, value_ptr, decay_ptr, beta_ptr, solve_ptr, within_ptr, grad_ptr, right_ptr, states_ptr,
    after_ptr, before_ptr, span_ptr,
    stride_q_t, stride_q_h, stride_k_t, stride_k_h, stride_v_t, stride_v_h, stride_d_t, stride_d_h, stride_b_t,
    stride_b_h, stride_g_t, stride_g_h, heads, dim, value_dim, scale, eps,
    SHARED: tl.constexpr, C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, PRODUCTS: tl.constexpr,
):  # fmt: skip
    """The gradient of the state of one head along one span, from its end, V of its columns."""
    span, head = tl.program_id(0), tl.program_id(1)
    column = tl.program_id(2) * V + tl.arange(0, V)[None, :]
    row = tl.arange(0, K)[:, None]
    place = tl.arange(0, C)
    square = place[:, None] * C + place[None, :]
    start, length = tl.load(span_ptr + 4 * span).to(tl.int64), tl.load(span_ptr + 4 * span + 1)
    first = tl.load(span_ptr + 4 * span + 2).to(tl.int64)
    whole = (row < dim) & (column < value_dim)
    own = (span.to(tl.int64) * heads + head) * dim * value_dim + row * value_dim + column
    state = tl.load(after_ptr + own, mask=whole, other=0.0)
    chunks = tl.cdiv(length, C)
    for step in range(chunks):
        number = chunks - 1 - step
        token, inside = start + number * C + place, place < length - number * C
        chunk = (first + number) * heads + head
        k, k_scale = _rows(key_ptr + head // SHARED * stride_k_h, token, inside, stride_k_t, dim, eps, K)
        decay = _numbers(decay_ptr + head * stride_d_h, token, inside, stride_d_t)
        beta = _numbers(beta_ptr + head * stride_b_h, token, inside, stride_b_t)
        passed, total = tl.cumsum(decay, 0), tl.sum(decay)
        tokens = inside[:, None] & (column < value_dim)
        grad = tl.load(grad_ptr + head * stride_g_h + token[:, None] * stride_g_t + column, mask=tokens, other=0.0)
        tl.store(states_ptr + chunk * dim * value_dim + row * value_dim + column, state, mask=whole)
        news = _dot(k, state, PRODUCTS) * (tl.exp(total - passed) * k_scale)[:, None]
        news += _dot(tl.trans(tl.load(within_ptr + chunk * C * C + square)), grad, PRODUCTS)
        right = _dot(tl.trans(tl.load(solve_ptr + chunk * C * C + square)), news, PRODUCTS)
        target = right_ptr + chunk * C * value_dim + place[:, None] * value_dim + column
        tl.store(target, right, mask=column < value_dim)
        state = state * tl.exp(total)
        state -= _dot(tl.trans(k), right * (tl.exp(passed) * beta * k_scale)[:, None], PRODUCTS)
        q, q_scale = _rows(query_ptr + head // SHARED * stride_q_h, token, inside, stride_q_t, dim, eps, K)
        state += _dot(tl.trans(q), grad.to(tl.float32) * (tl.exp(passed) * scale * q_scale)[:, None], PRODUCTS)
    tl.store(before_ptr + own, state, mask=whole)


@triton.jit
def _grads_kernel(
    query_ptr, key_ptr, value_ptr, decay_ptr, beta_ptr, grad_ptr, news_ptr, states_ptr, right_ptr, later_ptr,
    query_grad_ptr, key_grad_ptr, value_grad_ptr, decay_grad_ptr, beta_grad_ptr, start_ptr, count_ptr,
    stride_q_t, stride_q_h, stride_k_t, stride_k_h, stride_v_t, stride_v_h, stride_d_t, stride_d_h, stride_b_t,
    stride_b_h, stride_g_t, stride_g_h, stride_dq_t, stride_dq_h, stride_dk_t, stride_dk_h, stride_dv_t, stride_dv_h,
    stride_dd_t, stride_dd_h, stride_db_t, stride_db_h, heads, dim, value_dim, scale, eps,
    SHARED: tl.constexpr, C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, PRODUCTS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The gradients of one chunk's inputs, for the heads of one head of keys. dq and dk are those of unit rows."""
    chunk, key_head = tl.program_id(0), tl.program_id(1)
    place = tl.arange(0, C)
    token = tl.load(start_ptr + chunk).to(tl.int64) + place
    inside = place < tl.load(count_ptr + chunk)
    q, q_scale = _rows(query_ptr + key_head * stride_q_h, token, inside, stride_q_t, dim, eps, K)
    k, k_scale = _rows(key_ptr + key_head * stride_k_h, token, inside, stride_k_t, dim, eps, K)
    key_column = tl.arange(0, K)[None, :]
    dq, dk = tl.zeros([C, K], tl.float32), tl.zeros([C, K], tl.float32)
    for number in range(SHARED):
        head = key_head * SHARED + number
        decay = _numbers(decay_ptr + head * stride_d_h, token, inside, stride_d_t)
        beta = _numbers(beta_ptr + head * stride_b_h, token, inside, stride_b_t)
        passed, total = tl.cumsum(decay, 0), tl.sum(decay)
        grown, left = tl.exp(passed), tl.exp(total - passed)
        d_passed, d_beta = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
        d_within, d_lower = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
        d_total = 0.0
        own = chunk.to(tl.int64) * heads + head
        for first in range(0, value_dim, V):
            column = first + tl.arange(0, V)[None, :]
            tokens, present = inside[:, None] & (column < value_dim), column < value_dim
            grad = tl.load(grad_ptr + head * stride_g_h + token[:, None] * stride_g_t + column, mask=tokens, other=0.0)
            v = tl.load(value_ptr + head * stride_v_h + token[:, None] * stride_v_t + column, mask=tokens, other=0.0)
            source = own * C * value_dim + place[:, None] * value_dim + column
            news = tl.load(news_ptr + source, mask=present, other=0.0)
            right = tl.load(right_ptr + source, mask=present, other=0.0)
            target = value_grad_ptr + head * stride_dv_h + token[:, None] * stride_dv_t + column
            d_value = round_to(right * beta[:, None], value_grad_ptr.dtype.element_ty, INTERPRETED)
            tl.store(target, d_value, mask=tokens)
            d_beta += tl.sum(right * v.to(tl.float32), 1)
            d_within += _dot(grad, tl.trans(news), PRODUCTS)
            d_lower -= _dot(right, tl.trans(news), PRODUCTS)
            value_row = first + tl.arange(0, V)[:, None]
            # Transposed: [value dim, key dim].
            source = own * dim * value_dim + key_column * value_dim + value_row
            whole = (key_column < dim) & (value_row < value_dim)
            state = tl.load(states_ptr + source, mask=whole, other=0.0)
            part = _dot(grad, state, PRODUCTS) * (grown * scale)[:, None]
            dq += part
            d_passed += tl.sum(part * q.to(tl.float32), 1) * q_scale
            part = _dot(right, state, PRODUCTS) * grown[:, None]
            dk -= part * beta[:, None]
            along = tl.sum(part * k.to(tl.float32), 1) * k_scale
            d_beta -= along
            d_passed -= along * beta
            later = tl.load(later_ptr + source, mask=whole, other=0.0)
            d_total += tl.sum(state * later) * tl.exp(total)
            part = _dot(news, later, PRODUCTS) * left[:, None]
            dk += part
            along = tl.sum(part * k.to(tl.float32), 1) * k_scale
            d_passed -= along
            d_total += tl.sum(along)
        between = _between(passed, C)
        d_within *= between * scale
        found = d_within * (_multiply(q, tl.trans(k), PRODUCTS) * q_scale[:, None] * k_scale[None, :])
        d_passed += tl.sum(found, 1) - tl.sum(found, 0)
        dq += _dot(d_within * k_scale[None, :], k, PRODUCTS)
        dk += _dot(tl.trans(d_within * q_scale[:, None]), q, PRODUCTS)
        d_lower = tl.where(place[:, None] > place[None, :], d_lower * between, 0.0)
        found = d_lower * (_multiply(k, tl.trans(k), PRODUCTS) * k_scale[:, None] * k_scale[None, :])
        d_beta += tl.sum(found, 1)
        found *= beta[:, None]
        d_passed += tl.sum(found, 1) - tl.sum(found, 0)
        d_lower *= beta[:, None]
        dk += _dot((d_lower + tl.trans(d_lower)) * k_scale[None, :], k, PRODUCTS)
        d_passed += tl.where(place == C - 1, d_total, 0.0)
        d_decay = tl.cumsum(d_passed, 0, reverse=True)
        target = decay_grad_ptr + head * stride_dd_h + token * stride_dd_t
        tl.store(target, round_to(d_decay, decay_grad_ptr.dtype.element_ty, INTERPRETED), mask=inside)
        target = beta_grad_ptr + head * stride_db_h + token * stride_db_t
        tl.store(target, round_to(d_beta, beta_grad_ptr.dtype.element_ty, INTERPRETED), mask=inside)
    mask = inside[:, None] & (key_column < dim)
    unit = q.to(tl.float32) * q_scale[:, None]
    dq = (dq - unit * tl.sum(dq * unit, 1)[:, None]) * q_scale[:, None]
    target = query_grad_ptr + key_head * stride_dq_h + token[:, None] * stride_dq_t + key_column
    tl.store(target, round_to(dq, query_grad_ptr.dtype.element_ty, INTERPRETED), mask=mask)
    unit = k.to(tl.float32) * k_scale[:, None]
    dk = (dk - unit * tl.sum(dk * unit, 1)[:, None]) * k_scale[:, None]
    target = key_grad_ptr + key_head * stride_dk_h + token[:, None] * stride_dk_t + key_column
    tl.store(target, round_to(dk, key_grad_ptr.dtype.element_ty, INTERPRETED), mask=mask)
