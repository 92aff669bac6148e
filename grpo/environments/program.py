"""What runs in an episode's process: the user's program, and `sample`, by which it asks the policy for a turn.

A program is `async def program(row, sample)` or the same without `async`; it returns the episode's reward, or a dict
with "reward" and, if it likes, "success" and "metrics". Other ways to write an environment become programs in
`ways_in.py`.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import socket
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from grpo.environments.link import receive, send
from grpo.references import described, location

Message = dict[str, Any]


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


@dataclass
class Program:
    """A loaded environment: `run(row, sample, start)` plays an episode; `facts` are told to the trainer."""

    run: Callable[..., Any]
    facts: dict[str, Any] = field(default_factory=dict)


class Sampling:
    """`sample` of one episode."""

    def __init__(self, link: socket.socket):
        self._link, self._asked = link, False

    async def __call__(
        self, messages: Sequence[Message], tools: Sequence[Message] | None = None, max_tokens: int | None = None
    ) -> Turn:
        """The policy's next turn after `messages`, the whole conversation so far.

        Messages that extend those of the turn before continue it; others begin a sample of their own. Raises
        EpisodeOver where no turn fits.
        """
        return await asyncio.to_thread(self.now, messages, tools, max_tokens)

    def now(
        self, messages: Sequence[Message], tools: Sequence[Message] | None = None, max_tokens: int | None = None
    ) -> Turn:
        """The same, for programs that are not asynchronous."""
        if self._asked:
            raise RuntimeError("an episode asks for one turn at a time; await the one before")
        self._asked = True
        try:
            send(self._link, {"turn": list(messages), "tools": tools and list(tools), "max_tokens": max_tokens})
            answer = receive(self._link)
        finally:
            self._asked = False
        if answer is None:
            raise SystemExit(0)  # the trainer is gone
        if "over" in answer:
            raise EpisodeOver(answer["over"])
        return Turn(**answer["said"])


def play(program: Program, start: Mapping[str, Any], link: socket.socket) -> None:
    """Play one episode and send its result, or why there is none."""
    sample = Sampling(link)
    try:
        result = program.run(start["row"], sample, start)
        if inspect.isawaitable(result):
            result = asyncio.run(_awaited(result))
        answer: dict[str, Any] = {"end": checked(result)}
    except EpisodeOver as over:
        answer = {"end": {"reward": None, "success": False, "metrics": {}, "over": str(over)}}
    except BadResult as error:
        answer = {"failed": str(error)}
    except BaseException as error:
        answer = {"failed": error_message(error, "raised"), "traceback": traceback.format_exc()[-4000:]}
    import sys

    sys.stdout.flush()
    sys.stderr.flush()
    send(link, answer)


async def _awaited(result: Any) -> Any:
    return await result


def error_message(error: BaseException, what: str) -> str:
    """`error` in one clause, with the place where it was raised."""
    return f"{what} {described(error)} at {location(error)}"


def checked(result: Any) -> dict[str, Any]:
    """A program's result in its full form. Raises BadResult for what is none."""
    table = result if isinstance(result, Mapping) else {"reward": result}
    unknown = sorted(map(str, table.keys() - {"reward", "success", "metrics"}))
    if unknown:
        raise BadResult(f"returned a dict with the key {unknown[0]!r}; return reward, success and metrics")
    reward = number(table.get("reward"), "reward")
    success = table.get("success")
    metrics = {str(name): number(value, f"metric {name!r}") for name, value in dict(table.get("metrics") or {}).items()}
    right = bool(success) if success is not None else reward is not None and reward >= 1
    known = {name: value for name, value in metrics.items() if value is not None}
    return {"reward": reward, "success": right, "metrics": known}


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
