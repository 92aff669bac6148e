"""Softmax, top-k and grouping by expert in one launch, for the few rows of a decoding step, without asking the host.

Programs choose the experts of some tokens each and count them; the one that finishes last knows how many rows every
expert has, gives each pair of a token and an expert its place, and cuts the experts' rows into tiles for a grouped
product (nf4_experts.py). Every launch has the same shape for the same number of tokens, so it can stand in a CUDA
graph. The torch form is `experts.route` and `experts.group`; between equal scores either may choose another expert.

Within an expert rows come in any order, which changes no row's value. Not here: gradients, many rows (sorting is
faster there), the router's product. One stream at a time per device: calls share their counters.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from grpo.kernels import cards
from grpo.kernels.launch import is_interpreted, on_device, round_to

MOST_PAIRS = 1 << 12
"""Pairs of a token and one of its experts, for one program to give all a place."""
TOKENS = 16
"""Of a program that chooses."""

_counters: dict[tuple[torch.device, int], Tensor] = {}


class Record(NamedTuple):
    """Where chosen experts are kept for later."""

    table: Tensor
    """[slots, layers, top_k] of uint8, or int16 for more than 256 experts."""
    slots: Tensor
    """int64, at least one a token: its slot; below 0: none."""
    layer: int

    def write(self, chosen: Tensor) -> None:
        """Keep `chosen` [tokens, top_k]."""
        slots = self.slots[: len(chosen)]
        chosen = chosen[: len(slots)]
        last = len(self.table) - 1  # a slot that nobody has
        self.table[torch.where(slots < 0, last, slots), self.layer] = chosen.to(self.table.dtype)


class Routes(NamedTuple):
    """Where every token goes, and its rows sorted by expert and cut into tiles."""

    weights: Tensor
    """[tokens, top_k], in the logits' dtype."""
    chosen: Tensor
    """int32 [tokens, top_k]: numbers of experts."""
    order: Tensor
    """int32 [pairs]: which pair, counted by tokens, is at each place."""
    place: Tensor
    """int32 [pairs]: the place of each pair."""
    ends: Tensor
    """int32 [experts]: one past each expert's last place."""
    expert: Tensor
    """int32 [tiles]: whose a tile is; the number of experts for nobody's."""
    start: Tensor
    """int32 [tiles]: a tile's first place."""


def serves(tokens: int, top_k: int) -> bool:
    """Whether `choose` takes so many tokens."""
    return 0 < tokens * top_k <= MOST_PAIRS


def most_tiles(pairs: int, experts: int, rows: int) -> int:
    """Tiles of `rows` rows that `pairs` can make."""
    return min(experts, pairs) + pairs // rows


def counters(device: torch.device, experts: int) -> Tensor:
    """int32 zeros [experts + 1] of `device`, made by the first call: rows of each expert, programs that are done."""
    key = device, experts
    if key not in _counters:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("route once before a CUDA graph is captured")
        with torch.inference_mode(False):
            _counters[key] = torch.zeros(experts + 1, dtype=torch.int32, device=device)
    return _counters[key]


def choose(logits: Tensor, top_k: int, renormalize: bool, tile_rows: int, record: Record | None = None) -> Routes:
    """The largest `top_k` of the softmax of logits [tokens, experts], sorted into tiles of `tile_rows` rows, and kept
    in `record`."""
    tokens, experts = logits.shape
    pairs = tokens * top_k
    tiles = most_tiles(pairs, experts, tile_rows)
    assert serves(tokens, top_k) and logits.stride(1) == 1 and top_k <= experts
    ints = torch.empty(3 * pairs + experts + 2 * tiles, dtype=torch.int32, device=logits.device)
    chosen, order, place, ends, expert, start = ints.split([pairs, pairs, pairs, experts, tiles, tiles])
    weights = torch.empty(tokens, top_k, dtype=logits.dtype, device=logits.device)
    table, slots, layer = (chosen, chosen, 0) if record is None else record
    assert record is None or (table.is_contiguous() and slots.is_contiguous() and len(slots) >= tokens)
    overlapped = logits.is_cuda and cards.card(logits.device).overlaps
    with on_device(logits):
        _choose_kernel[(triton.cdiv(tokens, TOKENS),)](
            logits, weights, chosen, order, place, ends, expert, start, counters(logits.device, experts), table, slots,
            tokens, tiles, layer, logits.stride(0), table.stride(0), record is not None, experts,
            triton.next_power_of_2(experts), top_k, triton.next_power_of_2(top_k), renormalize, TOKENS, tile_rows,
            max(128, triton.next_power_of_2(pairs)), is_interpreted(logits), overlapped, num_warps=4,
            launch_pdl=overlapped,
        )  # fmt: skip
    return Routes(weights, chosen.view(tokens, top_k), order, place, ends, expert, start)


