"""`[eval]`, `[log]`, `[alarms]`, `[checkpoint]`: the keys of what a run measures, shows and keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from grpo.config.sections.section import Fraction, PathText, PositiveFloat, PositiveInt, Section


class Eval(Section):
    """`[eval]`: held-out questions during training. Off unless `every` is set."""

    every: PositiveInt | None = None
    """Evaluate before the first step, every so many steps, and after the last. "none" switches it off, as in
    `--set eval.every=none`."""
    limit: PositiveInt | None = 200
    """Use the first so many held-out rows."""
    num_generations: PositiveInt = 1
    """Completions per question."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0: greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling (evaluation only)."""
    max_completion_length: PositiveInt | None = None
    """Default: that of `[rollout]`."""
    pass_at: list[PositiveInt] = [1]
    """Values of k for pass@k; none above `num_generations`."""
    keep_best: bool = True
    """Keep the adapter with the best held-out accuracy in `best_adapter/`."""

    @model_validator(mode="after")
    def enough_samples_for_pass_at_k(self) -> Eval:
        if max(self.pass_at, default=1) > self.num_generations:
            raise ValueError(f"pass_at = {self.pass_at} needs num_generations of at least {max(self.pass_at)}")
        return self


class Log(Section):
    """`[log]`: what is shown and where it also goes."""

    to: list[Literal["tensorboard", "wandb", "trackio"]] = []
    """Trackers besides `metrics.jsonl`; each an optional install."""
    samples_every: PositiveInt = 10
    """Show and keep sample completions every so many steps."""
    samples: PositiveInt = 2
    """Prompts whose completions are kept then."""
    adapter_survival_every: PositiveInt | None = 25
    """Measure `adapter_survival`, the share of the adapter's effect that the 16-bit policy shows, after the first step
    and every so many: a forward pass in float32 over a few completions. "none" switches it off. With
    `full_finetuning` it is `weight_survival`, the share of the weights' change that those in bfloat16 show."""
    report: bool = True
    """Write `report.html` in the run folder, anew while the run goes on; it takes at most a hundredth of the time."""


class Alarms(Section):
    """`[alarms]`: what a run warns of while it goes on, by how far each figure may go; "none" switches one off. What
    each means: `docs/alarms.md`."""

    window: Annotated[int, Field(ge=3)] = 10
    """Steps that a figure is a median over. The first so many are what later ones are compared with."""
    reward_without_accuracy: PositiveFloat | None = 0.5
    """Mean reward that has risen by more than so many standard deviations of a completion's, while held-out accuracy
    has not risen."""
    length_collapse: Annotated[float, Field(gt=0, lt=1)] | None = 0.25
    """Completions shorter than this share of their first length."""
    length_explosion: Annotated[float, Field(gt=1)] | None = 3.0
    """Completions longer than so many times their first length."""
    cut_completions: Fraction | None = 0.5
    """Share of completions that are cut at the length limit."""
    entropy_collapse: Annotated[float, Field(gt=0, lt=1)] | None = 0.05
    """Entropy below this share of the first."""
    equal_groups: Fraction | None = 0.9
    """Share of groups whose rewards are all equal."""
    adapter_survival: PositiveFloat | None = 0.5
    """Share of the adapter's effect that the 16-bit policy shows, from step 20 on; with one rounding it is nearly 1."""
    mismatch_kl: PositiveFloat | None = 0.01
    """Mismatch of sampler and trainer, in nats a token."""
    mismatch_rise: Annotated[float, Field(gt=1)] | None = 5.0
    """Mismatch of so many times the first, where it is above 0.001."""


class Checkpoint(Section):
    """`[checkpoint]`: the run folder and what is kept in it."""

    output_dir: PathText = Path("runs/grpo")
    """The run folder. It must not exist, unless `--resume` continues it."""
    save_steps: PositiveInt = 50
    """Write a checkpoint every so many steps, and after the last."""
    save_total_limit: PositiveInt | None = 2
    """Keep only the newest so many checkpoints."""
