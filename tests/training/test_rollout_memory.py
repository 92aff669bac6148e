"""grpo/training/rollout_memory.py: what happens where vLLM's memory runs out a second time, or on several ranks.

That a run goes on after the first time, with the same tokens, is test_trainer.py's.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grpo.errors import UserError
from grpo.training.rollout_memory import sample_within_memory


def run_failing(times: int, ranks: int = 1) -> Any:
    """Stands in for a run whose sampling takes two prompts and fails so many times."""
    run = SimpleNamespace(
        stream=SimpleNamespace(taken={"sums": 4}), ranks=SimpleNamespace(size=ranks), shrunk=0, failures=times, drawn=[]
    )

    def sample(step: int) -> list[Any]:
        run.stream.taken["sums"] += 2
        run.drawn.append(torch.rand(()).item())
        if run.failures:
            run.failures -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [step]

    def shrink() -> None:
        run.shrunk += 1
        torch.rand(3)  # as vLLM's start uses the generator

    run.sample, run.session = sample, SimpleNamespace(shrink_kv_cache=shrink)
    return run


def attempt(run: Any) -> Any:
    return sample_within_memory(lambda: run.sample(3), run.stream, run.session, run.ranks)


def test_the_second_attempt_begins_where_the_first_did() -> None:
    run = run_failing(1)
    assert attempt(run) == [3]
    assert run.shrunk == 1 and run.stream.taken == {"sums": 6} and run.drawn[0] == run.drawn[1]


def test_enough_memory_changes_nothing() -> None:
    run = run_failing(0)
    assert attempt(run) == [3] and run.shrunk == 0 and run.stream.taken == {"sums": 6}


@pytest.mark.parametrize(
    ("run", "shrunk", "says"),
    [
        (run_failing(2), 1, "ran out while vLLM sampled, with a smaller KV cache too; lower rollout.max_num_seqs"),
        (run_failing(1, ranks=2), 0, "ran out while vLLM sampled; lower rollout.max_num_seqs"),
    ],
    ids=["again", "ranks"],
)
def test_otherwise_it_is_a_sentence(run: Any, shrunk: int, says: str) -> None:
    with pytest.raises(UserError, match=says):
        attempt(run)
    assert run.shrunk == shrunk
