"""Attention of one new token a sequence to what a paged cache holds of it: a decoding step, in one launch.

A program takes one key-value head of one sequence and reads each key and value once for all query heads that share it.
Long sequences are cut into chunks at fixed positions; whichever program of a sequence finishes last adds the chunks up
in their order, so that a sequence's result has the same bits whatever others there are. Sequences that share a prompt
share its pages, and as their programs run side by side they find them in the L2 cache.

Optionally the new token comes in as it left the projection: its query and key are then rotated and its key and value
written to the cache here, which two more launches would otherwise do. Rotation: products and sum in float32, rounded
once, as in rope.py.

Not here: prompts, sliding windows, sinks, caches of another type than the query's. One stream at a time per device
(the workspace of split_k.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo.kernels import cards
from grpo.kernels.cards import Card
from grpo.kernels.launch import is_interpreted, on_device, round_to
from grpo.kernels.split_k import COUNTERS, WORKSPACE_BYTES, dot, workspace

CHUNK = 512
"""Tokens of a sequence that one program reads, at the least."""
PAGE = 16
"""Tokens of a page of vLLM's, unless layers of other kinds ask for more."""
LEAST_PROGRAMS = 192
"""Sequences times key-value heads from which the kernel is used: FlashAttention splits fewer over the whole GPU."""
MOST_CHUNKS = 8
"""Of a sequence of the largest length."""
FEW_CHUNKS = 2
HEAD_SIZES = (64, 128, 256)
LARGEST_GROUP = 16
"""Query heads to a key-value head, at most: rows of one tensor core product."""


class Cache(NamedTuple):
    """Where one layer's keys and values lie."""

    keys: Tensor
    """[pages, page, key-value heads, head size], last stride 1."""
    values: Tensor
    """Likewise, with the same strides."""
    pages: Tensor
    """int32 [sequences or more, most pages of one]: the pages of a sequence, in order."""
    lengths: Tensor
    """int32 [sequences or more]: tokens of a sequence, the new one included; 0: a row without a sequence, which is
    left as it is."""


class NewToken(NamedTuple):
    """Each sequence's new token, before rotation and not in the cache yet."""

    keys: Tensor
    """[sequences, key-value heads, head size]; the last two dimensions contiguous."""
    values: Tensor
    cos_sin: Tensor
    """[positions, head size], contiguous: cosines of half a head, then sines."""


@dataclass(frozen=True)
class Cut:
    """How a program goes through its tokens."""

    tokens: int = 32
    """At once, a multiple of 16: changes the order of sums, and with it the last bits."""
    warps: int = 2
    stages: int = 3
    """Tiles of keys and values that are loaded ahead, and one. Changes no bit."""


def cut_for(programs: int, chunks: int, head_size: int, card: Card) -> Cut:
    """What was fastest on an H200 with heads of 128 and so many programs of up to `chunks` chunks: few load further
    ahead, many leave each other room. Larger heads want more registers."""
    if head_size > 128:
        return Cut(warps=4)
    return Cut(stages=4 if programs <= 8 * card.multiprocessors and chunks <= FEW_CHUNKS else 3)


def decode_attention(query: Tensor, cache: Cache, scale: float, out: Tensor, new: NewToken | None = None) -> None:
    """out [sequences, heads, head size] = softmax(scale q K^T) V over each sequence's cached tokens.

    query: like `out`, the last two dimensions contiguous; any stride between sequences. Without `new` the cache holds
    the new token and the query is rotated. Sums are float32, weights rounded to the query's type before they meet the
    values. Raises ValueError for sizes outside this (see `serves`).
    """
    if not serves(query.shape[1], cache.keys.shape[2], query.shape[2], query.dtype, cache.keys.dtype):
        raise ValueError(f"attention of {query.dtype} {tuple(query.shape)} to a cache of {cache.keys.dtype} "
                         f"{tuple(cache.keys.shape)}")  # fmt: skip
    if is_interpreted(query):
        _torch(query, cache, scale, out, new)
    else:
        page, kv_heads = cache.keys.shape[1:3]
        _, chunks = chunks_of(cache.pages.shape[1] * page)
        cut = cut_for(len(query) * kv_heads, chunks, query.shape[2], cards.card(query.device))
        launch_decode(query, cache, scale, out, new, cut)


