"""Which kernels a decoding step launches, so that they are compiled while vLLM is still being imported.

The first start on a machine compiles some twenty of them, a second each, one after another, as CUDA graphs of more and
fewer sequences are captured; processes that have nothing else to do compile them side by side. vLLM is not imported.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from grpo.kernels import cards, nf4, nf4_compile, nf4_gemm, nf4_plans
from grpo.kernels.nf4_compile import Job, Product, Shrink
from grpo.model.base_weights import BaseWeights, FusedLinear
from grpo.policy.policy import Policy
from grpo.rollout.lora_buffers import served_ranks
from grpo.run import tiles
from grpo.run.compile_ahead import begun, capture_sizes


def nf4_shapes(base: BaseWeights) -> list[tuple[int, int]]:
    """(rows, columns) of the products that the base's 4-bit weights take part in."""
    segments = [segment for linear in base.linears.values() for segment in linear.segments]
    return [(one.rows, one.columns) for one in segments if one.weight.dtype == torch.uint8]


def compile_ahead(base: BaseWeights, policy: Policy, max_num_seqs: int, *, early: bool = False) -> None:
    """Begin to compile what sampling will launch on `base`'s GPU, unless it is in Triton's cache or others are at it. A
    GPU that has to be measured first chooses its kernels by that. early: whether a kernel is launched before the one in
    front of it has ended, where the GPU can."""
    if begun():
        return
    card = cards.card(base.device)
    tiles.load_measured(card)
    if not nf4_gemm.fused_serves(base.dtype, base.device) or tiles.unmeasured(card, nf4_shapes(base)):
        return
    rows = capture_sizes(max_num_seqs)[::-1]
    early = early and card.overlaps
    jobs = decoding_jobs(base.linears, served_ranks(base, policy), rows, base.device, early=early)
    nf4_compile.compile_in_background(jobs, card.architecture, base.dtype)


def decoding_jobs(
    linears: Mapping[str, FusedLinear], ranks: Mapping[str, int], row_counts: Sequence[int], device: torch.device,
    *, early: bool = False,
) -> Iterator[Job]:  # fmt: skip
    """The kernels of 4-bit products on `device`, and of their adapters of so many `ranks`, with these numbers of rows,
    in their order."""
    shrinks = cards.card(device).dot_is_fast
    for rows in row_counts:
        for name, linear in linears.items():
            if name in ranks and shrinks:
                yield Shrink(ranks[name], linear.in_features, early)
            for number, segment in enumerate(linear.segments):
                plan = nf4_plans.find_plan(device, segment.rows, segment.columns)
                tile = plan.tile(rows) if plan and segment.weight.dtype == torch.uint8 else None
                if plan and tile:
                    half, ragged = segment.columns % nf4.TILE != 0, rows % tile.m != 0
                    bias = linear.bias is not None
                    pending = early and name in ranks and number == 0
                    yield Product(tile, plan.split, ranks.get(name, 0), ragged, half, bias, pending)
