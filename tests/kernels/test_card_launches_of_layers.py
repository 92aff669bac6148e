"""Every launch of experts and of recurrent layers, compiled for the architectures that serve them; as
test_card_launches.py, in a file of its own so that two processes share the work.
"""

from __future__ import annotations

import pytest
import torch

from grpo.kernels import delta_rule, mxfp4
from tests.helpers import card_launches
from tests.helpers.card_launches import BY_NAME, hold, kernels_of, pretended

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
