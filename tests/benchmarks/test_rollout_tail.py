"""The simulated tail of a rollout: drafts change when tokens are sampled, never which; right ones save steps."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from benchmarks.rollout_tail import Drafting, Sampled, play
from benchmarks.scaling_simulation import rollout_seconds

TOKENS = st.lists(st.integers(0, 3), max_size=30)
GROUPS = st.lists(st.builds(Sampled, TOKENS, st.lists(TOKENS, min_size=1, max_size=4)), min_size=1, max_size=4)


def seconds(rows: int) -> float:
    return 3.0 + rows / 16


@given(GROUPS)
def test_without_drafts_it_takes_what_decoding_takes(groups: list[Sampled]) -> None:
    lengths = [len(each) for group in groups for each in group.completions if each]
    played = play(groups, seconds, Drafting(0, 0.0))
    assert abs(played.seconds - rollout_seconds(lengths, seconds)) < 1e-9
    assert played.drafted == played.accepted == 0


@given(GROUPS, st.integers(1, 8), st.floats(0.1, 1.0))
def test_every_accepted_token_saves_the_row_that_would_have_sampled_it(
    groups: list[Sampled], tokens: int, alive: float
) -> None:
    rows: list[int] = []

    def counting(count: int) -> float:
        rows.append(count)
        return 0.0

    played = play(groups, counting, Drafting(tokens, alive))
    sampled = sum(len(each) for group in groups for each in group.completions)
    assert played.accepted <= played.drafted
    assert sum(rows) - played.drafted + played.accepted == sampled


def test_a_sequence_that_repeats_its_prompt_is_sampled_in_jumps() -> None:
    words = list(range(40))
    steps: list[int] = []
    play([Sampled(words, [words])], lambda rows: float(steps.append(rows) or 1), Drafting(4, 1.0))
    assert len(steps) == 3 + -(-37 // 5), "three tokens until an end is recognised, then five a step"
