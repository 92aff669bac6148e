"""The same rollout by vLLM's own scheduler and its own lists of logprobs, to compare an `Engine`'s with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


def scheduler_of(engine: Any) -> Any:
    return engine.llm.llm_engine.engine_core.engine_core.scheduler


@contextmanager
def crowded(engine: Any, *, blocks: int, step_tokens: int) -> Iterator[dict[str, int]]:
    """Leave so many free KV blocks, and so many tokens to a step: requests are preempted, prompts computed in pieces.

    Yields how often that happens.
    """
    scheduler = scheduler_of(engine)
    pool, longest_step = scheduler.kv_cache_manager.block_pool, scheduler.max_num_scheduled_tokens
    taken = pool.get_new_blocks(pool.get_num_free_blocks() - blocks)
    counts = {"preempted": 0, "in pieces": 0}
    original = scheduler.schedule

    def schedule(*arguments: Any, **options: Any) -> Any:
        scheduled = original(*arguments, **options)
        counts["preempted"] += len(scheduled.preempted_req_ids or ())
        counts["in pieces"] += sum(scheduler.requests[name].is_prefill_chunk for name in scheduled.num_scheduled_tokens)
        return scheduled

    scheduler.schedule, scheduler.max_num_scheduled_tokens = schedule, step_tokens
    try:
        yield counts
    finally:
        scheduler.schedule, scheduler.max_num_scheduled_tokens = original, longest_step
        pool.free_blocks(taken)


def vllms_own(engine: Any, requests: Sequence[Any], sampling: Any) -> dict[int, tuple[list[int], list[float]]]:
    """Request id -> (token ids, logprobs) as vLLM's scheduler class and its output processor give them."""
    scheduler = scheduler_of(engine)
    ours, manager = type(scheduler), scheduler.kv_cache_manager
    scheduler.__class__, scheduler.kv_cache_manager = ours.__mro__[1], manager._manager
    found = {}
    try:
        engine.begin(sampling, requests[0].seed)
        with engine.ending():
            for request in requests:
                engine.add(request)
            while engine.running:
                for output in engine._outputs():
                    if output.finished:
                        sample = output.outputs[0]
                        pairs = zip(sample.logprobs, sample.token_ids, strict=True)
                        logprobs = [entry[token].logprob for entry, token in pairs]
                        found[int(output.request_id)] = (list(sample.token_ids), logprobs)
    finally:
        scheduler.__class__, scheduler.kv_cache_manager = ours, manager
    return found
