"""The TOML configuration: a pydantic model of its sections, one docstring per field, unknown keys refused.

Names follow TRL's `GRPOConfig` where the concept is TRL's and peft's `LoraConfig` where it is peft's. The sections, of
which each knows its types, ranges and rules between its fields, are in `sections/`; rules between sections are here.
Whether a file exists or a model fits is found where it is used. `docs/config.md` is generated from the docstrings.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator, model_validator

from grpo.config.messages import explain
from grpo.config.sections.environment import OWN_QUESTIONS, WAYS_IN, Environment
from grpo.config.sections.lora import SEVEN_PROJECTIONS, STARTS, Lora
from grpo.config.sections.loss import Loss
from grpo.config.sections.model import Model
from grpo.config.sections.records import Alarms, Checkpoint, Eval, Log
from grpo.config.sections.rollout import Rollout
from grpo.config.sections.section import Section
from grpo.config.sections.tasks import Reward, Task
from grpo.config.sections.train import Train
from grpo.config.toml import NONE, apply_override, read_toml, write_toml

__all__ = [
    "OWN_QUESTIONS", "SEVEN_PROJECTIONS", "STARTS", "WAYS_IN", "Alarms", "Checkpoint", "Config", "Environment", "Eval",
    "Log", "Lora", "Loss", "Model", "Reward", "Rollout", "Section", "Task", "Train", "config_toml", "parse_config",
    "read_config",
]  # fmt: skip
"""What others import: the sections by way of this file."""


class Config(Section):
    """A whole experiment."""

    model: Model
    lora: Lora = Lora()
    task: list[Task] = Field(min_length=1)
    rewards: list[Reward] = []
    environment: Environment | None = None
    rollout: Rollout = Rollout()
    loss: Loss = Loss()
    train: Train = Train()
    eval: Eval = Eval()
    log: Log = Log()
    alarms: Alarms = Alarms()
    checkpoint: Checkpoint = Checkpoint()

    @field_validator("task", mode="before")
    @classmethod
    def one_task_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, dict) else value

    @property
    def max_seq_length(self) -> int:
        """Longest prompt plus completion, in tokens."""
        return self.model.max_seq_length or self.rollout.max_prompt_length + self.rollout.max_completion_length

    @property
    def completions_per_step(self) -> int:
        return self.rollout.prompts_per_step * self.rollout.num_generations

    @model_validator(mode="after")
    def prompt_and_completion_fit_the_sequence(self) -> Config:
        longest = self.rollout.max_prompt_length + self.rollout.max_completion_length
        if self.model.max_seq_length is not None and self.model.max_seq_length < longest:
            raise ValueError(
                f"model.max_seq_length = {self.model.max_seq_length} is below rollout.max_prompt_length + "
                f"max_completion_length = {longest}; raise the one or lower the others"
            )
        return self

    @model_validator(mode="after")
    def optimizer_steps_split_whole_prompts(self) -> Config:
        if self.train.optimizer_steps_per_rollout > self.rollout.prompts_per_step:
            raise ValueError(
                f"train.optimizer_steps_per_rollout = {self.train.optimizer_steps_per_rollout} exceeds "
                f"rollout.prompts_per_step = {self.rollout.prompts_per_step}; a group is never split"
            )
        return self

    @model_validator(mode="after")
    def adapter_or_all_weights(self) -> Config:
        update = self.train.weight_update
        if not self.model.full_finetuning:
            if update != "auto":
                raise ValueError("train.weight_update is for model.full_finetuning; leave it out, or set that")
            if self.loss.reference_storage != Loss().reference_storage:
                raise ValueError("loss.reference_storage is for model.full_finetuning; leave it out, or set that")
            return self
        for key in type(self.lora).model_fields:
            if getattr(self.lora, key) != getattr(Lora(), key):
                raise ValueError(
                    f"lora.{key} has no use with model.full_finetuning, which trains no adapter; leave one of the two "
                    "out"
                )
        if self.model.dtype == "float32" and update not in ("auto", "float32"):
            raise ValueError(
                f'train.weight_update = "{update}" is for weights in bfloat16, and model.dtype = "float32" keeps every '
                "step; leave it out"
            )
        return self

    @model_validator(mode="after")
    def turns_are_an_environments(self) -> Config:
        if self.loss.advantage_level == "turn" and self.environment is None:
            raise ValueError('loss.advantage_level = "turn" needs turns; add [environment], or leave it out')
        return self

    @model_validator(mode="after")
    def pass_rates_are_of_single_answers(self) -> Config:
        if self.environment is not None and any(task.pass_rate for task in self.task):
            raise ValueError("task.pass_rate is measured on single answers; leave it out with [environment]")
        return self

    @model_validator(mode="after")
    def reward_names_differ(self) -> Config:
        names = [reward.name or reward.function.split(":")[-1].split(".")[-1] for reward in self.rewards]
        if self.environment is not None:
            names.append(self.environment.column)
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two rewards are called {twice[0]!r}; give one of them a different `name`")
        return self


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration in the TOML file `path`, with `section.key=value` overrides applied.

    Raises UserError naming the file and line, or the override, and the remedy.
    """
    values, text = read_toml(Path(path))
    for override in overrides:
        apply_override(values, override)
    return parse_config(values, str(path), text, overrides)


def parse_config(
    values: dict[str, Any], source: str = "configuration", text: str = "", overrides: Sequence[str] = ()
) -> Config:
    """`values`, as TOML parses it, validated. What it came from, `source` with its `text` and the `overrides`, is
    named in errors."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise explain(error, Config, values, source, text, overrides) from None


def config_toml(config: Config) -> str:
    """`config`, defaults included, as TOML: reading the text again gives an equal Config."""
    tables: dict[str, Any] = {}
    for name in Config.model_fields:
        value = getattr(config, name)
        if value is None:
            continue
        tables[name] = [_written(entry) for entry in value] if isinstance(value, list) else _written(value)
    if len(config.task) == 1:
        tables["task"] = tables["task"][0]
    return write_toml(tables)


def _written(section: Section) -> dict[str, Any]:
    fields = type(section).model_fields
    values = {name: getattr(section, name) for name in fields}
    # None is written where leaving the key out would mean another default.
    return {k: NONE if v is None and fields[k].default is not None else v for k, v in values.items()}
