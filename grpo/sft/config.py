"""The configuration of a supervised run: the sections of `grpo.config` that apply, and `[sft]`.

A key that only GRPO has is refused, as an unknown one is. `docs/sft.md` shows a configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError, model_validator

from grpo.config.messages import explain
from grpo.config.schema import (
    Checkpoint,
    Config,
    Eval,
    Log,
    Lora,
    Model,
    Section,
    Train,
    parse_config,
)
from grpo.config.sections.section import PathText, PositiveInt
from grpo.config.toml import NONE, apply_override, read_toml, write_toml

TRAIN_KEYS = (
    "learning_rate", "max_steps", "num_train_epochs", "lr_scheduler_type", "warmup_ratio", "optim", "adam_beta1",
    "adam_beta2", "adam_epsilon", "weight_decay", "max_grad_norm", "kernels", "gradient_checkpointing", "seed",
)  # fmt: skip
"""Keys of `[train]` that a supervised run has."""
KEYS = {"train": TRAIN_KEYS, "eval": ("every", "limit"), "log": ("to", "report")}
"""The keys that it has of the sections from which it takes only some."""


class Sft(Section):
    """`[sft]`: what to imitate. Names are those of TRL's `SFTConfig` where the concept is its own."""

    path: PathText | None = None
    """A file (.jsonl, .json, .parquet, .csv), or a folder with a file named after `split`."""
    hub: str | None = None
    """A data set on the hub, instead."""
    subset: str | None = None
    """Configuration of the hub's data set."""
    split: str = "train"
    """The split to train on."""
    eval_split: str | None = None
    """The split whose loss is measured where `[eval] every` is set. Default: `eval.limit` rows, the last of `split`,
    are not trained on and measured instead."""
    limit: PositiveInt | None = None
    """Use only the first so many rows of `split`."""
    prompt: str | None = None
    """How columns become the question: "{instruction}[[\\nInput: {input}]]". A part in double brackets is left out
    where one of its columns is empty. Default: by the columns that there are, see docs/sft.md."""
    completion: str | None = None
    """How columns become the answer, likewise."""
    system_prompt: str | None = None
    """Put before each conversation that has none of its own."""
    chat: bool = True
    """Render through the chat template. Off: prompt and completion follow one another as plain text."""
    chat_template_kwargs: dict[str, Any] = {}
    """Passed to the chat template, as in `[rollout]`."""
    conversation_extension: PositiveInt = 1
    """Join so many rows, drawn by the seed, into one conversation of several turns."""
    completion_only_loss: bool = True
    """Train on the assistant's turns alone. Off: on every token."""
    train_on: Literal["all", "last"] = "all"
    """Which of the assistant's turns: "all", or only the "last" of each conversation."""
    max_length: PositiveInt = 1024
    """Longest sequence in tokens, and with `packing` the length of a packed row."""
    overlong: Literal["drop", "error"] = "drop"
    """What to do with longer rows: drop and count them, or stop. They are never cut: the end would be lost."""
    packing: bool = True
    """Lay sequences one after another without padding; each sees itself alone."""
    per_device_train_batch_size: PositiveInt = 8
    """Sequences, or packed rows, in one forward and backward."""
    gradient_accumulation_steps: PositiveInt = 1
    """Forwards and backwards in one optimiser step."""

    @model_validator(mode="before")
    @classmethod
    def earlier_name(cls, values: Any) -> Any:
        """`turns_per_conversation`, as run folders may have it, is `conversation_extension`."""
        if isinstance(values, dict) and "turns_per_conversation" in values and "conversation_extension" not in values:
            values = dict(values)
            values["conversation_extension"] = values.pop("turns_per_conversation")
        return values

    @model_validator(mode="after")
    def one_source(self) -> Sft:
        if (self.path is None) == (self.hub is None):
            raise ValueError("set one of path (a file or folder) and hub (a data set id)")
        return self

    @model_validator(mode="after")
    def templates_come_together(self) -> Sft:
        if (self.prompt is None) != (self.completion is None):
            raise ValueError("prompt and completion describe a row together; set both, or neither")
        return self

    @model_validator(mode="after")
    def text_has_no_roles(self) -> Sft:
        if not self.chat and (self.system_prompt is not None or self.conversation_extension > 1):
            raise ValueError("system_prompt and conversation_extension need chat = true; leave them out")
        return self

    @model_validator(mode="after")
    def turns_are_chosen_among_answers(self) -> Sft:
        if self.train_on == "last" and not self.completion_only_loss:
            raise ValueError('completion_only_loss = false trains on every token; leave out train_on = "last"')
        return self

    @property
    def of_text(self) -> str | None:
        """A key that is set and says how text becomes tokens."""
        keys = ("prompt", "completion", "system_prompt", "chat_template_kwargs", "conversation_extension", "train_on")
        return next((key for key in keys if getattr(self, key) != type(self).model_fields[key].default), None)


