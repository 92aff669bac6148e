"""A step's sampling where vLLM runs out of memory: once more, from its beginning, with a smaller KV cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from grpo.errors import UserError
from grpo.rollout.sampler import Rollout

if TYPE_CHECKING:
    from grpo.training.trainer import Run


def sample_within_memory(run: Run, step: int) -> list[Rollout]:
    """`run.sample(step)`; where vLLM's memory runs out, it is started again and the same prompts are sampled.

    The second time is the last: its torch.OutOfMemoryError becomes a UserError, as does one on several ranks, whose
    others have gone on.
    """
    taken, random = run.stream.taken.copy(), torch.get_rng_state()
    try:
        return run.sample(step)
    except torch.OutOfMemoryError:
        if run.ranks.size > 1:
            raise UserError(
                "a GPU's memory ran out while vLLM sampled; lower rollout.max_num_seqs or rollout.kv_cache_memory_bytes"
            ) from None
    # Not in the handler: the exception holds the frames, and they the tensors, of the attempt.
    run.session.shrink_kv_cache()
    run.stream.taken = taken
    torch.set_rng_state(random)
    try:
        return run.sample(step)
    except torch.OutOfMemoryError:
        raise UserError(
            "the GPU's memory ran out while vLLM sampled, with a smaller KV cache too; lower rollout.max_num_seqs or "
            "rollout.max_completion_length, or end what else uses the GPU"
        ) from None
