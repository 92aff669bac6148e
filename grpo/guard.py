"""When an update must not be applied: NaN or infinity, a rollout that the trainer does not recognise, a gradient spike.

`Guard` judges the numbers of every optimiser step before anything moves, and keeps count. An update that is left out
is dumped with all that it takes to compute it again: `python -m grpo.replay DUMP`, which says where the first
non-finite value appears. The arithmetic is the learner's, and whether a run goes on the trainer's.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from grpo.advantages import Advantages
from grpo.batch import TrainingGroup, TrainingSequence, training_group
from grpo.checkpoint import replace_folder
from grpo.config import Config, Train, config_toml
from grpo.environment import hardware, versions
from grpo.generation import Segment
from grpo.random_state import current_states
from grpo.ranks import Ranks
from grpo.sampler import Group
from grpo.state import save_tensors

WINDOW = 50
"""Gradient norms whose median a spike is measured against."""
FEWEST = 10
"""Norms that must be known before one can be a spike."""
KEPT_DUMPS = 3
BATCH, REPORT = "batch.safetensors", "report.json"


@dataclass
class Batch:
    """What one optimiser step is computed from."""

    groups: list[TrainingGroup]
    rng: dict[str, torch.Tensor]
    """States of torch's generators before the first forward pass, by device."""


class UnusableUpdate(Exception):
    """An optimiser step that was not applied. `problem` is a clause, such as "the gradient norm is nan"."""

    def __init__(self, problem: str, figures: Mapping[str, float | None], batch: Batch):
        super().__init__(problem)
        self.problem, self.figures, self.batch = problem, dict(figures), batch


class Guard:
    """Judges updates by `[train]`, and counts those left out in a row."""

    def __init__(self, train: Train):
        self.train = train
        self.skipped = 0
        self.norms: deque[float] = deque(maxlen=WINDOW)

    def check_sampled(self, groups: Sequence[Group], advantages: Advantages) -> None:
        """Raise UnusableUpdate for what no loss can be computed from."""
        problem = None
        if advantages.reward.isinf().any() or not advantages.values.isfinite().all():
            problem = "a weighted sum of rewards is infinite"
        elif not all(sample.finite for group in groups for sample in group.samples):
            problem = "vLLM reported a logprob that is not finite"
        if problem:
            pairs = zip(groups, advantages.values, strict=True)
            batch = Batch([training_group(*pair) for pair in pairs], current_states(torch.device("cpu")))
            raise UnusableUpdate(problem, {}, batch)

    def check_update(self, figures: Mapping[str, float | None], batch: Batch) -> None:
        """Raise UnusableUpdate unless `figures`, with "loss" and "grad_norm", are those of a sound optimiser step."""
        if problem := self._problem(figures):
            raise UnusableUpdate(problem, figures, batch)
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

    def gives_up(self) -> bool:
        """Count one more update that was left out; whether the run is to stop for it."""
        self.skipped += 1
        return self.train.on_nonfinite == "stop" or self.skipped >= self.train.max_nonfinite_steps

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "norms": list(self.norms)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.skipped = state["skipped"]
        self.norms = deque(state["norms"], maxlen=WINDOW)


def dump_folder(run: Path, step: int) -> Path:
    """Where the dump of `step` belongs."""
    return run / "nonfinite" / f"step-{step}"


def write_dump(run: Path, step: int, config: Config, policy: Any, unusable: UnusableUpdate) -> Path:
    """Write what it takes to compute the update again to its `dump_folder`, and return that.

    Holds the batch and the adapter as safetensors, the configuration, and `report.json`. Only the newest
    `KEPT_DUMPS` dumps are kept. Raises OSError where the disk refuses.
    """
    folder = dump_folder(run, step)

    def write(partial: Path) -> None:
        policy.save_adapter(partial / "adapter")
        (partial / "config.toml").write_text(config_toml(config))
        save_tensors(partial / BATCH, encoded(unusable.batch))
        figures = {name: value if value is None else repr(value) for name, value in unusable.figures.items()}
        report = {"step": step, "problem": unusable.problem, "figures": figures}
        report |= {"versions": versions(), "hardware": hardware()}
        (partial / REPORT).write_text(json.dumps(report, indent=1))

    folder.parent.mkdir(exist_ok=True)
    replace_folder(folder, write)
    found = (re.fullmatch(r"step-(\d+)", entry.name) for entry in folder.parent.iterdir())
    for number in sorted(int(match[1]) for match in found if match)[:-KEPT_DUMPS]:
        shutil.rmtree(folder.parent / f"step-{number}")
    return folder


def encoded(batch: Batch) -> dict[str, Any]:
    """`batch` as `save_tensors` takes it."""
    return {
        "prompts": [[sequence_state(sequence) for sequence in group.sequences] for group in batch.groups],
        "idle": [group.idle for group in batch.groups],
        "rng": batch.rng,
    }


def decoded(state: Mapping[str, Any]) -> Batch:
    """The batch that `encoded` made `state` of."""
    prompts = [[restored_sequence(sequence) for sequence in prompt] for prompt in state["prompts"]]
    pairs = zip(prompts, state["idle"], strict=True)
    return Batch([TrainingGroup.of(sequences, idle=idle) for sequences, idle in pairs], state["rng"])


def whole(batch: Batch, ranks: Ranks) -> Batch:
    """`batch` with the sequences that other ranks computed. Every rank calls it; what differs is only the rng."""
    if ranks.size == 1:
        return batch
    here = {place: group for place, group in enumerate(batch.groups) if group.sequences}
    own = {place: [sequence_state(sequence) for sequence in group.sequences] for place, group in here.items()}
    prompts = ranks.merged(own, len(batch.groups))
    groups = [
        replace(group, sequences=[restored_sequence(sequence) for sequence in prompt])
        for group, prompt in zip(batch.groups, prompts, strict=True)
    ]
    return Batch(groups, batch.rng)


def sequence_state(sequence: TrainingSequence) -> dict[str, Any]:
    return {
        "prompt_ids": torch.tensor(sequence.prompt_ids, dtype=torch.int64),
        "completion_ids": torch.tensor(sequence.completion_ids, dtype=torch.int64),
        "rollout_logprobs": torch.tensor(sequence.rollout_logprobs, dtype=torch.float64),
        "advantage": sequence.advantage,
        "truncated": sequence.truncated,
        "old_logprobs": sequence.old_logprobs,
        "sampled": mask_state(sequence.sampled),
        "rewritten": [
            [torch.tensor(part.prompt_ids), torch.tensor(part.token_ids), mask_state(part.sampled)]
            for part in sequence.rewritten
        ],
    }


def mask_state(sampled: Sequence[bool] | None) -> torch.Tensor | None:
    return None if sampled is None else torch.tensor(sampled, dtype=torch.bool)


def restored_sequence(state: Mapping[str, Any]) -> TrainingSequence:
    lists = {name: state[name].tolist() for name in ("prompt_ids", "completion_ids", "rollout_logprobs")}
    return TrainingSequence(
        **lists,
        advantage=state["advantage"],
        truncated=state["truncated"],
        old_logprobs=state["old_logprobs"],
        sampled=listed(state.get("sampled")),
        rewritten=[
            Segment(prompt.tolist(), tokens.tolist(), listed(sampled))
            for prompt, tokens, sampled in state.get("rewritten", ())
        ],
    )


def listed(tensor: torch.Tensor | None) -> list[Any] | None:
    return None if tensor is None else tensor.tolist()
