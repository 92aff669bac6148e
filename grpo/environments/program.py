"""What runs in an episode's process: the user's program, and `sample`, by which it asks the policy for a turn.

A program is `async def program(row, sample)` or the same without `async`; it returns the episode's reward, or a dict
with "reward" or "turn_rewards" and, if it likes, "success" and "metrics". Other ways to write an environment become
programs in `ways_in.py`.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import math
import socket
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from grpo.environments.link import receive, send, with_numbers
from grpo.environments.pictures import Unreadable, received_row, sent_messages
from grpo.errors import UserError
from grpo.references import described, location

Message = dict[str, Any]


RESULT = ("reward", "success", "metrics", "turn_rewards", "state")
"""What a program's result may hold; the last is for `Program.score_group` alone."""


class EpisodeOver(Exception):
    """The episode has no room for another turn: raised by `sample`. A program may catch it and return its reward."""


class BadResult(Exception):
    """What a program returned is no result; the message says what it was."""


@dataclass(frozen=True)
class Turn:
    """What the policy said."""

    message: Message
    """The assistant's message, with "tool_calls" where it called any."""
    text: str
    """All of it as text, calls included."""
    finish_reason: str
    """ "stop", or "length" where it was cut."""
    last: bool
    """No turn can follow."""
    malformed: list[str]
    """Why each call that could not be read could not."""
    prompt_ids: list[int]
    completion_ids: list[int]
    logprobs: list[float]


Questions = tuple[list[dict[str, Any]], list[dict[str, Any]]]
"""Rows to train on, and held-out ones."""


@dataclass
class Program:
    """A loaded environment: `run(row, sample, start)` plays an episode; `facts` are told to the trainer."""

    run: Callable[..., Any]
    facts: dict[str, Any] = field(default_factory=dict)
    questions: Callable[[int, int], Questions] | None = None
    """So many rows of its own, and held-out ones."""
    score_group: Callable[[Sequence[str]], Any] | None = None
    """Results of episodes of one group, from the "state" that each `run` returned."""


