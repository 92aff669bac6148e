"""grpo/rollout/prompt_graphs.py: which steps are captured, and that FlashAttention goes on as it did."""

from __future__ import annotations

from bisect import bisect_left
from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from grpo.rollout.prompt_graphs import STEPS, compilation, graph_sizes, split_as_ever
from grpo.run.compile_ahead import capture_sizes


@given(st.integers(1, 600), st.integers(0, 4096), st.data())
def test_a_step_is_padded_by_half_at_most_and_decoding_as_ever(
    sequences: int, tokens: int, data: st.DataObject
) -> None:
    sizes = graph_sizes(sequences, tokens)
    assert sizes == sorted(set(sizes)) and set(capture_sizes(sequences)) <= set(sizes)
    assert max(sizes) <= max(sequences, tokens)
    largest = max((size for size in STEPS if size <= tokens), default=0)
    if largest > STEPS[0]:
        step = data.draw(st.integers(STEPS[0] + 1, largest))
        assert sizes[bisect_left(sizes, step)] <= 1.5 * step


@given(st.integers(1, 600), st.integers(0, 4096))
def test_without_them_vllm_is_told_what_it_always_was(sequences: int, tokens: int) -> None:
    plain, told = compilation(sequences, 0), compilation(sequences, tokens)
    assert plain["cudagraph_mode"] == "FULL_DECODE_ONLY"
    assert plain["cudagraph_capture_sizes"] == capture_sizes(sequences)
    assert told["cudagraph_mode"] == ("FULL_AND_PIECEWISE" if tokens else "FULL_DECODE_ONLY") and told["mode"] == 0


def test_only_builders_that_have_a_limit_of_their_own_get_another() -> None:
    flash, other = SimpleNamespace(max_cudagraph_size=2048), SimpleNamespace()
    split_as_ever([flash, other], 64)
    assert vars(flash) == {"max_cudagraph_size": 64} and not vars(other)
