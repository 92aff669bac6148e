"""grpo/rollout/prompt_graphs.py: which steps are captured, and that FlashAttention goes on as it did."""

from __future__ import annotations

from bisect import bisect_left
from types import SimpleNamespace

from hypothesis import given
from hypothesis import strategies as st

from grpo.rollout.prompt_graphs import GRAPH_BYTES, STEPS, compilation, graph_sizes, most_tokens, split_as_ever
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
    assert (
        told["cudagraph_mode"] == ("FULL_AND_PIECEWISE" if tokens >= STEPS[0] else "FULL_DECODE_ONLY")
        and told["mode"] == 0
    )


def test_only_builders_that_have_a_limit_of_their_own_get_another() -> None:
    flash, other = SimpleNamespace(max_cudagraph_size=2048), SimpleNamespace()
    split_as_ever([flash, other], 64)
    assert vars(flash) == {"max_cudagraph_size": 64} and not vars(other)


@given(st.integers(64, 16384), st.integers(64, 65536) | st.lists(st.integers(64, 65536), min_size=1) | st.none(),
       st.sampled_from([2, 4]), st.integers(0, 4096))  # fmt: skip
def test_graphs_of_large_models_stay_small(hidden: int, widest: int | list[int] | None, size: int, wanted: int) -> None:
    config = SimpleNamespace(hidden_size=hidden, intermediate_size=widest)
    tokens = most_tokens(config, size, wanted)
    wide = max(widest) if isinstance(widest, list) else widest or 4 * hidden
    assert 0 <= tokens <= wanted and tokens * (wide + hidden) * size <= GRAPH_BYTES
    assert tokens == wanted or (tokens + 1) * (3 * wide + 6 * hidden) * size > GRAPH_BYTES
