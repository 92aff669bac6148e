"""What goes into a reward function and what comes out: the batch, the result, and the checks on returned scores.

How a function wants to be called: `conventions.py`; where it comes from: `references.py`; who calls it: `pool.py`.
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from grpo.errors import UserError

Prompt = str | list[dict[str, Any]]


@dataclass(frozen=True)
class RewardSpec:
    """One reward: the fields of `config.Reward`, where `function` may also be a Python callable or a class.

    `weight` is the trainer's; here every reward is computed, weight 0 included.
    """

    function: str | Callable[..., Any]
    weight: float = 1.0
    name: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    timeout: float = 60.0
    on_error: Literal["stop", "skip"] = "stop"
    memory_limit_gb: float | None = None

    @classmethod
    def of(cls, reward: Any) -> RewardSpec:
        """`reward` as a RewardSpec: one already, a `config.Reward`, a `[[rewards]]` table, a name or a callable."""
        if isinstance(reward, cls):
            return reward
        if isinstance(reward, Mapping):
            unknown = reward.keys() - {entry.name for entry in fields(cls)}
            if unknown or "function" not in reward:
                problem = f"unknown key {sorted(unknown)[0]!r}" if unknown else "the key 'function' is missing"
                raise UserError(f"reward {dict(reward)}: {problem}; see [[rewards]] in docs/config.md")
            return cls(**reward)
        if isinstance(reward, str) or callable(reward):
            return cls(function=reward)
        return cls(**{entry.name: getattr(reward, entry.name) for entry in fields(cls)})

    @property
    def column(self) -> str:
        """The reward's name in metrics: `name`, or else the function's own."""
        if self.name:
            return self.name
        if isinstance(self.function, str):
            return self.function.rpartition(":")[2].rpartition(".")[2]
        return callable_name(self.function)


def callable_name(function: Any) -> str:
    """The name of a function, of what a partial wraps, or of a callable object's class."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", None) or type(function).__name__


@dataclass(frozen=True)
class RewardBatch:
    """Completions to score, flat: entry i of each list belongs to completion i, so prompts repeat within a group.

    Attributes:
        prompts: strings, or chat messages; completions are handed to functions in the same shape.
        completions: the generated text, without the tokens that end it and, if the run asks for that, without other
            special ones.
        completion_ids: its token ids, without padding.
        columns: the data set's other columns.
        step: `trainer_state.global_step`.
        max_steps: `trainer_state.max_steps`.
    """

    prompts: Sequence[Prompt]
    completions: Sequence[str]
    completion_ids: Sequence[Sequence[int]]
    columns: Mapping[str, Sequence[Any]]
    step: int = 0
    max_steps: int = 0

    def __post_init__(self) -> None:
        lengths = {"prompts": len(self.prompts), "completion_ids": len(self.completion_ids)}
        lengths |= {f"column {name!r}": len(values) for name, values in self.columns.items()}
        for name, length in lengths.items():
            if length != len(self.completions):
                raise ValueError(f"{name} has {length} entries for {len(self.completions)} completions")

    def __len__(self) -> int:
        return len(self.completions)


@dataclass
class RewardResult:
    """Scores of one batch, by reward name and in the order of its completions.

    Attributes:
        scores: None where a reward does not apply or, with `on_error = "skip"`, failed.
        metrics: what functions logged, means over the batch; `rewards/<name>/errors` counts failed calls.
        extras: further columns for the sample log, one value per completion.
        seconds: what each function took.
    """

    scores: dict[str, list[float | None]]
    metrics: dict[str, float]
    extras: dict[str, list[Any]]
    seconds: dict[str, float]


