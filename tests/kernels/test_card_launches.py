"""Every launch of every kernel, compiled for every architecture that is served, with real shapes of real models.

What is held: no program needs more shared memory than the card gives a block, and what a thread spills stays within
data/kernel_spills.json. Nothing runs. A quick selection is in the suite; all of it is marked `wide`, and
every tile that the tuner may try, hundreds a card, `long`.
"""

from __future__ import annotations

import json

import pytest
import torch

from grpo.kernels import delta_rule, mxfp4
from tests.helpers import card_launches
from tests.helpers.card_launches import CARDS, LAUNCHES, MODELS, MODULES, Card, Collected, Shape, kernels_of, pretended
from tests.helpers.paths import ROOT

SPILLS = json.loads((ROOT / "tests" / "data" / "kernel_spills.json").read_text())
"""Kernel -> bytes of local memory a thread may have; 0 for those that are not named."""
BY_NAME = {f"sm_{card.architecture}": card for card in CARDS}


def hold(card: Card, collected: Collected) -> None:
    """The card's limits."""
    assert collected.kernels
    over = [(name, shared) for name, shared, _ in collected.kernels if shared > card.shared_memory]
    assert not over, f"{card.name} gives a block {card.shared_memory} bytes"
    spilled = {name: stack for name, stack in collected.most_spilled().items() if stack > SPILLS.get(name, 0)}
    assert not spilled


@pytest.mark.wide
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("card", BY_NAME)
def test_every_launch_fits_the_card(card, model):
    with pretended(BY_NAME[card]) as collected:
        for dtype in card_launches.dtypes(BY_NAME[card]):
            for launches in LAUNCHES:
                launches(MODELS[model], dtype)
        hold(BY_NAME[card], collected)
    expected = {name for module in MODULES for name in kernels_of(module)}
    served = "_gemm_kernel" if BY_NAME[card].architecture == 75 else "_turing_kernel"
    with_dot = {"_shrink_kernel", "_dense_kernel", "_gemm_8bit_kernel"}
    absent = {served} | (with_dot if BY_NAME[card].architecture == 75 else set())
    assert collected.names == expected - absent, "every kernel there is"


WITH_EXPERTS = {"sm_80": pytest.mark.wide, "sm_90": pytest.mark.wide, "sm_120": pytest.mark.wide} | dict.fromkeys(
    ("sm_86", "sm_89", "sm_100"), pytest.mark.long
)
"""Not sm_75, which multiplies no packed experts; the others of a generation are compiled alike."""


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("model", card_launches.EXPERT_MODELS)
@pytest.mark.parametrize("card", [pytest.param(name, marks=mark) for name, mark in WITH_EXPERTS.items()])
def test_every_launch_of_experts_fits_the_card(card, model):
    shape = card_launches.EXPERT_MODELS[model]
    with pretended(BY_NAME[card]) as collected:
        card_launches.expert_layers(shape, torch.bfloat16)
        hold(BY_NAME[card], collected)
    expected = {name for module in card_launches.EXPERT_MODULES for name in kernels_of(module)}
    expected -= set() if shape.mxfp4 else set(kernels_of(mxfp4))
    assert expected <= collected.names, "every kernel there is"


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("card", [pytest.param(name, marks=mark) for name, mark in WITH_EXPERTS.items()])
def test_every_launch_of_recurrent_layers_fits_the_card(card):
    with pretended(BY_NAME[card]) as collected:
        card_launches.recurrent_operators(torch.bfloat16)
        hold(BY_NAME[card], collected)
    assert collected.names == {name for module in card_launches.RECURRENT_MODULES for name in kernels_of(module)}


def test_a_convolution_fits_a_turing_card():
    card = BY_NAME["sm_75"]
    with pretended(card) as collected:
        card_launches.recurrent_operators(torch.float16)
        hold(card, collected)
    assert not collected.names & set(kernels_of(delta_rule))


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("card", BY_NAME)
def test_every_tile_that_is_searched_fits_the_card(card):
    with pretended(BY_NAME[card]) as collected:
        for dtype in card_launches.dtypes(BY_NAME[card])[:1]:
            card_launches.tuned_products(MODELS["Llama-3.1-8B"], dtype, BY_NAME[card])
        hold(BY_NAME[card], collected)


SMALL = Shape(192, 384, 3, 1, 64, 1000, bias=True, head_norms=True)


@pytest.mark.parametrize("card", ["sm_75", "sm_86"])
def test_the_product_with_an_adapter_fits_the_card(card, monkeypatch):
    monkeypatch.setattr(card_launches, "DECODING", (33,))
    one = Shape(4096, 64, 32, 8, 128, 1000)
    monkeypatch.setattr(Shape, "linears", property(lambda shape: {"qkv": (6144, 4096)}))
    with pretended(BY_NAME[card]) as collected:
        card_launches.packed_products(one, card_launches.dtypes(BY_NAME[card])[0])
        hold(BY_NAME[card], collected)


@pytest.mark.parametrize("card", ["sm_86"])
def test_the_8_bit_product_with_an_adapter_fits_the_card(card, monkeypatch):
    one = Shape(4096, 64, 32, 8, 128, 1000)
    monkeypatch.setattr(card_launches, "EIGHT_BIT_ROWS", (33,))
    monkeypatch.setattr(Shape, "linears", property(lambda shape: {"qkv": (6144, 4096)}))
    with pretended(BY_NAME[card]) as collected:
        card_launches.eight_bit_products(one, card_launches.dtypes(BY_NAME[card])[0])
        hold(BY_NAME[card], collected)
    assert "_gemm_8bit_kernel" in collected.names


def test_products_without_tensor_cores_do_not_spill(monkeypatch):
    monkeypatch.setattr(card_launches, "DECODING", (33,))
    monkeypatch.setattr(Shape, "linears", property(lambda shape: {"qkv": (320, 192)}))
    card = BY_NAME["sm_75"]
    with pretended(card) as collected:
        for launches in (card_launches.dense_products, card_launches.shrinks, card_launches.norms):
            launches(SMALL, card_launches.dtypes(card)[0])
        hold(card, collected)
    assert "_round_sum_kernel" in collected.names and "_shrink_kernel" not in collected.names
