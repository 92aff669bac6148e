"""grpo/rollout/decoding_kernels.py: what is compiled ahead is what products with those rows choose."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.kernels import cards, nf4, nf4_plans
from grpo.kernels.nf4_compile import Product, Shrink
from grpo.model.base_weights import FusedLinear, Segment
from grpo.rollout.decoding_kernels import decoding_jobs
from tests.helpers.card_launches import CARDS

DEVICE = torch.device("cuda", 0)


def linear(rows: int, columns: int, bias: bool, packed: bool) -> FusedLinear:
    dense = torch.zeros(rows, columns, dtype=torch.bfloat16)
    stored = nf4.allocate(rows, columns, torch.bfloat16, "cpu") if packed else (dense, None)
    segments = [Segment(0, rows, *stored)]
    return FusedLinear("one", {}, columns, rows, segments=segments, bias=dense[:, 0] if bias else None)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(CARDS),
    st.integers(1, 40).map(lambda n: 8 * n),
    st.integers(1, 20).map(lambda n: 64 * n),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0, 16, 48]),
    st.lists(st.integers(1, 600), min_size=1, max_size=5),
    st.booleans(),
)
def test_jobs_are_the_kernels_of_the_plan(card, rows, columns, bias, packed, ranks, counts, early):
    one = linear(rows, columns, bias, packed)
    real, cards.card = cards.card, lambda device: card
    nf4_plans.find_plan.cache_clear()
    try:
        plan = nf4_plans.find_plan(DEVICE, rows, columns)
        jobs = list(decoding_jobs({"one": one}, {"one": ranks} if ranks else {}, counts, DEVICE, early=early))
    finally:
        cards.card = real
        nf4_plans.find_plan.cache_clear()
    tiles = [(count, plan.tile(count)) for count in counts] if packed and plan else []
    products = [
        Product(tile, plan.split, ranks, count % tile.m != 0, columns % nf4.TILE != 0, bias, early and ranks > 0)
        for count, tile in tiles
        if tile
    ]
    assert [job for job in jobs if isinstance(job, Product)] == products
    shrinks = [Shrink(ranks, columns, early)] * len(counts) if ranks and card.architecture >= 80 else []
    assert [job for job in jobs if isinstance(job, Shrink)] == shrinks