@triton.jit(do_not_specialize=["tokens", "tiles", "layer"])
def _choose_kernel(
    logits_ptr, weights_ptr, chosen_ptr, order_ptr, place_ptr, ends_ptr, expert_ptr, start_ptr, counts_ptr, table_ptr,
    slots_ptr, tokens, tiles, layer, stride, table_stride, RECORD: tl.constexpr, EXPERTS: tl.constexpr,
    BE: tl.constexpr, TOP_K: tl.constexpr, BK: tl.constexpr, RENORMALIZE: tl.constexpr, BT: tl.constexpr,
    TILE_ROWS: tl.constexpr, PAIRS: tl.constexpr, INTERPRETED: tl.constexpr, OVERLAPPED: tl.constexpr,
):  # fmt: skip
    """BT tokens are routed; the last program sorts the pairs of all tokens."""
    if OVERLAPPED:
        tl.extra.cuda.gdc_wait()  # this may be launched while what is in front of it runs
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    known = token < tokens
    expert = tl.arange(0, BE)
    inside = known[:, None] & (expert < EXPERTS)[None, :]
    logit = tl.load(logits_ptr + token[:, None] * stride + expert[None, :], mask=inside, other=float("-inf"))
    logit = tl.where(known[:, None], logit.to(tl.float32), tl.where(expert < EXPERTS, 0.0, float("-inf"))[None, :])
    first = tl.max(logit, 1)
    total = tl.sum(tl.exp(logit - first[:, None]), 1)
    slot = tl.arange(0, BK)
    weights = tl.zeros([BT, BK], tl.float32)
    chosen = tl.zeros([BT, BK], tl.int32)
    for k in tl.static_range(TOP_K):
        most, best = tl.max(logit, 1, return_indices=True)
        is_best = expert[None, :] == best[:, None]
        weights = tl.where(slot[None, :] == k, tl.exp(most - first)[:, None], weights)
        chosen = tl.where(slot[None, :] == k, best[:, None], chosen)
        logit = tl.where(is_best, float("-inf"), logit)
    weights = weights / (tl.sum(weights, 1) if RENORMALIZE else total)[:, None]
    written = known[:, None] & (slot < TOP_K)[None, :]
    at = token[:, None] * TOP_K + slot[None, :]
    tl.store(weights_ptr + at, round_to(weights, weights_ptr.dtype.element_ty, INTERPRETED), mask=written)
    tl.store(chosen_ptr + at, chosen, mask=written)
    if RECORD:
        place = tl.load(slots_ptr + token, mask=known, other=-1)
        kept = written & (place >= 0)[:, None]
        kept_at = table_ptr + (place * table_stride + layer * TOP_K)[:, None] + slot[None, :]
        tl.store(kept_at, chosen.to(table_ptr.dtype.element_ty), mask=kept)
    tl.atomic_add(counts_ptr + chosen, 1, mask=written, sem="relaxed")
    tl.debug_barrier()  # every thread's part is written before one thread says so
    if tl.atomic_add(counts_ptr + EXPERTS, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        _sort_pairs(
            chosen_ptr, order_ptr, place_ptr, ends_ptr, expert_ptr, start_ptr, counts_ptr, tokens * TOP_K, tiles,
            EXPERTS, BE, TILE_ROWS, PAIRS,
        )  # fmt: skip


@triton.jit
def _sort_pairs(
    chosen_ptr, order_ptr, place_ptr, ends_ptr, expert_ptr, start_ptr, counts_ptr, pairs, tiles,
    EXPERTS: tl.constexpr, BE: tl.constexpr, TILE_ROWS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Places, ends and tiles from the counts, which become the places that are given out, and zeros again."""
    expert = tl.arange(0, BE)
    real = expert < EXPERTS
    count = tl.load(counts_ptr + expert, mask=real, other=0, cache_modifier=".cg")
    end = tl.cumsum(count, 0)
    tl.store(ends_ptr + expert, end, mask=real)
    own_tiles = (count + TILE_ROWS - 1) // TILE_ROWS
    tile_end = tl.cumsum(own_tiles, 0)
    first = tile_end - own_tiles
    for number in range(tl.max(own_tiles, 0)):
        mask = number < own_tiles
        tl.store(expert_ptr + first + number, expert, mask=mask)
        tl.store(start_ptr + first + number, end - count + number * TILE_ROWS, mask=mask)
    used = tl.max(tile_end, 0)
    pair = tl.arange(0, PAIRS)
    for begin in range(used, tiles, PAIRS):
        tl.store(expert_ptr + begin + pair, tl.full([PAIRS], EXPERTS, tl.int32), mask=begin + pair < tiles)
    tl.store(counts_ptr + expert, end - count, mask=real)
    tl.debug_barrier()
    mask = pair < pairs
    chosen = tl.load(chosen_ptr + pair, mask=mask, other=0, cache_modifier=".cg")
    place = tl.atomic_add(counts_ptr + chosen, 1, mask=mask, sem="relaxed")
    tl.store(place_ptr + pair, place, mask=mask)
    tl.store(order_ptr + place, pair, mask=mask)
    tl.debug_barrier()
    tl.store(counts_ptr + expert, tl.zeros([BE], tl.int32), mask=real)
    tl.store(counts_ptr + EXPERTS, 0)