def package(name: str, requirement: str) -> Any:
    """The module `name`. Raises UserError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise UserError(
            f"{name} is not installed for {sys.executable}; pip install {requirement!r} there, or set "
            "environment.python to an interpreter that has it"
        ) from None


def check_options(
    function: Callable[..., Any], reference: str, options: dict[str, Any], given: tuple[str, ...]
) -> None:
    """Raise UserError unless `function` can be called with what is `given` and `options`."""
    try:
        inspect.signature(function).bind(*given, **options)
    except TypeError as error:
        raise UserError(
            f"environment {reference!r} cannot be called with {', '.join(given) or 'nothing'} and its options "
            f"({error}); mend its parameters or environment.options"
        ) from None


class Sampling:
    """`sample` of one episode."""

    def __init__(self, link: socket.socket, images: set[str] | None = None):
        """`images`: the keys of those that the trainer has; it grows."""
        self._link, self._asked = link, False
        self._images = set() if images is None else images

    async def __call__(
        self, messages: Sequence[Message], tools: Sequence[Message] | None = None, max_tokens: int | None = None
    ) -> Turn:
        """The policy's next turn after `messages`, the whole conversation so far, whose content may have images.

        Messages that extend those of the turn before continue it; others begin a sample of their own. Raises
        EpisodeOver where no turn fits.
        """
        self._ask(messages, tools, max_tokens, None)
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[dict[str, Any] | None] = loop.create_future()

        def read() -> None:
            loop.remove_reader(self._link)
            try:
                answer = self._answer()
            except Exception as error:
                if not answered.done():
                    answered.set_exception(error)
            else:
                if not answered.done():  # whoever asked may have given up
                    answered.set_result(answer)

        try:
            loop.add_reader(self._link, read)  # a thread would take longer to start than all else here
        except NotImplementedError:
            return turn_of(await asyncio.to_thread(self._answer))
        return turn_of(await answered)

    def now(
        self,
        messages: Sequence[Message],
        tools: Sequence[Message] | None = None,
        max_tokens: int | None = None,
        *,
        prompt_ids: Sequence[int] | None = None,
    ) -> Turn:
        """The same, for programs that are not asynchronous. `prompt_ids`: tokens in place of messages."""
        self._ask(messages, tools, max_tokens, prompt_ids)
        return turn_of(self._answer())

    def _ask(
        self,
        messages: Sequence[Message],
        tools: Sequence[Message] | None,
        max_tokens: int | None,
        prompt_ids: Sequence[int] | None,
    ) -> None:
        """Send what is asked for; until it is answered nothing else is."""
        if self._asked:
            raise RuntimeError("an episode asks for one turn at a time; await the one before")
        self._asked = True
        try:
            turn = sent_messages(messages, self._images)
            asked = {"turn": turn, "tools": tools and list(tools), "max_tokens": max_tokens}
            send(self._link, asked if prompt_ids is None else {**asked, "prompt_ids": list(prompt_ids)})
        except BaseException as problem:
            self._asked = False
            if isinstance(problem, Unreadable):
                raise BadResult(str(problem)) from None
            raise

    def _answer(self) -> dict[str, Any] | None:
        """What the trainer says; None where it is gone."""
        try:
            return receive(self._link)
        finally:
            self._asked = False

    def settle(self) -> None:
        """Wait for the answer to a question that was given up: the trainer is told nothing while it is to answer."""
        if self._asked:
            self._answer()


def turn_of(answer: dict[str, Any] | None) -> Turn:
    """The turn that the trainer sent. Raises EpisodeOver where none fitted, SystemExit where the trainer is gone."""
    if answer is None:
        raise SystemExit(0)
    if "over" in answer:
        raise EpisodeOver(answer["over"])
    return Turn(**with_numbers(answer["said"]))


def play(program: Program, start: Mapping[str, Any], link: socket.socket) -> None:
    """Play one episode, or score those of a group, and send what came of it, or why nothing did."""
    sample: Sampling | None = None
    try:
        if "states" in start:
            assert program.score_group is not None
            results = finished_now(program.score_group(start["states"]))
            answer: dict[str, Any] = {"scored": [checked(each) for each in results]}
        else:
            known: set[str] = set()
            row = received_row(start["row"], known)
            sample = Sampling(link, known)
            answer = {"end": checked(finished_now(program.run(row, sample, start)))}
    except EpisodeOver as over:
        answer = {"end": {**checked(None), "over": str(over)}}
    except BadResult as error:
        answer = {"failed": str(error)}
    except BaseException as error:
        answer = {"failed": error_message(error, "raised"), "traceback": traceback.format_exc()[-4000:]}
    sys.stdout.flush()
    sys.stderr.flush()
    if sample is not None:
        sample.settle()
    send(link, answer)


def finished_now(result: Any) -> Any:
    """`result`, or what it comes to where it is a coroutine."""

    async def awaited() -> Any:
        return await result

    return asyncio.run(awaited()) if inspect.isawaitable(result) else result


def error_message(error: BaseException, what: str) -> str:
    """`error` in one clause, with the place where it was raised."""
    return f"{what} {described(error)} at {location(error)}"


def checked(result: Any) -> dict[str, Any]:
    """A program's result in its full form. Raises BadResult for what is none."""
    table = result if isinstance(result, Mapping) else {"reward": result}
    unknown = sorted(map(str, table.keys() - set(RESULT)))
    if unknown:
        raise BadResult(f"returned a dict with the key {unknown[0]!r}; it may have {', '.join(RESULT[:-1])}")
    turns = table.get("turn_rewards")
    if turns is not None and not isinstance(turns, list | tuple):
        raise BadResult(f"returned a {type(turns).__name__} as its turn_rewards; return a list of numbers")
    turn_rewards = None if turns is None else [number(value, "turn reward") or 0.0 for value in turns]
    reward = number(table.get("reward", None if turn_rewards is None else math.fsum(turn_rewards)), "reward")
    success = table.get("success")
    metrics = {str(name): number(value, f"metric {name!r}") for name, value in dict(table.get("metrics") or {}).items()}
    return {
        "reward": reward,
        "success": bool(success) if success is not None else reward is not None and reward >= 1,
        "metrics": {name: value for name, value in metrics.items() if value is not None},
        "turn_rewards": turn_rewards,
        "state": table.get("state"),
    }


def number(value: Any, what: str) -> float | None:
    """`value` as a float; None stays. Raises BadResult for anything else."""
    if value is None:
        return None
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        raise BadResult(f"returned a {type(value).__name__} as its {what}; return a number or None") from None
    if not math.isfinite(found):
        raise BadResult(f"returned {found} as its {what}; return a finite number or None")
    return found
