"""grpo/rollout/prompt_graphs.py: which steps are captured, and that FlashAttention goes on as it did."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo.rollout.prompt_graphs import (
    GRAPH_BYTES,
    STEPS,
    compilation,
    graph_sizes,
    left_out,
    most_tokens,
    split_as_ever,
)
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


SIZES = [1, 2, 4, 16, 64, 2048]


def dispatcher() -> Any:
    """vLLM's own, of an engine that has captured such steps."""
    pytest.importorskip("vllm")
    from vllm.config import CUDAGraphMode
    from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher

    compiled = SimpleNamespace(
        cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE, cudagraph_capture_sizes=SIZES,
        max_cudagraph_capture_size=SIZES[-1], is_attention_compiled_piecewise=lambda: True, mode=0, splitting_ops=[],
        compile_sizes=[], cudagraph_specialize_lora=False, cudagraph_num_of_warmups=0,
        max_num_batched_tokens_for_capture=None,
    )  # fmt: skip
    config = SimpleNamespace(
        compilation_config=compiled, lora_config=None, speculative_config=None, num_speculative_tokens=0,
        scheduler_config=SimpleNamespace(max_num_seqs=64), parallel_config=SimpleNamespace(),
    )  # fmt: skip
    made = CudagraphDispatcher(config)
    made.initialize_cudagraph_keys(CUDAGraphMode.FULL_AND_PIECEWISE, 1)
    return made


@pytest.mark.vllm
def test_within_left_out_no_step_is_a_graph_and_afterwards_all_are_again() -> None:
    from vllm.config import CUDAGraphMode

    steps = dispatcher()

    def modes() -> set[Any]:
        return {steps.dispatch(tokens, uniform_decode=uniform)[0] for tokens in SIZES for uniform in (False, True)}

    before = modes()
    assert CUDAGraphMode.PIECEWISE in before and CUDAGraphMode.FULL in before and CUDAGraphMode.NONE not in before
    with pytest.raises(ValueError, match="in the midst"), left_out(steps):
        assert modes() == {CUDAGraphMode.NONE}
        raise ValueError("in the midst")
    assert modes() == before


@pytest.mark.vllm
def test_modules_are_watched_where_their_steps_would_be_graphs() -> None:
    """With an engine that runs no layer's Python while graphs are used, as a captured step does."""
    from grpo.rollout.vllm_model import SharedLinearMethod
    from grpo.rollout.watch import watched_linears

    class Replays:
        graphs = True

        def __init__(self) -> None:
            self.layer = torch.nn.Linear(4, 3, bias=False)
            self.layer.quant_method = SharedLinearMethod.__new__(SharedLinearMethod)

        @contextmanager
        def without_graphs(self) -> Iterator[None]:
            self.graphs = False
            yield
            self.graphs = True

        def vllm_model(self) -> torch.nn.Module:
            return torch.nn.ModuleDict({"layer": self.layer})

        def reset_prefix_cache(self) -> None: ...

        def generate(self, requests: Any, sampling: Any) -> Iterator[Any]:
            if not self.graphs:
                self.layer(torch.ones(len(requests[0].prompt_ids), 4))
            return iter(())

    engine: Any = Replays()
    assert list(watched_linears(engine, [5, 6, 7], [0, 2], everywhere=True)) == ["layer"]
    assert engine.graphs
