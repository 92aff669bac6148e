"""How a reward function wants to be called, recognised by its parameters' names, and the call itself.

A function gets the arguments it names, and all of them if it takes `**kwargs`. The conventions, with the names that
give them away; the first that fits is taken:

| convention | recognised by | gets |
| --- | --- | --- |
| OpenRLHF | `queries` | lists `queries, prompts, labels`; returns a dict with "rewards" |
| TRL, the native one | `completions`, `completion_ids` or `prompts`; also if nothing else fits | lists `prompts,
  completions, completion_ids` and every column; `trainer_state, log_metric, log_extra` |
| verl | `solution_str` | per completion `data_source, solution_str, ground_truth, extra_info` |
| reasoning-gym | `answer` and `entry` | per completion `answer` (the text of the last `<answer>`), `entry` (the row) |
| torchforge | `response` | per completion `prompt, response, target` |
| verifiers | `completion`, `parser` or `state` | per completion `completion, prompt, answer, info, state, task, parser`
  and every column |

verifiers' group functions, known by a plural (`answers, infos, states, tasks`), get those lists besides TRL's.
Images come as PIL images, in the columns `images` (a list each) and, where the data have one, `image`; messages have
parts {"type": "image"} in their places. The completions of one prompt share them.
The gold answer of the conventions that name it differently (`ground_truth`, `labels`, `target`) is the column of that
name, or else `answer`. Nothing here knows about processes or timeouts.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from grpo.errors import UserError
from grpo.images import Image
from grpo.messages import COLUMNS, content_text
from grpo.rewards.extract import completion_text, xml_answer
from grpo.rewards.runtime.contract import BadReturn, Prompt, RewardBatch, Scores, as_metric, check_scores, plain

Arguments = dict[str, Any]

GROUP_NAMES = {"answers": "answer", "infos": "info", "states": "state", "tasks": "task"}
"""The names of verifiers' group functions beside `prompts` and `completions`. A column of the name comes first."""


@dataclass(frozen=True)
class TrainerState:
    """The two fields of `transformers.TrainerState` that reward functions use."""

    global_step: int
    max_steps: int


class AnswerParser:
    """What verifiers-style functions get as `parser`: it finds the text of the last `<answer>`."""

    def parse(self, text: str) -> str:
        return xml_answer(text)

    def parse_answer(self, completion: str | list[dict[str, Any]]) -> str:
        return xml_answer(completion_text(completion))


class Log:
    """`log_metric` and `log_extra` for one call, as TRL gives them."""

    def __init__(self) -> None:
        self.metrics: dict[str, list[float]] = {}
        self.extras: dict[str, list[Any]] = {}

    def metric(self, name: str, value: float) -> None:
        """Log a number for this batch; several under one name are averaged."""
        self.metrics.setdefault(name, []).append(as_metric(value, name))

    def extra(self, column: str, values: list[Any]) -> None:
        """Log a column for the sample log: one value per completion, in one call or several."""
        self.extras.setdefault(column, []).extend(plain(value) for value in values)

    def add_to(self, scores: Scores, count: int) -> None:
        for column, values in self.extras.items():
            if len(values) != count:
                raise BadReturn(f"logged {len(values)} values as extra {column!r} for {count} completions")
        scores.extras |= self.extras
        scores.metrics |= self.metrics


