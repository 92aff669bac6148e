"""`[task]` and `[[rewards]]`: the keys of what is asked and of what scores the answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from grpo.config.sections.section import Fraction, PositiveFloat, PositiveInt, Section


class Task(Section):
    """`[task]`: where prompts come from. `[[task]]` several times mixes tasks by `weight`."""

    name: str
    """A built-in task ("gsm8k", "arithmetic", ...), "package.module:function" or "path/file.py:function"."""
    options: dict[str, Any] = {}
    """Keyword arguments of the task's loading function, such as `path` for gsm8k."""
    weight: PositiveFloat = 1.0
    """Share of the prompts when several tasks are mixed."""
    system_prompt: str | None = None
    """Replaces the task's own system prompt."""
    shuffle: bool = True
    """Shuffle the rows anew every epoch, from the run's seed."""
    limit: PositiveInt | None = None
    """Use only the first so many training rows."""
    overlong: Literal["drop", "error"] = "drop"
    """What to do with prompts longer than `max_prompt_length`: drop and count them, or stop."""
    pass_rate: Annotated[tuple[Fraction, Fraction], Field(strict=False)] | None = None
    """Keep only questions that the starting model answers correctly this often, for example [0.1, 0.9]."""
    pass_rate_samples: PositiveInt = 8
    """Completions per question for `pass_rate`."""


class Reward(Section):
    """`[[rewards]]`: one reward function. With none given, the task's own are used."""

    function: str
    """A built-in name ("correctness", ...), "package.module:function" or "path/file.py:function"."""
    weight: float = 1.0
    """Factor in the sum. 0: computed and logged only."""
    name: str | None = None
    """Column name in metrics; default: the function's name."""
    options: dict[str, Any] = {}
    """Keyword arguments passed to the function at every call."""
    timeout: PositiveFloat = 60.0
    """Seconds that one call may take."""
    on_error: Literal["stop", "skip"] = "stop"
    """A call that raises, hangs, dies or returns nonsense: stop the run, or score its completions as missing."""
    memory_limit_gb: PositiveFloat | None = None
    """Memory that the function's process may allocate, in GB (10^9 bytes). Default: half of the machine's."""
