"""The policy loss: one small function an objective, each with its equation, over flat packed tokens.

A micro-batch holds whole sequences one after the other, without padding. Every objective is a sum over tokens
divided by constants of the optimiser step (`BatchTotals`), so that the losses of micro-batches simply add up and no
split of the batch changes the gradient. KL estimators, rollout weights and masks are in grpo/training/loss_terms.py.
Not here: where log-probabilities come from, how advantages are made, the optimiser.

Notation: i a sequence of length |o_i|, t a token; N sequences and L = sum |o_i| tokens in an optimiser step; A_i
advantage; r_it = pi(o_it) / pi_old(o_it), or with `importance_sampling_level = "sequence"` the same for all tokens
of a sequence, (prod_t r_it)^(1 / |o_i|). All losses are minimised.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from grpo.config.schema import Loss
from grpo.errors import UserError
from grpo.references import resolve
from grpo.training.loss_metrics import EffectiveSampleSize, Maximum, Mean, Metric, Metrics, Total
from grpo.training.loss_terms import (
    capped_exp,
    entropy_quantile,
    keeps_on_policy,
    kl_estimate,
    per_token,
    rollout_weights,
    sequence_sum,
)

CISPO_CAP = 5.0
"""CISPO's cap on the ratio where `epsilon_high` is not set; ScaleRL's value (arXiv:2510.13786)."""


@dataclass(frozen=True, kw_only=True)
class LossInputs:
    """A micro-batch: T completion tokens of S whole sequences. Floats share a device, and best a dtype.

    logprobs: [T], of the policy being trained, with gradient.
    old_logprobs: [T], of the policy that the rollout was made with, by the trainer's graph; None where that is the
        policy being trained, as in the first optimiser step after a rollout.
    rollout_logprobs: [T], as the generation engine reported them; NaN where it reported none.
    advantages: [S].
    sequence: [T], int64, index of each token's sequence, not decreasing.
    mask: [T] bool, tokens that are trained on.
    ref_logprobs: [T], of the reference policy; needed for `beta` > 0.
    entropy: [T], of the policy's distribution at each token; with gradient for `entropy_coef` != 0.
    token_advantages: [T], where tokens of a sequence have different ones; `advantages` are their means then.
    truncated: [S] bool, sequences that ran into the length limit; needed for `mask_truncated_completions`.
    """

    logprobs: Tensor
    old_logprobs: Tensor | None
    rollout_logprobs: Tensor
    advantages: Tensor
    sequence: Tensor
    mask: Tensor
    ref_logprobs: Tensor | None = None
    entropy: Tensor | None = None
    truncated: Tensor | None = None
    token_advantages: Tensor | None = None

    @property
    def num_sequences(self) -> int:
        return len(self.advantages)


@dataclass(frozen=True)
class BatchTotals:
    """Constants of one optimiser step, by which its micro-batches' sums are divided.

    num_sequences: completions, those of skipped groups and masked ones included.
    num_tokens: tokens trained on, those of skipped groups included.
    max_completion_length: the limit in tokens, for Dr. GRPO.
    entropy_threshold: only tokens with at least this entropy are trained on; None: all.
    num_entropy_tokens: how many of `num_tokens` those are.
    """

    num_sequences: int
    num_tokens: int
    max_completion_length: int
    entropy_threshold: float | None = None
    num_entropy_tokens: int | None = None


def batch_totals(
    lengths: Sequence[int],
    settings: Loss,
    max_completion_length: int,
    *,
    truncated: Sequence[bool] | None = None,
    entropy: Tensor | None = None,
) -> BatchTotals:
    """The constants of an optimiser step.

    lengths: tokens of each of its completions, skipped groups included.
    truncated: whether each ran into the length limit; needed for `mask_truncated_completions`.
    entropy: of all those tokens in that order, [sum of lengths]; needed for `top_entropy_quantile` < 1.
    """
    sizes = torch.as_tensor(lengths, dtype=torch.int64)
    selected = torch.ones_like(sizes, dtype=torch.bool)
    if settings.mask_truncated_completions:
        selected = ~torch.as_tensor(_needed(truncated, "truncated", "mask_truncated_completions"), dtype=torch.bool)
    num_tokens = int((sizes * selected).sum())
    if settings.top_entropy_quantile == 1:
        return BatchTotals(len(lengths), num_tokens, max_completion_length)
    entropy = _needed(entropy, "entropy", "top_entropy_quantile")
    entropy = entropy[selected.repeat_interleave(sizes).to(entropy.device)]
    threshold = entropy_quantile(entropy, settings.top_entropy_quantile)
    count = int((entropy >= threshold).sum())
    return BatchTotals(len(lengths), num_tokens, max_completion_length, threshold, count)


@dataclass(frozen=True)
class Terms:
    """What objectives are written in; tensors are [T], with neutral values where `mask` is 0.

    ratio: r_it, with gradient. weight: 0 for masked tokens, else the product of all corrections, 1 without any.
    penalty: beta times the KL estimate, 0 for masked tokens; None without a reference.
    lengths: [S], unmasked tokens of each sequence, at least 1.
    """

    logprobs: Tensor
    ratio: Tensor
    advantages: Tensor
    weight: Tensor
    penalty: Tensor | None
    mask: Tensor
    sequence: Tensor
    lengths: Tensor

    def corrected(self, loss: Tensor) -> Tensor:
        """A per-token policy loss [T], weighted, with the KL penalty added."""
        loss = loss * self.weight
        return loss if self.penalty is None else loss + self.penalty


def grpo(terms: Terms, totals: BatchTotals, settings: Loss) -> Tensor:
    """Group relative policy optimisation: mean over sequences of the mean over tokens. arXiv:2402.03300.

    -1/N sum_i 1/|o_i| sum_t min(r_it A_i, clip(r_it, 1 - epsilon, 1 + epsilon_high) A_i)
    """
    return _mean_of_means(terms, _clipped(terms, settings), totals)


def dapo(terms: Terms, totals: BatchTotals, settings: Loss) -> Tensor:
    """DAPO: mean over all tokens, so that long sequences count by their length. arXiv:2503.14476.

    -1/L sum_i sum_t min(r_it A_i, clip(r_it, 1 - epsilon, 1 + epsilon_high) A_i)

    The paper's "clip higher" is `epsilon_high` = 0.28.
    """
    return _token_mean(terms, _clipped(terms, settings), totals)


def bnpo(terms: Terms, totals: BatchTotals, settings: Loss) -> Tensor:
    """TRL's `bnpo`: mean over the tokens of a batch.

    TRL takes the mean in each micro-batch, which makes the result depend on their size. Here the batch is the
    optimiser step's, and the loss is `dapo`.
    """
    return dapo(terms, totals, settings)


def dr_grpo(terms: Terms, totals: BatchTotals, settings: Loss) -> Tensor:
    """Dr. GRPO: divide by a constant, so that a token's weight does not depend on any length. arXiv:2503.20783.

    -1/(N max_completion_length) sum_i sum_t min(r_it A_i, clip(r_it, 1 - epsilon, 1 + epsilon_high) A_i)

    The paper also leaves advantages unscaled: `scale_rewards = "none"`.
    """
    total = terms.corrected(_clipped(terms, settings)).sum()
    return total / max(totals.num_sequences * totals.max_completion_length, 1)


def gspo(terms: Terms, totals: BatchTotals, settings: Loss) -> Tensor:
    """GSPO: `grpo` with the ratio of whole sequences, which `loss_type = "gspo"` implies. arXiv:2507.18071.

    -1/N sum_i min(s_i A_i, clip(s_i, 1 - epsilon, 1 + epsilon_high) A_i),    s_i = (prod_t r_it)^(1 / |o_i|)

    The paper's bounds are epsilon = 3e-4 and epsilon_high = 4e-4: a mean of log-ratios moves little.
    """
    return grpo(terms, totals, settings)


def cispo(terms: Terms, totals: BatchTotals, settings: Loss) -> Tensor:
    """CISPO: the ratio is capped and only weighs a policy gradient, which no token loses. arXiv:2506.13585.

    -1/L sum_i sum_t stop_gradient(min(r_it, epsilon_high)) A_i log pi(o_it)

    `epsilon_high` is the cap itself, not its distance from 1.
    """
    _, cap = clip_bounds(settings)
    loss = -terms.ratio.detach().clamp(max=cap) * terms.advantages * terms.logprobs
    return _token_mean(terms, loss, totals)


def sapo(terms: Terms, totals: BatchTotals, settings: Loss) -> Tensor:
    """SAPO: a smooth gate instead of a clip. arXiv:2511.20347.

    -1/N sum_i 1/|o_i| sum_t 4/tau sigmoid(tau (r_it - 1)) A_i

    tau is `sapo_temperature_pos` where A_i > 0, else `sapo_temperature_neg`.
    """
    # Float32 whatever the ratio's dtype, as TRL has it.
    tau = torch.where(terms.advantages > 0, settings.sapo_temperature_pos, settings.sapo_temperature_neg)
    loss = -torch.sigmoid(tau * (terms.ratio - 1)) * 4 / tau * terms.advantages
    return _mean_of_means(terms, loss, totals)


OBJECTIVES: Mapping[str, Callable[[Terms, BatchTotals, Loss], Tensor]] = {
    "grpo": grpo,
    "dapo": dapo,
    "dr_grpo": dr_grpo,
    "bnpo": bnpo,
    "gspo": gspo,
    "cispo": cispo,
    "sapo": sapo,
}


def _clipped(terms: Terms, settings: Loss) -> Tensor:
    """-min(r A, clip(r) A), [T]. With `delta` the first r is at most `delta`, which binds where A < 0 and the clip
    alone has no bound (INTELLECT-2, arXiv:2505.07291)."""
    low, high = clip_bounds(settings)
    ratio = terms.ratio if settings.delta is None else terms.ratio.clamp(max=settings.delta)
    return -torch.min(ratio * terms.advantages, terms.ratio.clamp(low, high) * terms.advantages)


def _mean_of_means(terms: Terms, loss: Tensor, totals: BatchTotals) -> Tensor:
    """The mean over sequences of each one's mean of `loss` [T], corrected: a scalar."""
    means = terms.corrected(loss) / per_token(terms.lengths, terms.sequence)
    return means.sum() / max(totals.num_sequences, 1)


