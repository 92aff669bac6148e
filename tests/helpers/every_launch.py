"""All launches of a model on a card, as tests/kernels/test_card_launches*.py ask for them."""

from __future__ import annotations

from tests.helpers.card_launches import BY_NAME, LAUNCHES, MODELS, MODULES, dtypes, hold, kernels_of, pretended


def every_launch_fits(card: str, model: str) -> None:
    """Compile what a model launches on a card, in each type; every kernel there is has to be among it."""
    with pretended(BY_NAME[card]) as collected:
        for dtype in dtypes(BY_NAME[card]):
            for launches in LAUNCHES:
                launches(MODELS[model], dtype)
        hold(BY_NAME[card], collected)
    expected = {name for module in MODULES for name in kernels_of(module)}
    served = "_gemm_kernel" if BY_NAME[card].architecture == 75 else "_turing_kernel"
    with_dot = {"_shrink_kernel", "_dense_kernel", "_gemm_8bit_kernel", "_decode_kernel"}
    absent = {served} | (with_dot if BY_NAME[card].architecture == 75 else set())
    assert collected.names == expected - absent, "every kernel there is"
