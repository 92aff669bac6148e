"""The start-up check that generation uses the adapter that is being trained.

A stale or unsynchronised adapter raises no error anywhere: the run merely learns from the wrong policy. So before the
first step the adapter is moved, and vLLM must follow. How far it should go is known from the training graph: tokens
that vLLM samples with the moved adapter are scored there with the adapter as it was and as it is. The move is made as
small as stands out from the rounding of the two graphs, whatever modules have an adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from grpo.errors import UserError
from grpo.policy.lora_linear import ADAPTER
from grpo.policy.policy import Policy
from grpo.rollout.engine import Request, SamplingSettings
from grpo.session import Session

PROMPT = 16
TOKENS = 16
NUDGES = tuple(0.02 * 2**power for power in range(8))
"""Standard deviations of what is added to B, tried in this order."""
STANDS_OUT = 4.0
"""How many times the difference between the two graphs the effect of a nudge should be, in mean |logprob|."""
LEAST_FOLLOWED = 0.5
"""Share of the effect that vLLM must show. A stale adapter shows none, a served one all."""
TOLERANCE = {torch.float32: 2e-3, torch.float16: 0.05, torch.bfloat16: 0.25}
"""Largest allowed mean |logprob difference| between vLLM and the training graph."""


class Sampled(NamedTuple):
    """A completion, and vLLM's logprobs of its tokens [tokens], float32."""

    tokens: list[int]
    logprobs: Tensor


def check_rollout_follows_adapter(session: Session) -> None:
    """Raise UserError unless vLLM serves the adapter as it is now. The adapter is left as it was."""
    policy, limit = session.policy, TOLERANCE[session.base.dtype]
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, session.base.config.vocab_size, (PROMPT,), generator=generator).tolist()
    before = sample(session, prompt)
    gap = distance(before.logprobs, scored(policy, prompt, before))
    refuse_difference(gap, limit, "")
    nudge = nudge_that_stands_out(policy, prompt, before, max(STANDS_OUT * gap, limit / STANDS_OUT))
    try:
        with moved(policy, nudge):
            session.engine.sync_adapter()
            after = sample(session, prompt)
            here = scored(policy, prompt, after)
        there = scored(policy, prompt, after)
    finally:
        session.engine.sync_adapter()
    effect = here - there
    followed = float((after.logprobs - there) @ effect / (effect @ effect))
    if not followed > LEAST_FOLLOWED:
        raise UserError(
            f"self-test: of the effect that moving the adapter has on the training graph, generation shows "
            f"{followed:.0%}: vLLM samples from another adapter; please report this with the model and the versions"
        )
    # A larger move makes larger activations, and rounding errors with them.
    refuse_difference(distance(after.logprobs, here), max(limit, float(effect.abs().mean()) / STANDS_OUT), "moved ")


def nudge_that_stands_out(policy: Policy, prompt: list[int], sampled: Sampled, least: float) -> float:
    """The first of NUDGES that changes the training graph's logprobs by `least` on average. Raises UserError."""
    start = scored(policy, prompt, sampled)
    for nudge in NUDGES:
        with moved(policy, nudge):
            if distance(scored(policy, prompt, sampled), start) >= least:
                return nudge
    raise UserError(
        f"self-test: moving the adapter on {policy.adapted()} changes no logprob by {least:.3g}, "
        "so it cannot be trained; name other lora.target_modules"
    )


@contextmanager
def moved(policy: Policy, nudge: float) -> Iterator[None]:
    """Inside, every B has noise of standard deviation `nudge` added: the same at each call, in proportion."""
    tensors = [layer.lora_B[ADAPTER].weight for layer in policy.adapter_layers().values()]
    kept = [tensor.detach().clone() for tensor in tensors]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in tensors:
            tensor.add_(torch.randn(tensor.shape, generator=generator).to(tensor) * nudge)
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, old in zip(tensors, kept, strict=True):
                tensor.copy_(old)


def refuse_difference(gap: float, limit: float, which: str) -> None:
    """Raise UserError for a difference between the two graphs that rounding does not explain."""
    if not gap <= limit:
        raise UserError(
            f"self-test: with the {which}adapter vLLM's logprobs differ from the training graph's by {gap:.3g} on "
            f"average, over {limit:.3g}, so completions would not come from the trained policy; please report this "
            "with the model and the versions"
        )


def sample(session: Session, prompt: list[int]) -> Sampled:
    """A short completion from vLLM."""
    request = Request(0, prompt, seed=0)
    (done,) = session.engine.generate([request], SamplingSettings(temperature=1.0, max_tokens=TOKENS))
    return Sampled(done.token_ids, torch.tensor(done.logprobs))


@torch.no_grad()
def scored(policy: Policy, prompt: list[int], sampled: Sampled) -> Tensor:
    """The training graph's logprobs of the same tokens, on the CPU."""
    return policy.score([prompt], [sampled.tokens], temperature=1.0).logprobs.float().cpu()


def distance(one: Tensor, other: Tensor) -> float:
    """Mean |difference|."""
    return float((one - other).abs().mean())