def merge_results(results: Sequence[RewardResult]) -> RewardResult:
    """The results of several batches, such as a step's groups, as one; the batches' order is kept.

    Scores and extras are joined (None where a batch lacks an extra), seconds and error counts added, other metrics
    averaged over the batches that have them.
    """
    sizes = [max((len(scores) for scores in result.scores.values()), default=0) for result in results]
    merged = RewardResult({}, {}, {}, {})
    for name in _keys(result.scores for result in results):
        merged.scores[name] = [score for result in results for score in result.scores[name]]
        merged.seconds[name] = sum(result.seconds[name] for result in results)
    for name in _keys(result.extras for result in results):
        columns = (result.extras.get(name, [None] * size) for result, size in zip(results, sizes, strict=True))
        merged.extras[name] = [value for column in columns for value in column]
    for name in _keys(result.metrics for result in results):
        values = [result.metrics[name] for result in results if name in result.metrics]
        merged.metrics[name] = sum(values) if name.endswith("/errors") else mean(values)
    return merged


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean, rounded once."""
    return math.fsum(values) / len(values)


def _keys(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


@dataclass
class Scores:
    """What one function returned for one batch, checked and made of plain Python values."""

    values: list[float | None]
    metrics: dict[str, list[float]] = field(default_factory=dict)
    extras: dict[str, list[Any]] = field(default_factory=dict)


class BadReturn(Exception):
    """What a reward function returned or logged is not usable; the message says what came and what is expected."""


EXPECTED = 'return one finite number, None, or dict with a "score" per completion'


def check_scores(returned: Any, count: int, name: str) -> Scores:
    """`returned`, what reward `name` gave for `count` completions, as Scores.

    Each value is a number, a bool, a NumPy or torch scalar, None (not applicable), or a dict whose "score" is one of
    these; a dict's other entries become extras `<name>/<key>` and, if numbers, metrics `rewards/<name>/<key>`. A
    dict with "rewards" in place of the list (OpenRLHF) may carry "extra_logs". Raises BadReturn for anything else.
    """
    logs: Mapping[str, Any] = {}
    if isinstance(returned, Mapping) and "rewards" in returned:
        logs = returned.get("extra_logs") or {}
        returned = returned["rewards"]
    values = _as_list(returned)
    if values is None:
        raise BadReturn(f"returned {_shown(returned)}, not a list; {EXPECTED}")
    if len(values) != count:
        raise BadReturn(f"returned {len(values)} values for {count} completions; {EXPECTED}")
    scores = Scores([])
    for index, value in enumerate(values):
        if isinstance(value, Mapping):
            if "score" not in value:
                raise BadReturn(f'returned a dict without "score" for completion {index + 1} of {count}; {EXPECTED}')
            for key, extra in value.items():
                if key != "score":
                    column = scores.extras.setdefault(f"{name}/{key}", [None] * count)
                    column[index] = plain(extra)
            value = value["score"]
        scores.values.append(_as_score(value, index, count))
    for key, column in logs.items():
        listed = _as_list(column)
        if listed is not None and len(listed) == count:
            scores.extras[f"{name}/{key}"] = [plain(value) for value in listed]
        else:
            scores.metrics[f"rewards/{name}/{key}"] = [as_metric(column, key)]
    for column_name, column in scores.extras.items():
        known = [value for value in column if value is not None]
        if known and all(isinstance(value, int | float) and math.isfinite(value) for value in known):
            scores.metrics[f"rewards/{column_name}"] = [mean(known)]
    return scores


def as_metric(value: Any, name: str) -> float:
    """`value` as a float for the metrics; raises BadReturn for what is not a finite number."""
    number = _number(value)
    if number is None or not math.isfinite(number):
        raise BadReturn(f"logged the metric {name!r} as {_shown(value)}; log a finite number")
    return number


def plain(value: Any) -> Any:
    """`value` made of None, bool, int, float, str, lists and dicts; anything else as its `str`."""
    if value is None or isinstance(value, bool | float | str):
        return value
    if isinstance(value, int):
        return value if abs(value) < 2**63 else _number(value)
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    listed = _as_list(value)
    if listed is not None:
        return [plain(entry) for entry in listed]
    number = _number(value)
    return str(value) if number is None else number


def _as_score(value: Any, index: int, count: int) -> float | None:
    if value is None:
        return None
    number = _number(value)
    if number is None or not math.isfinite(number):
        raise BadReturn(f"returned {_shown(value)} for completion {index + 1} of {count}; {EXPECTED}")
    return number


def _number(value: Any) -> float | None:
    """A number, bool, or one-element NumPy array or torch tensor as a float (inf where it is too large for one)."""
    if not isinstance(value, numbers.Real) and hasattr(value, "item") and getattr(value, "size", None) is not None:
        try:
            value = value.item()
        except (ValueError, RuntimeError):
            return None
    if not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _as_list(value: Any) -> list[Any] | None:
    """The entries of a list, tuple, generator, or of an array or tensor of one or more dimensions."""
    if isinstance(value, str | bytes | Mapping | set | frozenset):
        return None
    if hasattr(value, "tolist") and hasattr(value, "shape"):
        value = value.tolist()
    return list(value) if isinstance(value, Iterable) else None


def _shown(value: Any) -> str:
    kind = type(value).__name__
    try:
        text = repr(value).replace("\n", " ")
    except Exception:
        return f"a {kind}"
    return f"{text[:80]}{'...' if len(text) > 80 else ''} ({kind})"
