"""A step's sampling where vLLM runs out of memory: once more, from its beginning, with a smaller KV cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from grpo.data import PromptStream
from grpo.distributed.ranks import Ranks
from grpo.errors import UserError
from grpo.session import Session

T = TypeVar("T")


def sample_within_memory(sample: Callable[[], T], stream: PromptStream, session: Session, ranks: Ranks) -> T:
    """`sample()`, of prompts of `stream`; where vLLM's memory runs out, it is started again and they are sampled anew.

    The second time is the last: its torch.OutOfMemoryError becomes a UserError, as does one on several ranks, whose
    others have gone on.
    """
    taken, random = stream.taken.copy(), torch.get_rng_state()
    try:
        return sample()
    except torch.OutOfMemoryError:
        if ranks.size > 1:
            raise UserError(
                "a GPU's memory ran out while vLLM sampled; lower rollout.max_num_seqs or rollout.kv_cache_memory_bytes"
            ) from None
    # Not in the handler: the exception holds the frames, and they the tensors, of the attempt.
    session.shrink_kv_cache()
    stream.taken = taken
    torch.set_rng_state(random)
    try:
        return sample()
    except torch.OutOfMemoryError:
        raise UserError(
            "the GPU's memory ran out while vLLM sampled, with a smaller KV cache too; lower rollout.max_num_seqs or "
            "rollout.max_completion_length, or end what else uses the GPU"
        ) from None
