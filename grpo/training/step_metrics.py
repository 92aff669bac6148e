"""What a step's scored groups come to: the table of rewards, figures for the metrics, and the sample log's form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict

import torch

from grpo.distributed.ranks import Ranks
from grpo.rewards.extract import extracted_answer
from grpo.rewards.runtime.contract import merge_results
from grpo.rollout.sampler import Group, Rollout, Sample
from grpo.run.samples import Sample as LoggedSample
from grpo.run.samples import SampleGroup
from grpo.training.advantages import Advantages, reward_metrics


def reward_table(groups: Sequence[Group], names: Sequence[str]) -> torch.Tensor:
    """Rewards [P, G, F] of `groups`, by the functions `names`; float64, NaN where a function gave none."""
    rows = [[[as_float(sample.rewards[name]) for name in names] for sample in group.samples] for group in groups]
    return torch.tensor(rows, dtype=torch.float64)


def as_float(value: float | None) -> float:
    return math.nan if value is None else float(value)


def sampling_metrics(
    groups: Sequence[Group], rollouts: Sequence[Rollout], advantages: Advantages, names: Sequence[str]
) -> dict[str, float]:
    """Rewards and lengths over all completions, before any group is dropped."""
    result = merge_results([result for rollout in rollouts for result in rollout.results])
    samples = [sample for group in groups for sample in group.samples]
    lengths = [sample.length for sample in samples]
    return {
        **result.metrics,
        **{f"rewards/{name}/seconds": seconds for name, seconds in result.seconds.items()},
        **reward_metrics(reward_table(groups, names), advantages, names),
        "completion_length": sum(lengths) / len(lengths),
        "completion_length_max": max(lengths),
        "clipped_ratio": sum(sample.truncated for sample in samples) / len(samples),
        "sampling_rounds": len(rollouts),
    }


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
    )
