"""From a rollout to optimiser steps: micro-batches, logprobs, loss, gradients, AdamW.

The loss is normalised by constants of one optimiser step, so neither the token budget of a micro-batch nor the order
of sequences changes the gradient. Old logprobs are computed only when a rollout is used for more than one optimiser
step, the reference's only when `beta` > 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor

from grpo.advantages import Advantages, may_skip_equal_groups
from grpo.batch import PackedTokens, TrainingSequence, pack, packed_tokens, training_sequences
from grpo.config import Config
from grpo.guard import Batch, Guard, rng_states
from grpo.loss import BatchTotals, LossInputs, batch_totals, resolve_loss
from grpo.loss_metrics import Metrics, merge_metrics
from grpo.optim import build_optimizer, learning_rate
from grpo.plan import KEPT_HIDDEN, KEPT_INNER
from grpo.policy import Policy, Scored
from grpo.sampler import Group
from grpo.snapshot import Snapshot


class Learner:
    """Owns the optimiser; changes the policy's adapter."""

    def __init__(
        self,
        policy: Policy,
        config: Config,
        *,
        max_steps: int,
        notice: Callable[[str], None],
        check: Callable[[], None] = lambda: None,
    ):
        """`check` is called before every micro-batch, and may raise to abandon the update."""
        self.policy, self.config, self.max_steps, self.check = policy, config, max_steps, check
        self.guard = Guard(config.train)
        self.loss = resolve_loss(config.loss)
        self.parameters = policy.parameters()
        self.headroom = Headroom(policy, config, notice)
        self.optimizer = build_optimizer(self.parameters, config.train, policy.base.device, notice)
        self.scaler = LossScaler(policy.base.dtype)

    def update(self, groups: Sequence[Group], advantages: Advantages, step: int) -> dict[str, float | None]:
        """All optimiser steps of one rollout, or none: what raises leaves the adapter and the optimiser as they were.

        Returns the step's training metrics. Raises UnusableUpdate for numbers that must not be trained on.
        """
        train = self.config.train
        rate = learning_rate(step, self.max_steps, train)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        prompts = [training_sequences(group, values) for group, values in zip(groups, advantages.values, strict=True)]
        if may_skip_equal_groups(self.config.loss):
            idle = {id(prompt) for prompt, equal in zip(prompts, advantages.zero_std, strict=True) if equal}
        else:
            idle = set()
        updates = train.num_iterations * train.optimizer_steps_per_rollout
        before = Snapshot(self.parameters, self.optimizer) if updates > 1 else None
        guard_before = self.guard.state_dict()
        self.policy.model.train()
        try:
            if updates > 1:
                self.remember_old_logprobs([s for prompt in prompts if id(prompt) not in idle for s in prompt])
            figures = [
                self.optimizer_step(part, idle)
                for _ in range(train.num_iterations)
                for part in split(prompts, train.optimizer_steps_per_rollout)
            ]
        except BaseException:
            self.optimizer.zero_grad(set_to_none=True)
            self.guard.load_state_dict(guard_before)
            if before is not None:
                before.restore()
            raise
        finally:
            self.policy.model.eval()
        return {**mean_of(figures), "learning_rate": rate}

    def optimizer_step(self, prompts: list[list[TrainingSequence]], idle: set[int]) -> dict[str, float | None]:
        """One optimiser step on `prompts`; those in `idle` count in the normaliser only."""
        active = [sequence for prompt in prompts if id(prompt) not in idle for sequence in prompt]
        computed = Batch(prompts, [id(prompt) in idle for prompt in prompts], rng_states(self.policy.base.device))
        everything = [sequence for prompt in prompts for sequence in prompt]
        metrics = self.headroom.within(lambda: self.backpropagate(active, everything), self.clear_gradients)
        figures = {**UNMEASURED, "grad_norm": self.clip_gradients(), **merge_metrics(metrics)}
        if self.scaler.enabled:
            figures["loss_scale"] = self.scaler.scale
            overflowed = self.scaler.overflowed(figures)
            figures["loss_scale_overflow"] = float(overflowed)
            self.scaler.update(overflowed)
            if overflowed:
                self.clear_gradients()
                return {**figures, "grad_norm": None}
        self.guard.check_update(figures, computed)
        self.apply_gradients()
        return figures

    def backpropagate(self, active: list[TrainingSequence], everything: list[TrainingSequence]) -> list[Metrics]:
        """Accumulate the gradient of one optimiser step on `active`, normalised by `everything`."""
        totals = self.totals(everything)
        metrics = []
        for batch in pack(active, self.headroom.tokens):
            self.check()
            loss, measured = self.micro_batch(batch, totals)
            self.scaler.backward(loss)
            metrics.append(measured)
        return metrics

    def probe_memory(self) -> None:
        """Try the largest micro-batch that the configuration allows, and discard what it gives.

        Run before the first step, with the gradients and moments of later ones held, so that memory runs out here or
        never. Where the configuration leaves the form of checkpointing open, one that does not fit gives way.
        Raises UserError where the least demanding form does not fit either.
        """

        def attempt() -> None:
            batch = largest_batch(self.config, self.headroom.tokens)
            held = [torch.empty_like(parameter) for parameter in self.parameters for _ in range(self.moments())]
            with torch.random.fork_rng(devices=[self.policy.base.device] if self.policy.base.device.index else []):
                self.backpropagate(batch, batch)
            del held

        self.policy.model.train()
        try:
            while True:
                self.headroom.within(attempt, self.clear_gradients)
        finally:
            self.policy.model.eval()
            self.clear_gradients()

    def micro_batch(self, batch: list[TrainingSequence], totals: BatchTotals) -> tuple[Tensor, Metrics]:
        """The share of the loss that `batch` contributes."""
        tokens = packed_tokens(batch, self.policy.base.device)
        scored = self.score(batch, entropy_gradient=self.config.loss.entropy_coef != 0)
        return self.loss(self.loss_inputs(batch, tokens, scored), totals, self.config.loss)

    def loss_inputs(self, batch: list[TrainingSequence], tokens: PackedTokens, scored: Scored) -> LossInputs:
        reference = None
        if self.config.loss.beta > 0:
            with self.policy.reference():
                reference = self.score(batch).logprobs
        return LossInputs(
            logprobs=scored.logprobs,
            old_logprobs=tokens.old_logprobs,
            rollout_logprobs=tokens.rollout_logprobs,
            ref_logprobs=reference,
            advantages=tokens.advantages,
            sequence=tokens.sequence,
            mask=torch.ones_like(tokens.sequence, dtype=torch.bool),
            entropy=scored.entropy,
            truncated=tokens.truncated,
        )

    def totals(self, sequences: Sequence[TrainingSequence]) -> BatchTotals:
        """The constants that normalise the loss of one optimiser step."""
        return batch_totals(
            [len(sequence.completion_ids) for sequence in sequences],
            self.config.loss,
            self.config.rollout.max_completion_length,
            truncated=[sequence.truncated for sequence in sequences],
            entropy=self.entropy(sequences) if self.config.loss.top_entropy_quantile < 1 else None,
        )

    @torch.no_grad()
    def entropy(self, sequences: Sequence[TrainingSequence]) -> Tensor:
        """Entropy at every completion token, from an extra forward pass."""
        batches = pack(sequences, self.config.train.tokens_per_micro_batch)
        return torch.cat([self.score(batch).entropy for batch in batches])

    @torch.no_grad()
    def remember_old_logprobs(self, sequences: list[TrainingSequence]) -> None:
        """Store each sequence's logprobs under the policy as it is now."""
        for batch in pack(sequences, self.config.train.tokens_per_micro_batch):
            lengths = [len(sequence.completion_ids) for sequence in batch]
            for sequence, logprobs in zip(batch, self.score(batch).logprobs.split(lengths), strict=True):
                sequence.old_logprobs = logprobs

    def score(self, batch: Sequence[TrainingSequence], *, entropy_gradient: bool = False) -> Scored:
        return self.policy.score(
            [sequence.prompt_ids for sequence in batch],
            [sequence.completion_ids for sequence in batch],
            temperature=self.config.rollout.temperature,
            chunk_tokens=self.config.train.logprob_chunk_tokens,
            entropy_gradient=entropy_gradient,
        )

    def clip_gradients(self) -> float:
        """The gradient norm before clipping; 0 without any gradient."""
        if all(parameter.grad is None for parameter in self.parameters):
            return 0.0
        return float(torch.nn.utils.clip_grad_norm_(self.parameters, self.config.train.max_grad_norm))

    def apply_gradients(self) -> None:
        """Step and clear. Without any gradient nothing moves."""
        if any(parameter.grad is not None for parameter in self.parameters):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "guard": self.guard.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.guard.load_state_dict(state["guard"])


