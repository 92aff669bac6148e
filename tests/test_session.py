"""grpo/session.py: vLLM that runs out of memory at its start is started once more, with a smaller cache."""

from __future__ import annotations

import logging

import pytest
import torch

from grpo.errors import UserError
from grpo.session import with_smaller_cache

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("CUDA out of memory occurred when warming up sampler with 256 dummy requests."),
]


def failing(times: int, error: BaseException) -> tuple[list[int | None], object]:
    """(the sizes that were tried, a start that fails so many times)."""
    tried: list[int | None] = []

    def start(kv_bytes: int | None) -> int | None:
        tried.append(kv_bytes)
        if len(tried) <= times:
            raise error
        return kv_bytes

    return tried, start


@pytest.mark.parametrize("error", ERRORS, ids=["torch", "vllm"])
def test_the_second_attempt_has_a_smaller_cache(error, caplog):
    tried, start = failing(1, error)
    with caplog.at_level(logging.WARNING):
        assert with_smaller_cache(start, 8_000_000_000, 10**9) == 6_000_000_000
    assert tried == [8_000_000_000, 6_000_000_000]
    assert "with a KV cache of 8.0 GB; started again with 6.0 GB" in caplog.text


@pytest.mark.parametrize(
    ("kv_bytes", "least", "attempts"), [(8 * 10**9, 10**9, 2), (8 * 10**9, 7 * 10**9, 1), (None, 10**9, 1)]
)
def test_a_second_failure_or_no_choice_is_a_sentence(kv_bytes, least, attempts):
    tried, start = failing(3, ERRORS[0])
    with pytest.raises(UserError, match="memory ran out while vLLM started.*; lower rollout.max_num_seqs, .* the GPU$"):
        with_smaller_cache(start, kv_bytes, least)
    assert len(tried) == attempts


def test_other_errors_are_left_alone():
    tried, start = failing(1, ValueError("no such model"))
    with pytest.raises(ValueError, match="no such model"):
        with_smaller_cache(start, 8 * 10**9, 1)
    assert tried == [8 * 10**9]
