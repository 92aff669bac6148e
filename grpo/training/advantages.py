"""From rewards to advantages: how much better a completion did than the others of its group.

Pure functions on [P, G, F] rewards: P prompts, G completions each, F reward functions. Rewards are few, so all of it
is float64 on the CPU. Not here: scoring (rewards/), what the advantages multiply (grpo/training/loss.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo.config.schema import Loss

EPSILON = 1e-4
"""Added to a standard deviation before dividing by it; TRL's value."""


@dataclass(frozen=True)
class Advantages:
    """Advantages of a batch and what they came from; float64 tensors.

    values: [P, G]; 0 for a completion that could not be scored.
    reward: [P, G], weighted sum over reward functions; NaN where no weighted function gave a score.
    zero_std: [P] bool, groups whose rewards are all exactly equal: their advantages are exactly 0.
    turns: [P, G, U], of each turn of an episode (`turn_advantages.py`), which then count instead of `values`.
    """

    values: Tensor
    reward: Tensor
    zero_std: Tensor
    turns: Tensor | None = None

    def of_group(self, index: int) -> Tensor:
        """Those of a group's completions [G], or of their turns [G, U]."""
        return self.values[index] if self.turns is None else self.turns[index]


def compute_advantages(rewards: Tensor, weights: Tensor, settings: Loss) -> Advantages:
    """Group-relative advantages (GRPO, arXiv:2402.03300) in the variant that `settings` name.

    rewards: [P, G, F] float64, NaN where a function gave no score. weights: [F].

    With r the weighted sum over functions that gave a score, b the mean of its group and s a standard deviation
    (n - 1 in the denominator, as TRL):
        scale_rewards = "group":  A = (r - b) / (s_group + 1e-4)
                        "batch":  A = (r - b) / (s_batch + 1e-4)            (arXiv:2508.08221)
                        "none":   A = r - b                                 (Dr. GRPO, arXiv:2503.20783)
        leave_one_out:            b is the mean of the group's others       (RLOO, arXiv:2402.14740)
        normalize_then_sum:       the first line for each function alone, the weighted sum of those, then
                                  (x - mean_batch) / (s_batch + 1e-4)       (GDPO, arXiv:2601.05242)
    Missing scores are left out of every mean. A completion without any score has advantage 0 and is in no baseline;
    functions of weight 0 do not make it scored, so that logging one more function never changes training.
    """
    rewards, weights = rewards.double(), weights.double()
    if rewards.ndim != 3 or weights.shape != rewards.shape[2:]:
        raise ValueError(f"rewards [P, G, F] and weights [F] do not fit: {rewards.shape}, {weights.shape}")
    used = rewards[..., weights != 0]
    weighted = used * weights[weights != 0]
    unscored = used.isnan().all(-1)
    reward = weighted.nansum(-1).masked_fill(unscored, float("nan"))
    if settings.multi_objective_aggregation == "normalize_then_sum":
        zero_std = _all_equal(used).all(-1)
        values = _normalize_then_sum(used, weights[weights != 0], unscored, settings)
    else:
        zero_std = _all_equal(reward)
        values = _centred(reward, settings.leave_one_out)
        if settings.scale_rewards == "group":
            values = values / (_std(reward, 1) + EPSILON)
        elif settings.scale_rewards == "batch":
            values = values / (_std(reward.flatten(), 0) + EPSILON)
    values = values.nan_to_num(nan=0.0).masked_fill(zero_std[:, None], 0.0)
    return Advantages(values, reward, zero_std)


def _normalize_then_sum(rewards: Tensor, weights: Tensor, unscored: Tensor, settings: Loss) -> Tensor:
    """GDPO: each of the [P, G, F] `rewards` normalised in its group, their weighted sum in the batch."""
    normal = _centred(rewards, settings.leave_one_out) / (_std(rewards, 1) + EPSILON)
    total = (normal * weights).nansum(-1).masked_fill(unscored, float("nan"))
    return (total - total.nanmean()) / (_std(total.flatten(), 0) + EPSILON)


def _centred(rewards: Tensor, leave_one_out: bool) -> Tensor:
    """Rewards [P, G, ...] minus their group's mean, or the mean of the group's others; NaN where there are none."""
    centred = rewards - rewards.nanmean(1, keepdim=True)
    if leave_one_out:
        count = (~rewards.isnan()).double().sum(1, keepdim=True)
        # r - (sum - r) / (n - 1) = (r - mean) n / (n - 1)
        centred = centred * (count / (count - 1))
    return centred


def _std(values: Tensor, dim: int) -> Tensor:
    """Standard deviation over `dim`, kept, of what is not NaN, with Bessel's correction; NaN for fewer than two."""
    count = (~values.isnan()).sum(dim, keepdim=True)
    squares = (values - values.nanmean(dim, keepdim=True)).square().nansum(dim, keepdim=True)
    return torch.where(count > 1, (squares / (count - 1)).sqrt(), float("nan"))


def _all_equal(rewards: Tensor) -> Tensor:
    """Whether all rewards [P, G, ...] of a group that are not NaN are the same number: [P, ...] bool."""
    highest = rewards.nan_to_num(nan=float("-inf")).amax(1)
    lowest = rewards.nan_to_num(nan=float("inf")).amin(1)
    return highest <= lowest


def may_skip_equal_groups(settings: Loss) -> bool:
    """Whether a group with `zero_std` adds nothing to the gradient, so that its forward and backward can be left out.

    Its tokens still count in `BatchTotals`, for the quantile of entropies too. A KL penalty or an entropy bonus acts
    on every token, and a user's own loss may use any.
    """
    return settings.beta == 0 and settings.entropy_coef == 0 and settings.function is None


def reward_metrics(rewards: Tensor, advantages: Advantages, names: Sequence[str]) -> dict[str, float]:
    """`reward`, `reward_std`, `frac_reward_zero_std`, and `rewards/NAME`, `rewards/NAME/std` of each function; of each
    the least and the largest too, as `reward_min`, `rewards/NAME/min` and so on.

    rewards: [P, G, F], all completions that were scored, before any group is dropped. Means and standard deviations
    are over completions, without missing scores; what had too few scores is left out of the result.
    """
    metrics = {
        "reward": advantages.reward.nanmean(),
        "reward_std": _std(advantages.reward.flatten(), 0)[0],
        "frac_reward_zero_std": advantages.zero_std.double().mean(),
        **_extremes("reward_", advantages.reward),
    }
    for name, scores in zip(names, rewards.double().flatten(0, 1).unbind(-1), strict=True):
        metrics[f"rewards/{name}"] = scores.nanmean()
        metrics[f"rewards/{name}/std"] = _std(scores, 0)[0]
        metrics |= _extremes(f"rewards/{name}/", scores)
    return {name: float(value) for name, value in metrics.items() if not value.isnan()}


def _extremes(prefix: str, values: Tensor) -> dict[str, Tensor]:
    """The least and the largest of what is not NaN; nothing where all is."""
    known = values[~values.isnan()]
    return {f"{prefix}min": known.min(), f"{prefix}max": known.max()} if len(known) else {}