def serves(heads: int, kv_heads: int, head_size: int, dtype: torch.dtype, cache_dtype: torch.dtype) -> bool:
    """Whether the kernel takes such a layer."""
    sizes = head_size in HEAD_SIZES and heads % kv_heads == 0 and heads // kv_heads <= LARGEST_GROUP
    return sizes and dtype == cache_dtype and dtype in (torch.bfloat16, torch.float16)


def fits(sequences: int, heads: int, kv_heads: int, head_size: int, longest: int) -> bool:
    """Whether the workspace holds every chunk's part of so many sequences of up to `longest` tokens."""
    _, chunks = chunks_of(longest)
    partial = 4 * sequences * heads * chunks * (head_size + 2)
    return chunks == 1 or (sequences * kv_heads <= COUNTERS and partial <= WORKSPACE_BYTES)


def chunks_of(longest: int) -> tuple[int, int]:
    """(tokens of a chunk, chunks of a sequence) where sequences have up to `longest` tokens."""
    size = max(CHUNK, triton.next_power_of_2(triton.cdiv(longest, MOST_CHUNKS)))
    return size, triton.cdiv(longest, size)


def launch_decode(
    query: Tensor, cache: Cache, scale: float, out: Tensor, new: NewToken | None, cut: Cut, *,
    interpreted: bool = False, overlapped: bool | None = None,
) -> None:  # fmt: skip
    """The Triton form of `decode_attention`. overlapped: whether it may be launched before what is in front of it has
    ended; None: as the card allows."""
    sequences, heads, size = query.shape
    page, kv_heads = cache.keys.shape[1:3]
    group = heads // kv_heads
    assert query.stride()[1:] == out.stride()[1:] == (size, 1) and out.shape == query.shape
    assert cache.keys.stride() == cache.values.stride() and cache.keys.stride(3) == 1
    assert cache.pages.stride(1) == 1 and cache.pages.dtype == cache.lengths.dtype == torch.int32
    assert cache.lengths.is_contiguous() and min(len(cache.lengths), len(cache.pages)) >= sequences
    fresh = NewToken(query, query, query) if new is None else new
    if new is not None:
        assert new.keys.shape == new.values.shape == (sequences, kv_heads, size)
        assert new.keys.stride()[1:] == new.values.stride()[1:] == (size, 1)
        assert new.cos_sin.is_contiguous() and new.cos_sin.shape[1] == size
    chunk, chunks = chunks_of(cache.pages.shape[1] * page)
    scratch, counters = workspace(query.device)
    parts = sequences * heads * chunks
    assert fits(sequences, heads, kv_heads, size, cache.pages.shape[1] * page)
    if sequences == 0:
        return
    partial = scratch.view(torch.float32)
    if overlapped is None:
        overlapped = query.is_cuda and cards.card(query.device).overlaps
    with on_device(query):
        _decode_kernel[(sequences * kv_heads, chunks)](
            query, fresh.keys, fresh.values, fresh.cos_sin, cache.keys, cache.values, cache.pages, cache.lengths, out,
            partial, partial[parts * size :] if chunks > 1 else partial, counters, scale * math.log2(math.e), kv_heads,
            query.stride(0), fresh.keys.stride(0), fresh.values.stride(0), *cache.keys.stride()[:3],
            cache.pages.stride(0), out.stride(0), chunks, group, max(16, triton.next_power_of_2(group)), size, page,
            cut.tokens, chunk, cut.stages, new is not None, overlapped, interpreted, num_warps=cut.warps,
            launch_pdl=overlapped,
        )  # fmt: skip


