"""A step's groups with what they scored, the figures of them for the metrics, and how the sample log has them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from grpo.config.schema import Loss
from grpo.distributed.ranks import Ranks
from grpo.rewards.extract import extracted_answer
from grpo.rewards.runtime.contract import merge_results
from grpo.rollout.sampler import Group, Rollout, Sample
from grpo.run.samples import Sample as LoggedSample
from grpo.run.samples import SampleGroup
from grpo.training.advantages import Advantages, compute_advantages, reward_metrics
from grpo.training.turn_advantages import with_turns


@dataclass(frozen=True)
class ScoredGroups:
    """P groups of G completions with what F reward functions gave, and the advantages that follow."""

    groups: list[Group]
    rewards: Tensor
    """float64 [P, G, F], NaN where a function gave none."""
    advantages: Advantages

    @classmethod
    def of(cls, groups: Sequence[Group], rewards: Tensor, weights: Tensor, settings: Loss) -> ScoredGroups:
        """`groups` with their `rewards` [P, G, F]; `weights` [F]."""
        return cls(list(groups), rewards, with_turns(compute_advantages(rewards, weights, settings), groups, settings))

    @property
    def unequal(self) -> list[int]:
        """Indices of the groups whose rewards are not all equal."""
        return (~self.advantages.zero_std).nonzero()[:, 0].tolist()


def reward_table(groups: Sequence[Group], names: Sequence[str]) -> Tensor:
    """Rewards [P, G, F] of `groups`, by the functions `names`; float64, NaN where a function gave none."""
    rows = [[[as_float(sample.rewards[name]) for name in names] for sample in group.samples] for group in groups]
    return torch.tensor(rows, dtype=torch.float64)


def as_float(value: float | None) -> float:
    return math.nan if value is None else float(value)


def sampling_metrics(scored: ScoredGroups, rollouts: Sequence[Rollout], names: Sequence[str]) -> dict[str, float]:
    """Rewards and lengths over all completions, before any group is dropped."""
    result = merge_results([result for rollout in rollouts for result in rollout.results])
    samples = [sample for group in scored.groups for sample in group.samples]
    lengths = [sample.length for sample in samples]
    return {
        **result.metrics,
        **{f"rewards/{name}/seconds": seconds for name, seconds in result.seconds.items()},
        **reward_metrics(scored.rewards, scored.advantages, names),
        "completion_length": sum(lengths) / len(lengths),
        "completion_length_max": max(lengths),
        "clipped_ratio": sum(sample.truncated for sample in samples) / len(samples),
        "sampling_rounds": len(rollouts),
    }


def expert_metrics(groups: Sequence[Group], experts: int, ranks: Ranks) -> dict[str, float]:
    """How a step's completions used the experts of a layer, of which there are `experts`: the share of all experts that
    none of their tokens went to, the entropy of the tokens over a layer's experts (1: evenly), and the busiest expert's
    share of a layer's tokens. Empty where no experts are known."""
    counts = expert_counts([sample for group in groups for sample in group.local], experts)
    if ranks.size > 1:
        parts = [part for part in ranks.gather(counts) if part is not None]
        counts = sum(parts[1:], parts[0]) if parts else None
    if counts is None:
        return {}
    shares = counts / counts.sum(-1, keepdim=True)
    entropy = -(shares * shares.clamp_min(1e-30).log()).sum(-1) / math.log(experts)
    return {
        "experts/unused": float((counts == 0).double().mean()),
        "experts/load_entropy": float(entropy.mean()),
        "experts/busiest": float(shares.amax(-1).mean()),
    }


def expert_counts(samples: Sequence[Sample], experts: int) -> Tensor | None:
    """float64 [layers, experts]: rows of the samples' tokens, prompts among them; None without any."""
    routes = [part for sample in samples for part in sample.fed_routes if part is not None]
    if not routes:
        return None
    together = torch.cat([each.flatten(2).long() for each in routes])  # [tokens, layers, top_k]
    layers = together.shape[1]
    flat = together + experts * torch.arange(layers, device=together.device)[:, None]
    return torch.bincount(flat.reshape(-1), minlength=layers * experts).view(layers, experts).double().cpu()


def logged(groups: Sequence[Group], weights: dict[str, float], ranks: Ranks) -> list[SampleGroup]:
    """`groups`, each sampled on some rank, as the sample log keeps them. `weights`: of each reward."""
    local = {
        index: [asdict(logged_sample(sample, weights)) for sample in group.local]
        for index, group in enumerate(groups)
        if group.local
    }
    return [
        SampleGroup(
            group.prompt.prompt,
            group.prompt.columns.get("answer"),
            [LoggedSample(**values) for values in samples],
            group.prompt.task,
            group.prompt.images,
        )
        for group, samples in zip(groups, ranks.gather_indexed(local, len(groups)), strict=True)
    ]


def logged_sample(sample: Sample, weights: dict[str, float]) -> LoggedSample:
    """`sample` with its reward: the weighted sum of those it has."""
    return LoggedSample(
        text=sample.text,
        reward=sum(weight * (sample.rewards[name] or 0.0) for name, weight in weights.items()),
        rewards=sample.rewards,
        extracted=extracted_answer(sample.text),
        tokens=sample.length,
        finish_reason="length" if sample.truncated else "stop",
        turns=sample.conversation(),
        previews=sample.previews(),
    )
