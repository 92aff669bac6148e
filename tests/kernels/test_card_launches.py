"""Every launch of every kernel, compiled for every architecture that is served, with real shapes of real models.

Those from Hopper on are in test_card_launches_of_new_cards.py, so that two processes share the work.

What is held: no program needs more shared memory than the card gives a block, and what a thread spills stays within
data/kernel_spills.json. Nothing runs. A quick selection is in the suite; all of it is marked `wide`, and
every tile that the tuner may try, hundreds a card, `long`.
"""

from __future__ import annotations

import pytest

from tests.helpers import card_launches
from tests.helpers.card_launches import BY_NAME, MODELS, Shape, hold, pretended
from tests.helpers.every_launch import every_launch_fits

ALIKE = "sm_86"
"""Has the shared memory and the instructions of sm_89: two models are enough of it but in the long tests."""
CASES = [
    pytest.param(
        card, model,
        marks=pytest.mark.long if card == ALIKE and model not in ("Llama-3.1-8B", "Gemma-3-4B") else pytest.mark.wide,
    )
    for card in BY_NAME
    if BY_NAME[card].architecture < 90
    for model in MODELS
]  # fmt: skip


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("card", "model"), CASES)
def test_every_launch_fits_the_card(card, model):
    every_launch_fits(card, model)


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
