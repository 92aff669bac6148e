"""The loss on held-out examples: the mean over their trained tokens, whatever the batches."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch

from grpo.kernels.logprob import selected_logprobs
from grpo.policy.policy import Policy
from grpo.sft.data import IGNORED, Example


@torch.no_grad()
def held_out_loss(policy: Policy, examples: Sequence[Example], tokens_per_batch: int) -> dict[str, float]:
    """`eval/loss`, the negative log-likelihood in nats per token, with `eval_tokens` and `eval_seconds`.

    An example has at least one trained token after its first. The adapter is on, dropout is off; the mode that the
    model was in comes back.
    """
    started = time.perf_counter()
    was_training = policy.model.training
    policy.model.eval()
    total, count = 0.0, 0
    try:
        for batch in batches(examples, tokens_per_batch):
            logprobs = trained_logprobs(policy, batch)
            total -= logprobs.double().sum().item()
            count += len(logprobs)
    finally:
        policy.model.train(was_training)
    return {"eval/loss": total / count, "eval_tokens": count, "eval_seconds": time.perf_counter() - started}


def batches(examples: Sequence[Example], tokens: int) -> Iterator[list[Example]]:
    """`examples` in order, as many at a time as have at most `tokens` together, and at least one."""
    batch: list[Example] = []
    size = 0
    for example in examples:
        length = len(example.input_ids)
        if batch and size + length > tokens:
            yield batch
            batch, size = [], 0
        batch.append(example)
        size += length
    if batch:
        yield batch


def trained_logprobs(policy: Policy, batch: Sequence[Example]) -> torch.Tensor:
    """Logprob of every trained token of `batch` from the tokens before it in its example; float32 [tokens]."""
    device = policy.base.device
    tokens = [token for example in batch for token in example.input_ids]
    positions = [position for example in batch for position in range(len(example.input_ids))]
    targets = torch.tensor([label for example in batch for label in (*example.labels[1:], IGNORED)], device=device)
    hidden = policy.decoder.model(
        input_ids=torch.tensor([tokens], device=device),
        position_ids=torch.tensor([positions], device=device),
        use_cache=False,
    ).last_hidden_state[0]
    chosen = targets != IGNORED
    logprobs, _ = selected_logprobs(
        hidden[chosen],
        policy.head_weight(),
        targets[chosen],
        **policy.base.head_form.arguments(),
    )
    return logprobs