class RewardFunction:
    """A user's callable behind one signature: `score` or, if it is a coroutine function, `score_async`.

    Raises UserError when its signature cannot be read, does not take one of `options`, or lacks an option that a
    class needs. A class is called once, with `options`, and its instance is the function.

    Args:
        any_option: options that only `**kwargs` would take are passed on, and not refused as misspelt.
    """

    def __init__(
        self, function: Callable[..., Any], name: str, options: Mapping[str, Any], any_option: bool = True
    ) -> None:
        self.name = name
        self.options = dict(options)
        if inspect.isclass(function):
            function = self._instance(function)
            self.options = {}
        if not callable(function):
            raise UserError(f"reward {name!r} is {type(function).__name__}, not a function; name a function or class")
        self.function = function
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):
            raise UserError(f"reward {name!r}: its parameters cannot be read; wrap it in a Python function") from None
        named = [entry for entry in parameters if entry.kind in (entry.POSITIONAL_OR_KEYWORD, entry.KEYWORD_ONLY)]
        self.names = {entry.name for entry in named}
        self.required = {entry.name for entry in named if entry.default is entry.empty} - self.options.keys()
        self.takes_any = any(entry.kind is entry.VAR_KEYWORD for entry in parameters)
        if any(entry.kind is entry.POSITIONAL_ONLY for entry in parameters):
            raise UserError(f"reward {name!r} has positional-only parameters; arguments are passed by name")
        unknown = sorted(self.options.keys() - self.names)
        if unknown and not (self.takes_any and any_option):
            raise UserError(f"reward {name!r} takes no option {unknown[0]!r}; it takes {', '.join(sorted(self.names))}")
        self.is_async = _is_async(function)
        self.per_completion, self.arguments = _recognise(self.names - self.options.keys())

    def check_columns(self, example: Mapping[str, Any]) -> None:
        """Raise UserError if the function asks for what a row with the columns of `example` does not provide."""
        columns = {name: [value] for name, value in example.items()}
        self._calls(RewardBatch([""], [""], [[]], columns), Log())

    def score(self, batch: RewardBatch) -> Scores:
        """Call the function on the batch. Raises what it raises, and BadReturn for unusable scores."""
        log = Log()
        returned = [self.function(**arguments) for arguments in self._calls(batch, log)]
        return self._scores(returned, batch, log)

    async def score_async(self, batch: RewardBatch) -> Scores:
        """As `score`, for a coroutine function; the calls of a per-completion convention run concurrently."""
        import asyncio  # here, as most functions need no event loop: it is slow to import

        log = Log()
        returned = await asyncio.gather(*(self.function(**arguments) for arguments in self._calls(batch, log)))
        return self._scores(list(returned), batch, log)

    def _instance(self, function: Callable[..., Any]) -> Any:
        try:
            inspect.signature(function).bind(**self.options)
            return function(**self.options)
        except (TypeError, ValueError) as error:
            raise UserError(f"reward {self.name!r}: {error}; set its options under [rewards.options]") from None

    def _calls(self, batch: RewardBatch, log: Log) -> list[Arguments]:
        calls = []
        if self.takes_any or self.names & {*COLUMNS} or self.arguments is not _trl:
            batch = replace(batch, columns=with_pil_images(batch.columns))
        for available in self.arguments(batch, log):
            missing = sorted(self.required - available.keys())
            if missing:
                raise missing_column(self.name, missing[0], list(batch.columns))
            wanted = available if self.takes_any else {key: available[key] for key in self.names & available.keys()}
            calls.append(wanted | self.options)
        return calls

    def _scores(self, returned: list[Any], batch: RewardBatch, log: Log) -> Scores:
        scores = check_scores(returned if self.per_completion else returned[0], len(batch), self.name)
        log.add_to(scores, len(batch))
        return scores


