"""Metrics of one micro-batch, in a form that merges exactly over the micro-batches of a step.

Each is a small record of sums, counts or maxima; `merge_metrics` adds the records up and only then divides, so a
step's figures do not depend on how its tokens were packed. Not here: what is measured (grpo/training/loss.py) and
rewards (grpo/training/advantages.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor

Number: TypeAlias = "float | Tensor"


@dataclass(frozen=True)
class Mean:
    """Weighted mean: `total` over `count`."""

    total: Number
    count: Number

    @classmethod
    def of(cls, values: Tensor, weights: Tensor) -> Self:
        """Mean of `values` with `weights`, both [T]; where the weight is 0 the value may be anything."""
        weights = weights.detach().double()
        selected = torch.where(weights > 0, values.detach().double(), 0.0)
        return cls((selected * weights).sum(), weights.sum())

    def merge(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    def value(self) -> float | None:
        return float(self.total) / float(self.count) if float(self.count) else None


@dataclass(frozen=True)
class Total:
    """Plain sum."""

    total: Number

    def merge(self, other: Total) -> Total:
        return Total(self.total + other.total)

    def value(self) -> float | None:
        return float(self.total)


@dataclass(frozen=True)
class Maximum:
    """Largest value; -inf where there was none."""

    largest: Number

    @classmethod
    def of(cls, values: Tensor, weights: Tensor) -> Self:
        """Largest of `values` [T] where `weights` [T] are not 0."""
        selected = torch.where(weights > 0, values.detach().double(), float("-inf"))
        return cls(selected.max() if len(selected) else selected.new_full((), float("-inf")))

    def merge(self, other: Maximum) -> Maximum:
        return Maximum(torch.maximum(torch.as_tensor(self.largest), torch.as_tensor(other.largest)))

    def value(self) -> float | None:
        return float(self.largest) if float(self.largest) > float("-inf") else None


@dataclass(frozen=True)
class EffectiveSampleSize:
    """(sum w)^2 / (n sum w^2) of importance weights (Kish): 1 if all are equal, 1/n if one carries everything."""

    total: Number
    squares: Number
    count: Number

    @classmethod
    def of(cls, weights: Tensor, counted: Tensor) -> Self:
        """Of `weights` [T] where `counted` [T] is not 0."""
        selected = torch.where(counted > 0, weights.detach().double(), 0.0)
        return cls(selected.sum(), selected.square().sum(), (counted > 0).double().sum())

    def merge(self, other: EffectiveSampleSize) -> EffectiveSampleSize:
        return EffectiveSampleSize(self.total + other.total, self.squares + other.squares, self.count + other.count)

    def value(self) -> float | None:
        weight = float(self.count) * float(self.squares)
        return float(self.total) * float(self.total) / weight if weight else None


Metric = Mean | Total | Maximum | EffectiveSampleSize
Metrics = dict[str, Metric]


def merge_metrics(parts: Sequence[Mapping[str, Metric]]) -> dict[str, float]:
    """The figures of a step from those of its micro-batches. A metric that saw no token is left out.

    A key may be missing from some parts. Reads the device once for each figure, so call it once a step.
    """
    values = {name: metric.value() for name, metric in joined(parts).items()}
    return {name: value for name, value in values.items() if value is not None}


def joined(parts: Sequence[Mapping[str, Metric]]) -> Metrics:
    """The records of `parts` as one."""
    merged: Metrics = {}
    for part in parts:
        for name, metric in part.items():
            merged[name] = merged[name].merge(metric) if name in merged else metric  # type: ignore[arg-type]
    return merged


KINDS: dict[str, Callable[..., Metric]] = {kind.__name__: kind for kind in (Mean, Total, Maximum, EffectiveSampleSize)}


def as_message(metrics: Mapping[str, Metric]) -> dict[str, list[Any]]:
    """`metrics` as plain values: of each its kind and its numbers. Reads the device."""
    return {name: [type(one).__name__, *map(float, vars(one).values())] for name, one in metrics.items()}


def from_message(message: Mapping[str, list[Any]]) -> Metrics:
    """The metrics that `as_message` wrote."""
    return {name: KINDS[kind](*numbers) for name, (kind, *numbers) in message.items()}