def _token_mean(terms: Terms, loss: Tensor, totals: BatchTotals) -> Tensor:
    """The mean over tokens of `loss` [T], corrected: a scalar."""
    return terms.corrected(loss).sum() / max(totals.num_tokens, 1)


def clip_bounds(settings: Loss) -> tuple[float, float]:
    """The ratios at which the objective of `settings` clips; 0 and inf where it does not."""
    if settings.loss_type == "sapo":
        return 0.0, math.inf
    if settings.loss_type == "cispo":
        return 0.0, CISPO_CAP if settings.epsilon_high is None else settings.epsilon_high
    high = settings.epsilon if settings.epsilon_high is None else settings.epsilon_high
    return 1 - settings.epsilon, 1 + high


def compute_loss(inputs: LossInputs, totals: BatchTotals, settings: Loss) -> tuple[Tensor, Metrics]:
    """A micro-batch's share of the loss of its optimiser step, a scalar, and metrics for `merge_metrics`.

    The sum of the losses over the micro-batches is the step's loss; each can be backpropagated, and is 0 for a
    micro-batch without tokens. Raises ValueError where `inputs` lack what `settings` need.
    """
    inputs = without_truncated(inputs, settings)
    terms, metrics = _terms(inputs, totals, settings)
    loss = OBJECTIVES[settings.loss_type](terms, totals, settings)
    if settings.entropy_coef != 0:
        loss = loss - settings.entropy_coef * _entropy_mean(inputs, totals)
    return loss, {"loss": Total(loss.detach().double()), **diagnostics(inputs), **metrics}


