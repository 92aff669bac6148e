"""`[environment]`: the keys of conversations, tools and games."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from grpo.config.sections.section import PositiveFloat, PositiveInt, Section

OWN_QUESTIONS = "environment"
"""The task whose rows are the environment's own."""
WAYS_IN = ("program", "tools", "factory", "verifiers", "skyrl_gym", "gem", "command")
"""The keys of `[environment]` of which one is set."""


class Environment(Section):
    """`[environment]`: what the model talks to, in turns, where a completion is more than one answer. Set exactly one
    of the first seven."""

    program: str | None = None
    """A function `async def play(row, sample)` that returns the reward: "package.module:function" or
    "path/file.py:function"."""
    tools: list[str] = []
    """Functions that the model may call, as TRL's `tools`; each is written as `program` is."""
    factory: str | dict[str, str] | None = None
    """A class as TRL's `environment_factory`: its public methods are tools, `get_reward` gives the reward. Or several
    by name, of which each row's column "environment" names one."""
    verifiers: str | None = None
    """An environment of verifiers 0.1 to 0.3: a file or a module with `load_environment`."""
    skyrl_gym: str | None = None
    """The id of an environment that SkyRL-gym has registered, as "gsm8k_multi_turn"."""
    gem: str | None = None
    """The id of an environment that GEM has registered, as "game:GuessTheNumber-v0-easy"."""
    command: str | None = None
    """A command line whose process talks to an OpenAI-compatible endpoint and writes its reward as its last line."""
    rollout_func: str | None = None
    """Not supported; present so that a copied configuration gets an explanation."""
    options: dict[str, Any] = {}
    """Keyword arguments of the program, the class, `load_environment` or `gem.make`; SkyRL-gym's `env_config`."""
    max_turns: PositiveInt = 8
    """The policy's turns in an episode, at most."""
    max_turn_tokens: PositiveInt = 256
    """Tokens of one turn, at most; `rollout.max_completion_length` is for the whole episode."""
    max_observation_tokens: PositiveInt = 1024
    """Tokens of what the environment says between two turns; longer text is cut, and says so."""
    processes: PositiveInt = 64
    """Episodes that work at once. Each has a process of its own, and waits there for the policy."""
    timeout: PositiveFloat = 60.0
    """Seconds that an episode's program may take from a turn to the next."""
    memory_limit_gb: PositiveFloat | None = None
    """Memory that an episode's process may allocate, in GB (10^9 bytes). Default: half of the machine's."""
    on_error: Literal["mask", "stop"] = "mask"
    """An episode whose program raises, hangs, dies or returns nonsense: leave it out of training, or stop the run. A
    step in which all do so ends the run in either case."""
    schedule: Literal["deterministic", "eager"] = "deterministic"
    """When an environment's answer is taken up: `latency_steps` after it was asked for, so that the tokens do not
    depend on how long tools take; or at once."""
    latency_steps: PositiveInt = 16
    """Decoding steps from the end of a turn until its answer is taken up. A slower answer is waited for."""
    join_steps: Annotated[int, Field(ge=0)] | None = None
    """How many decoding steps the first step of new turns takes, however few they are, which all running turns share.
    While others speak, answers that are due wait for more of them, until together they have waited as long as the
    others would. Default: 2 on a GPU, 12 where such steps have no CUDA graphs while decoding has, otherwise 0: none
    waits."""
    tool_parser: Literal[
        "auto", "hermes", "qwen3_coder", "glm45", "lfm2", "llama3_json", "gemma4", "openai", "deepseek_v3"
    ] = "auto"
    """The form in which the model writes calls, by vLLM's names; "auto": the one of its chat template."""
    python: str | None = None
    """Another Python interpreter to run the environment with, which has packages of its own."""

    @field_validator("rollout_func")
    @classmethod
    def no_rollout_func(cls, value: str | None) -> None:
        if value is not None:
            raise ValueError(
                "it would return token ids of its own making, and is not supported; write the same loop as `program`, "
                "an async function that asks `sample` for each turn"
            )

    @model_validator(mode="after")
    def exactly_one_way_in(self) -> Environment:
        chosen = [name for name in WAYS_IN if getattr(self, name)]
        if len(chosen) != 1:
            have = " and ".join(chosen) + " are" if chosen else "none of them is"
            raise ValueError(f"an environment must be exactly one of {', '.join(WAYS_IN)}; {have} set")
        return self

    @property
    def kind(self) -> str:
        """Which of the ways in is set."""
        return next(name for name in WAYS_IN if getattr(self, name))

    @property
    def column(self) -> str:
        """Its name in metrics: the function's, class's or environment's, or "tools"."""
        if self.kind in ("tools", "command") or isinstance(self.factory, dict):
            return self.kind
        reference = str(getattr(self, self.kind)).removesuffix(".py")
        return re.split(r"[:./]", reference)[-1]