def _torch(query: Tensor, cache: Cache, scale: float, out: Tensor, new: NewToken | None) -> None:
    page, group = cache.keys.shape[1], query.shape[1] // cache.keys.shape[2]
    for row, length in enumerate(cache.lengths[: len(query)].tolist()):
        if length == 0:
            continue
        q, pages = query[row], cache.pages[row, : -(-length // page)].long()
        if new is not None:
            last, place = cache.pages[row, (length - 1) // page], (length - 1) % page
            q = _turned(q, new.cos_sin[length - 1])
            cache.keys[last, place] = _turned(new.keys[row], new.cos_sin[length - 1])
            cache.values[last, place] = new.values[row]
        keys, values = (part[pages].flatten(0, 1)[:length].repeat_interleave(group, 1) for part in cache[:2])
        scores = torch.einsum("hd,thd->ht", q.float(), keys.float()) * scale
        out[row] = torch.einsum("ht,thd->hd", scores.softmax(-1), values.float()).to(out.dtype)


def _turned(heads: Tensor, cos_sin: Tensor) -> Tensor:
    """heads [heads, head size] rotated by one position's cosines and sines."""
    (first, second), (cos, sin) = heads.float().chunk(2, -1), cos_sin.float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(heads.dtype)


@triton.jit(do_not_specialize=["stride_pages", "chunks"])
def _decode_kernel(
    q_ptr, new_k_ptr, new_v_ptr, cos_sin_ptr, k_ptr, v_ptr, pages_ptr, lengths_ptr, out_ptr,
    partial_ptr, stats_ptr, counters_ptr, scale, kv_heads, stride_q_t, stride_new_k_t, stride_new_v_t,
    stride_page, stride_token, stride_head, stride_pages, stride_out_t, chunks,
    GROUP: tl.constexpr, BM: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, BN: tl.constexpr,
    CHUNK: tl.constexpr, STAGES: tl.constexpr, NEW: tl.constexpr, OVERLAPPED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """GROUP query heads of one sequence, one chunk of its tokens; BM rows, of which the first GROUP count."""
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    if OVERLAPPED:
        tl.extra.cuda.gdc_wait()  # for the query: this may be launched while that is computed
        tl.extra.cuda.gdc_launch_dependents()
    sequence, head = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads
    length = tl.load(lengths_ptr + sequence)
    start = tl.program_id(1) * CHUNK
    if start >= length:
        return
    row, column, n = tl.arange(0, BM), tl.arange(0, D), tl.arange(0, BN)
    real = (row < GROUP)[:, None]
    q_ptrs = q_ptr + sequence.to(tl.int64) * stride_q_t + ((head * GROUP + row) * D)[:, None]
    pages_ptr += sequence.to(tl.int64) * stride_pages
    k_ptr += head * stride_head
    v_ptr += head * stride_head
    if NEW:
        half = tl.arange(0, D // 2)
        cos_sin_ptr += (length - 1).to(tl.int64) * D
        cos = tl.load(cos_sin_ptr + half).to(tl.float32)[None, :]
        sin = tl.load(cos_sin_ptr + D // 2 + half).to(tl.float32)[None, :]
        first = tl.load(q_ptrs + half[None, :], mask=real, other=0.0).to(tl.float32)
        second = tl.load(q_ptrs + D // 2 + half[None, :], mask=real, other=0.0).to(tl.float32)
        turned = tl.join(first * cos - second * sin, second * cos + first * sin)
        q = round_to(tl.reshape(tl.permute(turned, [0, 2, 1]), [BM, D]), DTYPE, INTERPRETED)
        if start + CHUNK >= length:
            page = tl.load(pages_ptr + (length - 1) // PAGE).to(tl.int64)
            place = page * stride_page + (length - 1) % PAGE * stride_token
            new_k_ptr += sequence.to(tl.int64) * stride_new_k_t + head * D
            new_v_ptr += sequence.to(tl.int64) * stride_new_v_t + head * D
            _write_new(new_k_ptr, new_v_ptr, k_ptr + place, v_ptr + place, cos, sin, D, DTYPE, INTERPRETED)
        tl.debug_barrier()  # what one thread wrote, others read below
    else:
        q = tl.load(q_ptrs + column[None, :], mask=real, other=0.0)
    stop = tl.minimum(length, start + CHUNK)
    largest = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    sums = tl.zeros([BM, D], tl.float32)
    for begin in tl.range(start, stop, BN, num_stages=STAGES):
        token = begin + n
        inside = token < stop
        place = _page(pages_ptr + tl.minimum(token, stop - 1) // PAGE, INTERPRETED).to(tl.int64) * stride_page
        place += token % PAGE * stride_token
        k = tl.load(k_ptr + place[None, :] + column[:, None], mask=inside[None, :], other=0.0)
        scores = dot(q, k, tl.zeros([BM, BN], tl.float32), INTERPRETED) * scale
        scores = tl.where(inside[None, :], scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - larger[:, None])
        shrink = tl.exp2(largest - larger)
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(v_ptr + place[:, None] + column[None, :], mask=inside[:, None], other=0.0)
        sums = dot(round_to(weights, DTYPE, INTERPRETED), v, sums * shrink[:, None], INTERPRETED)
        largest = larger
    out_ptrs = out_ptr + sequence.to(tl.int64) * stride_out_t + ((head * GROUP + row) * D)[:, None] + column[None, :]
    count = tl.cdiv(length, CHUNK)
    if count == 1:
        tl.store(out_ptrs, round_to(sums / total[:, None], DTYPE, INTERPRETED), mask=real)
    else:
        slot = tl.program_id(0) * chunks * GROUP + row
        own = slot + tl.program_id(1) * GROUP
        tl.store(partial_ptr + (own * D)[:, None] + column[None, :], sums, mask=real)
        tl.store(stats_ptr + own * 2, largest, mask=row < GROUP)
        tl.store(stats_ptr + own * 2 + 1, total, mask=row < GROUP)
        tl.debug_barrier()  # every thread's part is written before one thread says so
        if tl.atomic_add(counters_ptr + tl.program_id(0), 1, sem="acq_rel") == count - 1:
            sums, total = _join_chunks(partial_ptr, stats_ptr, slot, row < GROUP, count, GROUP, BM, D)
            tl.store(out_ptrs, round_to(sums / total[:, None], DTYPE, INTERPRETED), mask=real)
            tl.store(counters_ptr + tl.program_id(0), 0)


@triton.jit
def _page(page_ptrs, INTERPRETED: tl.constexpr):
    """The int32 at `page_ptrs`, by an instruction that Triton does not take for a load: it would pipeline keys and
    values behind it, and then keeps one tile of each instead of several."""
    if INTERPRETED:
        return tl.load(page_ptrs)
    return tl.inline_asm_elementwise(
        "ld.global.nc.b32 $0, [$1];", "=r,l", [page_ptrs.to(tl.int64)], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _write_new(
    new_k_ptr, new_v_ptr, k_ptr, v_ptr, cos, sin, D: tl.constexpr, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr
):  # fmt: skip
    """One head of the new token into its place in the cache, its key rotated by cos and sin [1, D / 2]."""
    half, column = tl.arange(0, D // 2)[None, :], tl.arange(0, D)
    first = tl.load(new_k_ptr + half).to(tl.float32)
    second = tl.load(new_k_ptr + D // 2 + half).to(tl.float32)
    tl.store(k_ptr + half, round_to(first * cos - second * sin, DTYPE, INTERPRETED))
    tl.store(k_ptr + D // 2 + half, round_to(second * cos + first * sin, DTYPE, INTERPRETED))
    tl.store(v_ptr + column, tl.load(new_v_ptr + column))


@triton.jit
def _join_chunks(partial_ptr, stats_ptr, slot, real, count, GROUP: tl.constexpr, BM: tl.constexpr, D: tl.constexpr):
    """(weighted sum of values, sum of weights) over `count` chunks, in their order."""
    largest = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    sums = tl.zeros([BM, D], tl.float32)
    column = tl.arange(0, D)
    for _ in range(count):
        theirs = tl.load(stats_ptr + slot * 2, mask=real, other=0.0, cache_modifier=".cg")
        part = tl.load(
            partial_ptr + (slot * D)[:, None] + column[None, :], mask=real[:, None], other=0.0, cache_modifier=".cg"
        )
        larger = tl.maximum(largest, theirs)
        before, now = tl.exp2(largest - larger), tl.exp2(theirs - larger)
        weight = tl.load(stats_ptr + slot * 2 + 1, mask=real, other=1.0, cache_modifier=".cg")
        total = total * before + weight * now
        sums = sums * before[:, None] + part * now[:, None]
        largest = larger
        slot += GROUP
    return sums, total
