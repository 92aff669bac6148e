"""benchmarks/decode_linear.py: what it times fits the card, and the plans it writes keep what it did not time."""

from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.decode_linear import ROWS, choices_of, completed
from grpo.kernels import nf4_plans, nf4_tiles
from grpo.kernels.nf4_tiles import Plan, Tile
from tests.helpers.card_launches import BY_NAME

SHAPES = st.tuples(st.integers(8, 448), st.integers(8, 112)).map(lambda sizes: (64 * sizes[0], 128 * sizes[1]))


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(["sm_80", "sm_90", "sm_100", "sm_120"]), SHAPES)
def test_what_is_timed_has_room(card, shape):
    choices = choices_of(BY_NAME[card], shape, ROWS, nf4_tiles.SPLITS)
    assert len(set(choices)) == len(choices)
    for rows, split, tile in choices:
        assert nf4_tiles.serves(tile, BY_NAME[card]) and nf4_tiles.fits(tile, split, rows, shape[0])


@given(st.sets(st.sampled_from(ROWS)), SHAPES)
def test_a_plan_keeps_the_tiles_of_fewer_rows_and_none_beyond_the_last_that_won(won, shape):
    tile = Tile(64, 16, 4, 4, 2)
    before = nf4_plans.plan_for(BY_NAME["sm_90"], shape)
    found = completed(Plan(3, tuple((rows, tile) for rows in sorted(won))), before, shape)
    assert found.split == 3 and [rows for rows, _ in found.tiles] == sorted(rows for rows, _ in found.tiles)
    assert all(found.tile(rows) == tile for rows in won)
    assert max((rows for rows, _ in found.tiles), default=0) == max(won, default=0)