def without_truncated(inputs: LossInputs, settings: Loss) -> LossInputs:
    """`inputs` with truncated sequences masked where `settings.mask_truncated_completions` (DAPO's overlong
    filtering, arXiv:2503.14476)."""
    if not settings.mask_truncated_completions:
        return inputs
    truncated = _needed(inputs.truncated, "truncated", "mask_truncated_completions")
    return replace(inputs, mask=inputs.mask & ~per_token(truncated, inputs.sequence))


def _terms(inputs: LossInputs, totals: BatchTotals, settings: Loss) -> tuple[Terms, Metrics]:
    """Ratios, corrections and penalty of a micro-batch, and the metrics that come with them."""
    logprobs, old, rollout_log_ratio = _neutral(inputs)
    sequence, count = inputs.sequence, inputs.num_sequences
    mask = inputs.mask.to(logprobs.dtype)
    lengths = sequence_sum(mask, sequence, count).clamp(min=1)
    advantages = inputs.advantages.to(logprobs.dtype)

    log_ratio = logprobs - old
    by_sequence = settings.loss_type == "gspo" or settings.importance_sampling_level == "sequence"
    if by_sequence:
        log_ratio = per_token(sequence_sum(log_ratio, sequence, count) / lengths, sequence)
    ratio = capped_exp(log_ratio)
    advantage = per_token(advantages, sequence)
    if inputs.token_advantages is not None:
        advantage = inputs.token_advantages.to(logprobs.dtype)
    # A sequence's ratio is one observation, however many tokens share it.
    share = mask / per_token(lengths, sequence) if by_sequence else mask
    metrics = _ratio_metrics(ratio, advantage, share, settings)

    weight = mask
    if settings.off_policy_mask_threshold is not None:
        drift = old - rollout_log_ratio - logprobs.detach()
        on_policy = keeps_on_policy(advantages, drift, lengths, sequence, settings.off_policy_mask_threshold)
        weight = weight * per_token(on_policy, sequence)
        metrics["off_policy_masked"] = Mean.of((~on_policy).double(), torch.ones_like(advantages))
    if settings.top_entropy_quantile < 1:
        weight = weight * _is_uncertain(inputs, totals)
    if settings.importance_sampling_correction != "none":
        bounds = settings.importance_sampling_clip_min, settings.importance_sampling_clip_max
        weights, outside = rollout_weights(
            rollout_log_ratio, sequence, count, settings.importance_sampling_correction, *bounds, lengths
        )
        weight = weight * weights
        metrics["correction_weight_mean"] = Mean.of(weights, mask)
        metrics["correction_clip_ratio"] = Mean.of(outside.double(), mask)
    penalty = None
    if settings.beta != 0:
        reference = torch.where(inputs.mask, _needed(inputs.ref_logprobs, "ref_logprobs", "beta"), 0.0)
        kl = kl_estimate(logprobs, reference.to(logprobs.dtype), settings.kl_estimator)
        if settings.kl_importance_weight:
            kl = kl * ratio
        metrics["kl"] = Mean.of(kl, mask)
        penalty = settings.beta * kl * mask
    return Terms(logprobs, ratio, advantage, weight, penalty, mask, sequence, lengths), metrics


