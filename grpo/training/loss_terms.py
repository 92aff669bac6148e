"""Parts that losses share: KL estimators, importance weights for the rollout, masks by divergence and by entropy.

Pure functions on flat tensors: [T] tokens of whole sequences one after the other, `sequence` [T] (int64) says which
of the [S] sequences a token belongs to. Nothing here divides by a batch size or knows the configuration.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Cap on what is exponentiated. Beyond it (a ratio of 5e8) one policy never produces the other's token; without a
cap the exponential overflows to inf, and inf times a masked token's zero gradient is NaN."""


def capped_exp(log_ratio: Tensor) -> Tensor:
    """exp(log_ratio), constant above exp(`MAX_LOG_RATIO`)."""
    return torch.exp(log_ratio.clamp(max=MAX_LOG_RATIO))


def sequence_sum(values: Tensor, sequence: Tensor, num_sequences: int) -> Tensor:
    """Sums of `values` [T] over each sequence: [S]."""
    return values.new_zeros(num_sequences).index_add(0, sequence, values)


def per_token(values: Tensor, sequence: Tensor) -> Tensor:
    """One value a sequence [S], repeated for each of its tokens: [T]."""
    return values.index_select(0, sequence)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: Literal["k1", "k2", "k3"]) -> Tensor:
    """Estimate of KL(policy || reference) from each sampled token, [T]; gradient flows to `logprobs`.

    With d = log pi - log pi_ref (Schulman 2020, joschu.net/blog/kl-approx.html):
        k1 = d,    k2 = d^2 / 2,    k3 = exp(-d) + d - 1.
    The values of k1 and k3 are unbiased. Their gradients are those of the reverse KL only when multiplied by the
    importance ratio, which is 1 on policy but has a gradient; without it k1's has mean zero and k3's is that of the
    forward KL, while k2 has a biased value and, without the ratio and on policy, the reverse KL's gradient.
    """
    difference = logprobs - ref_logprobs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    return capped_exp(-difference) + difference - 1


def rollout_weights(
    log_ratio: Tensor,
    sequence: Tensor,
    num_sequences: int,
    mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "geometric_mask"],
    clip_min: float,
    clip_max: float,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Importance weights that make tokens sampled by the rollout engine count as the trainer's own.

    log_ratio: [T], log pi_old - log pi_rollout, without gradient; 0 where masked or unknown. lengths: [S], unmasked
    tokens, at least 1; needed for "geometric_mask".

        w = exp(log_ratio), of the token or of the sequence (product over its tokens);
        truncate: min(max(w, clip_min), clip_max);    mask: w where clip_min <= w <= clip_max, else 0.

    geometric_mask: 1 where clip_min <= g <= clip_max, else 0, with g the geometric mean of a sequence's ratios, so that
    its length does not decide.

    Truncated importance sampling: Yao et al. 2025, fengyao.notion.site/off-policy-rl. Masked, and by sequence: Liu,
    Li et al. 2025, "When Speed Kills Stability". Returns (weights [T], whether each was out of bounds [T] bool).
    """
    level, action = mode.split("_")
    if level == "geometric":
        assert lengths is not None
        mean = capped_exp(per_token(sequence_sum(log_ratio, sequence, num_sequences) / lengths, sequence))
        outside = (mean < clip_min) | (mean > clip_max)
        return (~outside).to(log_ratio.dtype), outside
    if level == "sequence":
        log_ratio = per_token(sequence_sum(log_ratio, sequence, num_sequences), sequence)
    weights = capped_exp(log_ratio)
    outside = (weights < clip_min) | (weights > clip_max)
    weights = weights.masked_fill(outside, 0.0) if action == "mask" else weights.clamp(clip_min, clip_max)
    return weights, outside


def keeps_on_policy(
    advantages: Tensor, log_drift: Tensor, lengths: Tensor, sequence: Tensor, threshold: float
) -> Tensor:
    """Off-policy sequence mask of DeepSeek-V3.2 (arXiv:2512.02556): [S] bool.

        keep_i = A_i >= 0  or  1/|o_i| sum_t (log pi_rollout - log pi)_t <= threshold

    advantages: [S]. log_drift: [T], log pi_rollout - log pi of the current policy; 0 where masked or unknown.
    lengths: [S], unmasked tokens, at least 1. A bad sample that the policy has moved away from teaches nothing more.
    """
    drift = sequence_sum(log_drift, sequence, len(lengths)) / lengths
    return (advantages >= 0) | (drift <= threshold)


def entropy_quantile(entropy: Tensor, share: float) -> float:
    """The entropy that the top `share` of tokens reach: the (1 - share) quantile of `entropy` [T], interpolated
    linearly. Train on tokens at or above it ("Beyond the 80/20 Rule", arXiv:2506.01939). -inf without tokens.

    `torch.quantile` computes the same but refuses more than 2^24 values.
    """
    if entropy.numel() == 0:
        return float("-inf")
    ordered = entropy.detach().double().sort().values
    rank = (1 - share) * (len(ordered) - 1)
    low = int(rank)
    high = min(low + 1, len(ordered) - 1)
    return float(torch.lerp(ordered[low], ordered[high], rank - low))
