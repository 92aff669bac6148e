"""The start-up check that generation uses the adapter that is being trained.

A stale or unsynchronised adapter raises no error anywhere: the run merely learns from the wrong policy. So before the
first step the adapter is moved, and vLLM must follow: its logprobs must change, and match the training graph's.
"""

from __future__ import annotations

import torch

from grpo.engine import Request, SamplingSettings
from grpo.policy import ADAPTER
from grpo.session import Session

PROMPT = 16
TOKENS = 8
NUDGE = 0.02
"""Standard deviation added to B."""

TOLERANCE = {torch.float32: 2e-3, torch.float16: 0.05, torch.bfloat16: 0.25}
"""Largest allowed mean |logprob difference| between vLLM and the training graph."""


def check_rollout_follows_adapter(session: Session) -> None:
    """Raise RuntimeError unless vLLM serves the adapter as it is now. The adapter is left as it was."""
    layers = session.policy.adapter_layers().values()
    tensors = [layer.lora_B[ADAPTER].weight for layer in layers]
    kept = [tensor.detach().clone() for tensor in tensors]
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, session.base.config.vocab_size, (PROMPT,), generator=generator).tolist()
    before = gap(session, prompt)
    try:
        with torch.no_grad():
            for tensor in tensors:
                tensor.add_(torch.randn(tensor.shape, generator=generator).to(tensor) * NUDGE)
        stale = gap(session, prompt)
        session.engine.sync_adapter()
        after = gap(session, prompt)
    finally:
        with torch.no_grad():
            for tensor, old in zip(tensors, kept, strict=True):
                tensor.copy_(old)
        session.engine.sync_adapter()
    limit = TOLERANCE[session.base.dtype]
    if before > limit or after > limit:
        raise RuntimeError(
            f"self-test: vLLM's logprobs differ from the training graph's by {before:.3f} on average before and "
            f"{after:.3f} after the adapter moved, over {limit}; completions would not come from the trained policy"
        )
    if stale <= after:
        raise RuntimeError(
            "self-test: moving the adapter without handing it to vLLM made no difference; the adapter has no effect"
        )


def gap(session: Session, prompt: list[int]) -> float:
    """Mean |logprob difference| between vLLM and the training graph over a short completion."""
    request = Request(0, prompt, seed=0)
    (done,) = session.engine.generate([request], SamplingSettings(temperature=1.0, max_tokens=TOKENS))
    with torch.no_grad():
        scored = session.policy.score([prompt], [done.token_ids], temperature=1.0)
    return float((torch.tensor(done.logprobs) - scored.logprobs.cpu()).abs().mean())