def _neutral(inputs: LossInputs) -> tuple[Tensor, Tensor, Tensor]:
    """log pi, log pi_old and log pi_old - log pi_rollout, each [T] and 0 where masked, so that nothing there can become
    inf or NaN; the last is 0, a ratio of 1, also where the rollout reported no log-probability."""
    zero = inputs.logprobs.new_zeros(())
    logprobs = torch.where(inputs.mask, inputs.logprobs, zero)
    old = logprobs if inputs.old_logprobs is None else torch.where(inputs.mask, inputs.old_logprobs, zero)
    old = old.detach().to(logprobs.dtype)
    known = inputs.mask & ~inputs.rollout_logprobs.isnan()
    log_ratio = torch.where(known, old - inputs.rollout_logprobs.detach(), zero)
    return logprobs, old, log_ratio.to(logprobs.dtype)


def _is_uncertain(inputs: LossInputs, totals: BatchTotals) -> Tensor:
    """Tokens whose entropy reaches the optimiser step's threshold: [T] bool."""
    threshold = _needed(totals.entropy_threshold, "totals.entropy_threshold", "top_entropy_quantile")
    return _needed(inputs.entropy, "entropy", "top_entropy_quantile") >= threshold


def _entropy_mean(inputs: LossInputs, totals: BatchTotals) -> Tensor:
    """This micro-batch's share of the mean entropy of the tokens that are trained on: a scalar."""
    entropy = _needed(inputs.entropy, "entropy", "entropy_coef")
    counted, count = inputs.mask, totals.num_tokens
    if totals.entropy_threshold is not None:
        counted = counted & _is_uncertain(inputs, totals)
        count = _needed(totals.num_entropy_tokens, "totals.num_entropy_tokens", "top_entropy_quantile")
    return torch.where(counted, entropy, entropy.new_zeros(())).sum() / max(count, 1)