def checkpointing_form(policy: Policy, config: Config) -> str:
    """`train.gradient_checkpointing`; "auto": "layer" where a micro-batch's activations exceed half the free memory."""
    wanted = str(config.train.gradient_checkpointing)
    if wanted != "auto":
        return wanted
    model, base = policy.base.config, policy.base
    per_token = base.dtype.itemsize * (KEPT_HIDDEN * model.hidden_size + KEPT_INNER * model.intermediate_size)
    tokens = max(config.train.tokens_per_micro_batch, config.max_seq_length)
    return "layer" if per_token * model.num_hidden_layers * tokens > free_memory(base.device) / 2 else "none"


def free_memory(device: torch.device) -> int:
    """Bytes free on the GPU or, on a CPU, available to processes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def split(prompts: list[list[TrainingSequence]], parts: int) -> list[list[list[TrainingSequence]]]:
    """`prompts` in `parts` runs whose lengths differ by at most one; none is empty unless there are too few."""
    bounds = [len(prompts) * part // parts for part in range(parts + 1)]
    return [prompts[first:last] for first, last in zip(bounds, bounds[1:], strict=False) if last > first]


UNMEASURED = {"loss": 0.0, "kl": None, "entropy": None, "mismatch_kl": None}
"""What a step reports where it measured nothing: no KL without `beta`, no figure where all groups are equal."""


def mean_of(figures: list[dict[str, float | None]]) -> dict[str, float | None]:
    """The mean of each figure over the optimiser steps that have it; None where none has."""
    names = dict.fromkeys(name for entry in figures for name in entry)
    return {name: average([entry.get(name) for entry in figures]) for name in names}


def average(values: list[float | None]) -> float | None:
    """Mean of what is not None."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
