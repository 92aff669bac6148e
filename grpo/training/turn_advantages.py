"""Advantages of an episode's turns: how much more a turn and what followed it brought than others' turns like it.

A turn's return is what its episode still earns from it on. It is compared with the returns of the same turn in the
episodes of the group that have it, as rewards of whole completions are; with one turn both are the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from grpo.config.schema import Loss
from grpo.rollout.sampler import Group
from grpo.training.advantages import Advantages, compute_advantages


def with_turns(advantages: Advantages, groups: Sequence[Group], settings: Loss) -> Advantages:
    """`advantages` of whole episodes, with those of their turns where `settings.advantage_level` is "turn"."""
    if settings.advantage_level == "episode":
        return advantages
    rewards = [[sample.rewards_by_turn for sample in group.samples] for group in groups]
    turns, equal = turn_advantages(advantages.reward, rewards, settings)
    return replace(advantages, turns=turns, zero_std=equal)


def returns_of(total: float, rewards: Sequence[float]) -> list[float]:
    """What an episode worth `total` still earns from each of its turns on.

    `rewards`: of each turn; what `total` has beyond their sum was earned at the end.

        G_u = total - (r_1 + ... + r_(u-1))
    """
    return [total - math.fsum(rewards[:turn]) for turn in range(len(rewards))]


def turn_advantages(
    total: Tensor, rewards: Sequence[Sequence[Sequence[float]]], settings: Loss
) -> tuple[Tensor, Tensor]:
    """(advantages [P, G, U] float64, 0 where an episode has no such turn; [P] bool, groups in which all are equal).

    total: [P, G], the weighted sum of all rewards, NaN where there is none. rewards: of each of its turns, for each
    episode. With G_u the returns and b_u, s_u their mean and standard deviation over the group's episodes that have
    turn u, scaled as `settings` say (docs/algorithms.md): A_u = (G_u - b_u) / (s_u + 1e-4).
    """
    longest = max((len(one) for group in rewards for one in group), default=0)
    returns = torch.full((*total.shape, max(longest, 1)), float("nan"), dtype=torch.float64)
    for index, group in enumerate(rewards):
        for member, turn_rewards in enumerate(group):
            if turn_rewards:
                group_returns = returns_of(float(total[index, member]), turn_rewards)
                returns[index, member, : len(turn_rewards)] = torch.tensor(group_returns, dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    by_turn = [compute_advantages(turn[..., None], one, settings) for turn in returns.unbind(-1)]
    values = torch.stack([turn.values for turn in by_turn], -1)
    equal = torch.stack([turn.zero_std | turn.reward.isnan().all(1) for turn in by_turn], -1).all(-1)
    return values, equal