def _ratio_metrics(ratio: Tensor, advantage: Tensor, share: Tensor, settings: Loss) -> Metrics:
    """How far the policy has moved from the one that sampled, and how much of that the objective clips.

    ratio, advantage, share: [T]; `share` is how much a token counts.
    """
    low, high = clip_bounds(settings)
    is_low = (ratio < low) & (advantage < 0)
    is_high = (ratio > high) & (advantage > 0)
    return {
        "importance_ratio_mean": Mean.of(ratio, share),
        "importance_ratio_max": Maximum.of(ratio, share),
        "clip_ratio_low": Mean.of(is_low.double(), share),
        "clip_ratio_high": Mean.of(is_high.double(), share),
        "clip_ratio": Mean.of((is_low | is_high).double(), share),
    }


def diagnostics(inputs: LossInputs) -> Metrics:
    """What is measured under every loss: mean entropy, and how far the rollout's log-probabilities are from the
    trainer's, with w = exp(log pi_old - log pi_rollout) of each token: mean and largest |log w|, the k3 estimate of
    KL(rollout || trainer), mean of w - log w - 1, and the effective sample size of w."""
    _, _, log_ratio = _neutral(inputs)
    known = inputs.mask & ~inputs.rollout_logprobs.isnan()
    weights = capped_exp(log_ratio)
    metrics: Metrics = {
        "mismatch_logp_mean": Mean.of(log_ratio.abs(), known),
        "mismatch_logp_max": Maximum.of(log_ratio.abs(), known),
        "mismatch_kl": Mean.of(weights - log_ratio - 1, known),
        "mismatch_ess": EffectiveSampleSize.of(weights, known),
    }
    if inputs.entropy is not None:
        metrics["entropy"] = Mean.of(inputs.entropy, inputs.mask)
    return metrics


LossFunction = Callable[[LossInputs, BatchTotals, Loss], tuple[Tensor, Metrics]]


def resolve_loss(settings: Loss) -> LossFunction:
    """The loss that `settings` name: `compute_loss`, or the user's own `function` with the metrics of `diagnostics`.

    A user's function is called as function(inputs, totals, settings) for every micro-batch, with truncated sequences
    already masked where asked. It returns that micro-batch's share of the step's loss, a scalar made from
    `inputs.logprobs`, alone or with a dict of metrics: numbers (averaged over tokens) or the records of
    grpo/training/loss_metrics.py. What else `settings` say is its own to use: clip, corrections, KL and entropy terms
    are not added to it.

    Raises UserError naming the reference where it cannot be loaded, is no function or returns something else.
    """
    if settings.function is None:
        return compute_loss
    name = f'loss.function = "{settings.function}"'
    if ":" not in settings.function and "." not in settings.function:
        raise UserError(f"{name} is no reference; write path/file.py:function, or set loss_type instead")
    function = resolve(settings.function, kind="loss", builtin={})
    if not callable(function):
        raise UserError(f"{name} is {_kind(function)}; name a function")

    def user_loss(inputs: LossInputs, totals: BatchTotals, settings: Loss) -> tuple[Tensor, Metrics]:
        inputs = without_truncated(inputs, settings)
        result = function(inputs, totals, settings)
        loss, own_metrics = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not isinstance(own_metrics, Mapping):
            raise UserError(f"{name} returned {_kind(result)}; return a scalar tensor, or (scalar tensor, metrics)")
        if inputs.logprobs.requires_grad and not loss.requires_grad:
            raise UserError(f"{name} returned a loss without a gradient; compute it from inputs.logprobs")
        tokens = inputs.mask.double().sum()
        metrics = {key: _as_metric(value, tokens, f"{name}: metric {key!r}") for key, value in own_metrics.items()}
        return loss.reshape(()), {"loss": Total(loss.detach().double().sum()), **diagnostics(inputs), **metrics}

    return user_loss


def _as_metric(value: Any, tokens: Tensor, name: str) -> Metric:
    if isinstance(value, Metric):
        return value
    if not isinstance(value, int | float | Tensor) or (isinstance(value, Tensor) and value.numel() != 1):
        raise UserError(f"{name} is {_kind(value)}; return a number")
    number = value.detach().double().reshape(()) if isinstance(value, Tensor) else float(value)
    return Mean(number * tokens, tokens)


def _kind(value: Any) -> str:
    shape = f" of shape {list(value.shape)}" if isinstance(value, Tensor) else ""
    return f"a {type(value).__name__}{shape}"


def _needed(value: Any, name: str, setting: str) -> Any:
    if value is None:
        raise ValueError(f"loss.{setting} needs {name}, which is None")
    return value
