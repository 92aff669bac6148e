"""When an update must not be applied: NaN or infinity, a rollout that the trainer does not recognise, a gradient spike.

`UpdateCheck` judges the numbers of every optimiser step before anything moves, and keeps count. An update that is left
out is dumped with all that it takes to compute it again: `python -m grpo.replay DUMP`, which says where the first
non-finite value appears. For the arithmetic see the learner; whether a run goes on is decided in the trainer.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from grpo.config.schema import Train
from grpo.policy.rng import current_states
from grpo.rollout.sampler import Group
from grpo.training.advantages import Advantages
from grpo.training.batch import TrainingGroup, training_group

WINDOW = 50
"""Gradient norms whose median a spike is measured against."""
FEWEST = 10
"""Norms that must be known before one can be a spike."""


@dataclass
class Batch:
    """What one optimiser step is computed from."""

    groups: list[TrainingGroup]
    rng: dict[str, torch.Tensor]
    """States of torch's generators before the first forward pass, by device."""


class SkippedUpdate(Exception):
    """An optimiser step that was not applied. `problem` is a clause, such as "the gradient norm is nan"."""

    def __init__(self, problem: str, figures: Mapping[str, float | None], batch: Batch):
        super().__init__(problem)
        self.problem, self.figures, self.batch = problem, dict(figures), batch


class UpdateCheck:
    """Judges updates by `[train]`, and counts those left out in a row."""

    def __init__(self, train: Train):
        self.train = train
        self.skipped = 0
        self.norms: deque[float] = deque(maxlen=WINDOW)

    def check_sampled(self, groups: Sequence[Group], advantages: Advantages) -> None:
        """Raise SkippedUpdate for what no loss can be computed from."""
        problem = None
        if advantages.reward.isinf().any() or not advantages.values.isfinite().all():
            problem = "a weighted sum of rewards is infinite"
        elif not all(sample.finite for group in groups for sample in group.samples):
            problem = "vLLM reported a logprob that is not finite"
        if problem:
            pairs = zip(groups, advantages.values, strict=True)
            batch = Batch([training_group(*pair) for pair in pairs], current_states(torch.device("cpu")))
            raise SkippedUpdate(problem, {}, batch)

    def check_update(self, figures: Mapping[str, float | None], batch: Batch) -> None:
        """Raise SkippedUpdate unless `figures`, with "loss" and "grad_norm", are those of a sound optimiser step."""
        if problem := self._problem(figures):
            raise SkippedUpdate(problem, figures, batch)
        self.skipped = 0
        if norm := figures["grad_norm"]:
            self.norms.append(norm)

    def _problem(self, figures: Mapping[str, float | None]) -> str | None:
        loss, norm, mismatch = (figures.get(name) or 0.0 for name in ("loss", "grad_norm", "mismatch_kl"))
        for name, value in (("loss", loss), ("mismatch_kl", mismatch), ("gradient norm", norm)):
            if not math.isfinite(value):
                return f"the {name} is {value}"
        limit = self.train.max_mismatch_kl
        if limit is not None and mismatch > limit:
            return f"mismatch_kl is {mismatch:.3g}, above train.max_mismatch_kl = {limit:g}"
        spike = self.train.grad_norm_spike
        if spike is not None and len(self.norms) >= FEWEST and norm > spike * (usual := statistics.median(self.norms)):
            return f"the gradient norm is {norm:.3g}, more than train.grad_norm_spike = {spike:g} times {usual:.3g}"
        return None

    def ends_run(self) -> bool:
        """Count one more update that was left out; whether the run is to stop for it."""
        self.skipped += 1
        return self.train.on_nonfinite == "stop" or self.skipped >= self.train.max_nonfinite_steps

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "norms": list(self.norms)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.skipped = state["skipped"]
        self.norms = deque(state["norms"], maxlen=WINDOW)
