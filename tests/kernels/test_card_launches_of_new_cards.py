"""Every launch of every kernel, compiled for cards from Hopper on; as test_card_launches.py, in a file of its own so
that two processes share the work.
"""

from __future__ import annotations

import pytest

from tests.helpers.card_launches import BY_NAME, MODELS
from tests.helpers.every_launch import every_launch_fits


@pytest.mark.wide
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("card", [name for name, card in BY_NAME.items() if card.architecture >= 90])
def test_every_launch_fits_the_card(card, model):
    every_launch_fits(card, model)