def with_pil_images(columns: Mapping[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
    """`columns` with images as reward functions know them; equal ones are unpacked once."""
    unpacked: dict[Image, Any] = {}

    def pil(value: Any) -> Any:
        if isinstance(value, Image):
            if value not in unpacked:
                unpacked[value] = value.pil()
            return unpacked[value]
        return [pil(each) for each in value] if isinstance(value, tuple) else value

    return {name: [pil(each) for each in values] if name in COLUMNS else values for name, values in columns.items()}


def missing_column(reward: str, column: str, columns: list[str]) -> UserError:
    """The error for a function that asks for a column the data does not have."""
    have = ", ".join(sorted(columns)) or "none"
    return UserError(
        f"reward {reward!r} asks for {column!r}, which is neither a column of the data (there are: {have}) nor set "
        "under the reward's options; rename the parameter, add the column, or give it a default"
    )


def _is_async(function: Any) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _recognise(names: set[str]) -> tuple[bool, Callable[[RewardBatch, Log], list[Arguments]]]:
    """Whether a function with these parameters is called per completion, and what makes its arguments."""
    if "queries" in names:
        return False, _openrlhf
    if names & GROUP_NAMES.keys():
        return False, _verifiers_group
    if names & {"completions", "completion_ids", "prompts"}:
        return False, _trl
    if "solution_str" in names:
        return True, _verl
    if {"answer", "entry"} <= names:
        return True, _reasoning_gym
    if "response" in names:
        return True, _torchforge
    if names & {"completion", "parser", "state"}:
        return True, _verifiers
    return False, _trl


def _trl(batch: RewardBatch, log: Log) -> list[Arguments]:
    return [
        {name: list(values) for name, values in batch.columns.items()}
        | {
            "prompts": list(batch.prompts),
            "completions": [_shaped(text, prompt) for text, prompt in _pairs(batch)],
            "completion_ids": [list(ids) for ids in batch.completion_ids],
            "trainer_state": TrainerState(batch.step, batch.max_steps),
            "log_metric": log.metric,
            "log_extra": log.extra,
        }
    ]


def _openrlhf(batch: RewardBatch, log: Log) -> list[Arguments]:
    prompts = [_prompt_text(prompt) for prompt in batch.prompts]
    queries = [prompt + text for prompt, text in zip(prompts, batch.completions, strict=True)]
    arguments: Arguments = {"queries": queries, "prompts": prompts}
    for column in ("labels", "label", "answer"):
        if column in batch.columns:
            return [arguments | {"labels": list(batch.columns[column])}]
    return [arguments]


def _verl(batch: RewardBatch, log: Log) -> list[Arguments]:
    calls = []
    for row, text in zip(_rows(batch), batch.completions, strict=True):
        arguments = {"data_source": row.get("data_source", ""), "solution_str": text}
        arguments["extra_info"] = row.get("extra_info", row)
        nested = row.get("reward_model")
        gold = nested if isinstance(nested, Mapping) and "ground_truth" in nested else row
        calls.append(arguments | _gold(gold, "ground_truth"))
    return calls


def _reasoning_gym(batch: RewardBatch, log: Log) -> list[Arguments]:
    return [
        {"answer": xml_answer(text), "entry": row.get("entry", row)}
        for row, text in zip(_rows(batch), batch.completions, strict=True)
    ]


def _torchforge(batch: RewardBatch, log: Log) -> list[Arguments]:
    return [
        row | {"prompt": _prompt_text(prompt), "response": text} | _gold(row, "target")
        for row, (text, prompt) in zip(_rows(batch), _pairs(batch), strict=True)
    ]


def _verifiers(batch: RewardBatch, log: Log) -> list[Arguments]:
    calls = []
    for row, (text, prompt) in zip(_rows(batch), _pairs(batch), strict=True):
        arguments = {"info": {}, "task": "default"} | row | {"prompt": prompt, "completion": _shaped(text, prompt)}
        calls.append(arguments | {"state": {"answer": ""} | arguments, "parser": AnswerParser()})
    return calls


def _verifiers_group(batch: RewardBatch, log: Log) -> list[Arguments]:
    rows = _verifiers(batch, log)
    groups = {
        plural: [row[name] for row in rows] for plural, name in GROUP_NAMES.items() if all(name in row for row in rows)
    }
    return [groups | _trl(batch, log)[0]]


def _rows(batch: RewardBatch) -> list[Arguments]:
    return [{name: values[index] for name, values in batch.columns.items()} for index in range(len(batch))]


def _pairs(batch: RewardBatch) -> list[tuple[str, Prompt]]:
    return list(zip(batch.completions, batch.prompts, strict=True))


def _shaped(text: str, prompt: Prompt) -> str | list[dict[str, str]]:
    """A completion in its prompt's shape: an assistant's message after a conversation, a string after a string."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _prompt_text(prompt: Prompt) -> str:
    """A prompt for functions that take a string: a conversation's contents, one a line."""
    return prompt if isinstance(prompt, str) else "\n".join(content_text(message["content"]) for message in prompt)


def _gold(row: Mapping[str, Any], name: str) -> Arguments:
    """The gold answer under the convention's own name, from that column or from `answer`; nothing without either."""
    for column in (name, "answer"):
        if column in row:
            return {name: row[column]}
    return {}
