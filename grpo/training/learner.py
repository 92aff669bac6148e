"""From a rollout to optimiser steps: micro-batches, logprobs, loss, gradients, AdamW.

The loss is normalised by constants of one optimiser step, so neither the token budget of a micro-batch nor the order
of sequences changes the gradient, nor how many ranks share them: gradients and metrics are summed over ranks. Old
logprobs are computed only when a rollout is used for more than one optimiser step, the reference's only when
`beta` > 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from grpo.config.schema import Config
from grpo.distributed.ranks import Ranks, split_evenly
from grpo.memory.full_finetuning import chosen_form
from grpo.policy.policy import Policy, TokenLogprobs
from grpo.policy.rng import RandomState, current_states
from grpo.rollout.sampler import Group
from grpo.training.advantages import Advantages, may_skip_equal_groups
from grpo.training.batch import (
    TrainingGroup,
    TrainingSequence,
    active_sequences,
    pack,
    sampled_inputs,
    training_group,
)
from grpo.training.loss import BatchTotals, LossInputs, batch_totals, resolve_loss
from grpo.training.loss_metrics import Metrics, as_message, from_message, joined, merge_metrics
from grpo.training.micro_batch import MicroBatchBudget, largest_batch
from grpo.training.optim import LossScaler, OptimizerBackup, build_optimizer, learning_rate, moments_like
from grpo.training.update_check import Batch, UpdateCheck
from grpo.training.weight_optimizer import WeightOptimizer, build_weight_optimizer


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
        ranks: Ranks | None = None,
    ):
        """`check` is called before every micro-batch, and may raise to abandon the update."""
        self.policy, self.config, self.max_steps, self.check = policy, config, max_steps, check
        self.tree = config.environment is not None
        """Whether sequences share more than whole prompts: turns of episodes do, completions hardly."""
        self.ranks = ranks or Ranks()
        self.update_check = UpdateCheck(config.train)
        self.loss = resolve_loss(config.loss)
        self.parameters = policy.parameters()
        self.budget = MicroBatchBudget(policy, config, notice)
        self.optimizer = optimizer_of(policy, config, notice)
        self.scaler = LossScaler(policy.base.dtype)

    def update(self, groups: Sequence[Group], advantages: Advantages, step: int) -> dict[str, float | None]:
        """All optimiser steps of one rollout, or none: what raises leaves the adapter and the optimiser as they were.

        Returns the step's training metrics. Raises SkippedUpdate for numbers that must not be trained on.
        """
        train = self.config.train
        rate = learning_rate(step, self.max_steps, train)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        may_skip = may_skip_equal_groups(self.config.loss)
        prompts = [
            training_group(group, advantages.of_group(index), zero_advantage=may_skip and bool(equal))
            for index, (group, equal) in enumerate(zip(groups, advantages.zero_std, strict=True))
        ]
        updates = train.num_iterations * train.optimizer_steps_per_rollout
        before = OptimizerBackup(self.parameters, self.optimizer) if updates > 1 else None
        update_check, scaler = self.update_check.state_dict(), self.scaler.state_dict()
        self.policy.model.train()
        try:
            if updates > 1:
                active = active_sequences(prompts)
                self.budget.retry_on_oom(lambda: self.remember_old_logprobs(active), self.clear_gradients)
            figures = [
                self.optimizer_step(part)
                for _ in range(train.num_iterations)
                for part in split(prompts, train.optimizer_steps_per_rollout)
            ]
        except BaseException:
            self.clear_gradients()
            self.update_check.load_state_dict(update_check)
            self.scaler.load_state_dict(scaler)
            if before is not None:
                before.restore()
            raise
        finally:
            self.policy.model.eval()
        return {**mean_of(figures), "learning_rate": rate}

    def optimizer_step(self, groups: list[TrainingGroup]) -> dict[str, float | None]:
        """One optimiser step on `groups`, or this rank's part of it."""
        active = active_sequences(groups)
        computed = Batch(groups, current_states(self.policy.base.device))
        totals = self.totals(groups, self.entropies(groups))
        metrics = self.budget.retry_on_oom(lambda: self.backpropagate(active, totals), self.clear_gradients)
        metrics = self.sum_over_ranks(metrics)
        norm = self.clip_gradients()
        figures = {**UNMEASURED, "grad_norm": norm, **merge_metrics(metrics)}
        if self.scaler.enabled:
            overflowed = self.scaler.overflowed(figures["loss"], norm)
            figures |= {"loss_scale": self.scaler.scale, "loss_scale_overflow": float(overflowed)}
            self.scaler.update(overflowed)
            if overflowed:
                self.clear_gradients()
                return {**figures, "grad_norm": None}
        self.update_check.check_update(figures, computed)
        self.apply_gradients()
        return figures

    def backpropagate(self, active: list[TrainingSequence], totals: BatchTotals) -> list[Metrics]:
        """Accumulate the gradient of one optimiser step on `active`."""
        metrics = []
        for batch in self.packed(active):
            self.check()
            loss, measured = self.micro_batch(batch, totals)
            self.scaler.backward(loss)
            metrics.append(measured)
        return metrics

    def sum_over_ranks(self, metrics: list[Metrics]) -> list[Metrics]:
        """Every rank's metrics; afterwards each gradient is the sum over ranks, if there is any."""
        if self.ranks.size == 1:
            return metrics
        gathered = self.ranks.gather({"any": self.has_gradients(), "metrics": as_message(joined(metrics))})
        if any(entry["any"] for entry in gathered):
            self.ranks.sum_gradients(self.parameters)
        return [from_message(entry["metrics"]) for entry in gathered]

    def probe_memory(self) -> None:
        """Try the largest micro-batch that the configuration allows, and discard what it gives.

        Run before the first step, beside the gradients and moments of later ones, so that memory runs out here or
        never. Where the configuration leaves the mode of checkpointing open, one that does not fit gives way to the
        next. Raises UserError where the last does not fit with half the tokens either.
        """
        random = RandomState(self.policy.base.device)
        self.policy.model.train()
        try:
            self.budget.fit_checkpointing(self.run_largest_batch, self.clear_gradients)
        finally:
            self.policy.model.eval()
            self.clear_gradients()
            random.restore()

    def run_largest_batch(self) -> None:
        """Gradients of the largest micro-batch, with the optimiser's moments in memory."""
        batch = largest_batch(self.config, self.budget.tokens)
        moments = [] if self.optimizer.state else moments_like(self.parameters, self.config.train)
        entropy = self.entropy(batch) if self.needs_entropies else None
        self.backpropagate(batch, self.totals([TrainingGroup.of(batch)], entropy))
        moments.clear()

    def micro_batch(self, batch: list[TrainingSequence], totals: BatchTotals) -> tuple[Tensor, Metrics]:
        """The share of the loss that `batch` contributes, a float32 scalar with its graph, and what it measured."""
        sampled = sampled_inputs(batch, self.policy.base.device)
        scored = self.score(batch, entropy_gradient=self.config.loss.entropy_coef != 0)
        inputs = LossInputs(
            logprobs=scored.logprobs, entropy=scored.entropy, ref_logprobs=self.reference_logprobs(batch), **sampled
        )
        return self.loss(inputs, totals, self.config.loss)

    def reference_logprobs(self, batch: list[TrainingSequence]) -> Tensor | None:
        """float32 [T] of the base without the adapter; None without a KL penalty."""
        if self.config.loss.beta == 0:
            return None
        with self.policy.reference():
            return self.score(batch).logprobs

    def totals(self, groups: Sequence[TrainingGroup], entropy: Tensor | None) -> BatchTotals:
        """The constants that normalise the loss of one optimiser step on `groups`, of which `entropies` gave
        `entropy`."""
        return batch_totals(
            [length for group in groups for length in group.lengths],
            self.config.loss,
            self.config.rollout.max_completion_length,
            truncated=[truncated for group in groups for truncated in group.truncated],
            entropy=entropy,
        )

    @property
    def needs_entropies(self) -> bool:
        """Whether the loss selects tokens by the entropy of all."""
        return self.config.loss.top_entropy_quantile < 1

    def entropies(self, groups: Sequence[TrainingGroup]) -> Tensor | None:
        """float32 [T] at the T trained tokens of `groups`, from all ranks; None where the loss does not need it."""
        if not self.needs_entropies:
            return None
        here = {index: group for index, group in enumerate(groups) if group.sequences}
        sequences = [sequence for group in here.values() for sequence in group.sequences]
        entropy = self.budget.retry_on_oom(lambda: self.entropy(sequences), self.clear_gradients)
        parts = entropy.split([sum(group.lengths) for group in here.values()])
        everywhere = self.ranks.gather_indexed(dict(zip(here, parts, strict=True)), len(groups))
        return torch.cat([part.to(entropy.device) for part in everywhere])

    @torch.no_grad()
    def entropy(self, sequences: Sequence[TrainingSequence]) -> Tensor:
        """float32 [T] at the T trained tokens of `sequences`, from an extra forward pass."""
        batches = self.packed(sequences)
        none = torch.empty(0, device=self.policy.base.device)  # a rank may have no sequences
        return torch.cat([none, *(self.score(batch).entropy for batch in batches)])

    @torch.no_grad()
    def remember_old_logprobs(self, sequences: list[TrainingSequence]) -> None:
        """Store each sequence's logprobs, float32 [trained], under the policy as it is now."""
        for batch in self.packed(sequences):
            lengths = [sequence.trained for sequence in batch]
            for sequence, logprobs in zip(batch, self.score(batch).logprobs.split(lengths), strict=True):
                sequence.old_logprobs = logprobs

    def packed(self, sequences: Sequence[TrainingSequence]) -> list[list[TrainingSequence]]:
        """`sequences` as micro-batches."""
        return pack(sequences, self.budget.tokens, tree=self.tree)

    def score(self, batch: Sequence[TrainingSequence], *, entropy_gradient: bool = False) -> TokenLogprobs:
        """Logprob and entropy, float32 [T] each, at the T trained tokens of `batch`, one sequence after another."""
        segments = [segment for sequence in batch for segment in sequence.segments]
        all_sampled = all(segment.sampled is None for segment in segments)
        return self.policy.score(
            [segment.prompt_ids for segment in segments],
            [segment.token_ids for segment in segments],
            sampled=None if all_sampled else [drawn for segment in segments for drawn in segment.mask],
            temperature=self.config.rollout.temperature,
            chunk_tokens=self.config.train.logprob_chunk_tokens,
            entropy_gradient=entropy_gradient,
            tree=self.tree,
            routes=[segment.routes for segment in segments] if self.config.train.router_replay else None,
            images=[segment.images for segment in segments],
        )

    def clip_gradients(self) -> float:
        """The norm of all gradients together before clipping; 0 without any gradient."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if not gradients:
            return 0.0
        if isinstance(self.optimizer, WeightOptimizer):
            return self.optimizer.clip(self.config.train.max_grad_norm)
        self.scaler.unscale(gradients)
        return float(torch.nn.utils.clip_grad_norm_(self.parameters, self.config.train.max_grad_norm))

    def apply_gradients(self) -> None:
        """Step and clear. Without any gradient nothing moves."""
        if self.has_gradients():
            self.optimizer.step()
            self.clear_gradients()

    def has_gradients(self) -> bool:
        """Whether anything was backpropagated."""
        return any(parameter.grad is not None for parameter in self.parameters)

    def clear_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def is_finite(self) -> bool:
        """Whether every value of the adapter is a number."""
        return all(bool(parameter.isfinite().all()) for parameter in self.parameters)

    def state_dict(self) -> dict[str, Any]:
        parts = {
            "optimizer": self.optimizer,
            "guard": self.update_check,
            "scaler": self.scaler,
            "headroom": self.budget,
        }
        return {name: part.state_dict() for name, part in parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.update_check.load_state_dict(state["guard"])
        self.scaler.load_state_dict(state["scaler"])
        self.budget.load_state_dict(state["headroom"])


def optimizer_of(policy: Policy, config: Config, notice: Callable[[str], None]) -> torch.optim.Optimizer:
    """The optimiser of an adapter, or of the weights themselves."""
    if config.model.full_finetuning:
        return build_weight_optimizer(policy.parameters(), chosen_form(config), config.train, notice)
    return build_optimizer(policy.parameters(), config.train, policy.base.device, notice)


def split(prompts: list[TrainingGroup], parts: int) -> list[list[TrainingGroup]]:
    """`prompts` in `parts` runs whose lengths differ by at most one; none is empty unless there are too few."""
    return [prompts[first:last] for first, last in split_evenly(len(prompts), parts) if last > first]


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