class SftConfig(Section):
    """A whole supervised run."""

    model: Model
    lora: Lora = Lora()
    sft: Sft
    train: Train = Train()
    eval: Eval = Eval()
    log: Log = Log()
    checkpoint: Checkpoint = Checkpoint()

    @model_validator(mode="after")
    def nothing_is_ignored(self) -> SftConfig:
        for name, keys in KEYS.items():
            for key in sorted(getattr(self, name).model_fields_set - set(keys)):
                raise ValueError(f"{name}.{key} belongs to GRPO and has no meaning here; leave it out")
        if self.model.full_finetuning:
            raise ValueError(
                "model.full_finetuning is for GRPO; a supervised run trains an adapter, leave it out (docs/sft.md)"
            )
        if self.model.max_seq_length is not None:
            raise ValueError("model.max_seq_length is sft.max_length here; set that instead")
        return self

    @model_validator(mode="after")
    def rows_to_hold_out_are_counted(self) -> SftConfig:
        if self.eval.every is not None and self.sft.eval_split is None and self.eval.limit is None:
            raise ValueError('eval.limit = "none" would hold out every row; set a number, or sft.eval_split')
        return self

    @property
    def rows_held_out(self) -> int:
        """Rows at the end of `split` that are not trained on."""
        return self.eval.limit or 0 if self.eval.every is not None and self.sft.eval_split is None else 0

    def for_policy(self) -> Config:
        """What the model is loaded with: the same sections, and no task."""
        tables = {name: given(getattr(self, name)) for name in ("model", "lora", "train", "log", "checkpoint")}
        lengths = {"max_prompt_length": max(self.sft.max_length - 1, 1), "max_completion_length": 1}
        tables["model"]["max_seq_length"] = max(self.sft.max_length, 2)
        return parse_config({**tables, "task": {"name": "none"}, "rollout": lengths})


def given(section: Section) -> dict[str, Any]:
    """The keys that were set."""
    return {key: getattr(section, key) for key in section.model_fields_set}


def read_sft_config(path: Path, overrides: Sequence[str] = ()) -> SftConfig:
    """The configuration in `path` with `section.key=value` overrides. Raises UserError naming file, line and remedy."""
    values, text = read_toml(path)
    for override in overrides:
        apply_override(values, override)
    return parse_sft_config(values, str(path), text, overrides)


def parse_sft_config(
    values: dict[str, Any], source: str = "configuration", text: str = "", overrides: Sequence[str] = ()
) -> SftConfig:
    """`values`, as TOML parses it, validated, as `grpo.config.schema.parse_config` does."""
    try:
        return SftConfig.model_validate(values)
    except ValidationError as error:
        raise explain(error, SftConfig, values, source, text, overrides) from None


def sft_config_toml(config: SftConfig) -> str:
    """`config`, defaults included, as TOML: reading the text again gives an equal configuration."""
    tables = {}
    for name in SftConfig.model_fields:
        section: Section = getattr(config, name)
        fields = type(section).model_fields
        keys = KEYS.get(name, tuple(fields))
        values = {key: getattr(section, key) for key in keys if (name, key) != ("model", "max_seq_length")}
        tables[name] = {k: NONE if v is None and fields[k].default is not None else v for k, v in values.items()}
    return write_toml(tables)
