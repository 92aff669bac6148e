"""The ways to write an environment, each made a `Program`: a program itself, tools as functions, a TRL environment."""

from __future__ import annotations

import base64
import inspect
import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from grpo.environments.command import command
from grpo.environments.gyms import gem, skyrl_gym
from grpo.environments.program import BadResult, EpisodeOver, Message, Program, Sampling, check_options
from grpo.environments.schemas import tool_schema
from grpo.environments.verifiers_v0 import verifiers
from grpo.errors import UserError
from grpo.messages import IMAGE_PARTS
from grpo.references import resolve

RESERVED = ("reset", "get_reward")
"""Methods of a TRL environment that are no tools."""


def program(reference: Any, options: dict[str, Any], setup: Mapping[str, Any]) -> Program:
    """`[environment] program`: a function of a row and `sample`."""
    function = found(reference, "environment")
    reference = named(reference, function)
    if not callable(function):
        raise UserError(f"environment {reference!r} is a {type(function).__name__}; name a function")
    check_options(function, reference, options, ("row", "sample"))
    asynchronous = inspect.iscoroutinefunction(function)

    def run(row: Any, sample: Sampling, start: Mapping[str, Any]) -> Any:
        return function(row, sample if asynchronous else sample.now, **options)

    return Program(run, {"rewards": True})


def tools(references: Any, options: dict[str, Any], setup: Mapping[str, Any]) -> Program:
    """`[environment] tools`: functions that the model may call, in TRL's form."""
    functions = {}
    sent = found(references, "tool") if isinstance(references, dict) else None
    for index, reference in enumerate(references if sent is None else sent):
        function = found(reference, "tool") if sent is None else sent[index]
        check_tool(function, reference)
        if function.__name__ in functions:
            raise UserError(f"two tools are called {function.__name__!r}; rename one of them")
        functions[function.__name__] = function
    if options:
        raise UserError(f"environment.options: tools take none; remove {sorted(options)[0]!r}")
    schemas = [tool_schema(function) for function in functions.values()]

    async def run(row: Any, sample: Sampling, start: Mapping[str, Any]) -> dict[str, Any]:
        counts = await converse(list(row["prompt"]), functions, schemas, sample)
        return {"reward": None, "metrics": counts}

    return Program(run, {"rewards": False, "tools": schemas})


def check_tool(function: Any, reference: Any) -> None:
    """Raise UserError for what is no function that a call by names can reach and that returns an answer."""
    name = getattr(function, "__name__", None)
    if not callable(function) or name is None or inspect.isclass(function):
        kind = "class" if inspect.isclass(function) else type(function).__name__
        raise UserError(f"tool {reference!r} is a {kind}; name a function, with type hints and a docstring")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise UserError(f"tool {name!r} yields its answer in pieces; return it whole")
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL):
            raise UserError(
                f"tool {name!r}: its argument {parameter.name!r} cannot be given by name, as a model's calls give it; "
                "make it an ordinary one"
            )


@dataclass(frozen=True)
class Kind:
    """One class of TRL's `environment_factory`, whose public methods are tools."""

    make: Callable[..., Any]
    names: list[str]
    schemas: list[Message]
    scores: bool

    @classmethod
    def of(cls, reference: Any, options: dict[str, Any]) -> Kind:
        """The class that `reference` names. Raises UserError for what is no environment."""
        make = found(reference, "environment")
        reference = named(reference, make)
        if not callable(make):
            raise UserError(f"environment {reference!r} is a {type(make).__name__}; name a class")
        check_options(make, reference, options, ())
        example = make(**options)
        if not callable(getattr(example, "reset", None)):
            raise UserError(
                f"environment {reference!r} has no method reset(**row); give it one, as TRL's environments have"
            )
        names = [name for name, _ in inspect.getmembers(type(example), inspect.isfunction) if is_tool(name)]
        for name in names:
            check_tool(getattr(example, name), name)
        schemas = [tool_schema(getattr(example, name)) for name in names]
        return cls(make, names, schemas, hasattr(example, "get_reward"))


def factory(reference: Any, options: dict[str, Any], setup: Mapping[str, Any]) -> Program:
    """`[environment] factory`: TRL's `environment_factory`, one class, or several of which a row names one."""
    several = isinstance(reference, dict) and "pickled" not in reference
    kinds = {key: Kind.of(each, options) for key, each in (reference.items() if several else [("", reference)])}

    async def run(row: Any, sample: Sampling, start: Mapping[str, Any]) -> dict[str, Any]:
        chosen = row.get("environment") if several else ""
        if chosen not in kinds:
            raise BadResult(f"has a row whose column environment is {chosen!r}; it is one of {', '.join(kinds)}")
        kind = kinds[chosen]
        environment = kind.make(**options)
        given = {name: value for name, value in row.items() if not several or name != "environment"}
        said = await finished(environment.reset(**given))
        messages = opened(list(row["prompt"]), said)
        functions = {name: getattr(environment, name) for name in kind.names}
        counts = await converse(messages, functions, kind.schemas, sample)
        return {"reward": await finished(environment.get_reward()) if kind.scores else None, "metrics": counts}

    schemas = [schema for kind in kinds.values() for schema in kind.schemas]
    return Program(run, {"rewards": all(kind.scores for kind in kinds.values()), "tools": schemas})


def found(reference: Any, kind: str) -> Any:
    """What `reference` names, or was sent in place of a name. Raises UserError for what is not there."""
    if isinstance(reference, dict):
        return pickle.loads(base64.b64decode(reference["pickled"]))
    return resolve(reference, kind, {})


def named(reference: Any, value: Any) -> str:
    """What `value` is called in messages."""
    return reference if isinstance(reference, str) else str(getattr(value, "__qualname__", value))


def is_tool(name: str) -> bool:
    return not name.startswith("_") and name not in RESERVED


def opened(messages: list[Message], said: Any) -> list[Message]:
    """`messages` with what `reset` returned at the end of the last one, as TRL puts it there."""
    if said is None or said == "":
        return messages
    if not isinstance(said, str) and not is_blocks(said):
        raise TypeError(f"reset returned a {type(said).__name__}; return text, a list of text and image parts, or None")
    *before, last = messages
    content = last["content"]
    if isinstance(said, str) and isinstance(content, str):
        return [*before, {**last, "content": content + said}]
    return [*before, {**last, "content": [*as_blocks(content), *as_blocks(said)]}]


def is_blocks(value: Any) -> bool:
    """Whether `value` is a list of parts, such as text and images."""
    return isinstance(value, list) and bool(value) and all(isinstance(part, dict) and "type" in part for part in value)


def as_blocks(content: Any) -> list[Any]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


async def finished(result: Any) -> Any:
    """`result`, awaited where it has to be."""
    return await result if inspect.isawaitable(result) else result


async def converse(
    messages: list[Message], functions: Mapping[str, Callable[..., Any]], schemas: list[Message], sample: Sampling
) -> dict[str, float]:
    """Turns until the model calls no tool or there is no room; `messages` grows. Returns counts of calls."""
    counts = {"calls": 0.0, "call_errors": 0.0, "malformed_calls": 0.0}
    try:
        while True:
            turn = await sample(messages, schemas)
            messages.append(turn.message)
            calls = turn.message.get("tool_calls") or []
            counts["malformed_calls"] += len(turn.malformed)
            if not (calls or turn.malformed) or turn.finish_reason == "length":
                return counts
            for call in calls:
                answer, failed = await called(call["function"], functions)
                counts["calls"] += 1
                counts["call_errors"] += failed
                messages.append({"role": "tool", "name": call["function"]["name"], "content": answer})
            messages += [unread(problem) for problem in turn.malformed]
            if turn.last:
                return counts
    except EpisodeOver:
        return counts


def unread(problem: str) -> Message:
    """What the model is told of a call that cannot be read."""
    return {"role": "tool", "name": "unknown", "content": str({"error": f"this call cannot be read: {problem}"})}


async def called(call: Mapping[str, Any], functions: Mapping[str, Callable[..., Any]]) -> tuple[Any, bool]:
    """What a tool answers as a message's content, and whether it failed. What it raises becomes its answer, as in TRL.

    Raises BadResult for sound, video and the like.
    """
    name, arguments = call["name"], call["arguments"]
    try:
        if name not in functions:
            raise ValueError(f"Tool {name} not found.")  # TRL's words
        answer = await finished(functions[name](**(json.loads(arguments) if isinstance(arguments, str) else arguments)))
        return content_of(answer, name), False
    except BadResult:
        raise
    except Exception as error:
        return str({"error": words_of(error)}), True


def words_of(error: Exception) -> str:
    """What `error` says; its kind where it says nothing that is text."""
    try:
        return str(error)
    except Exception:
        return type(error).__name__


def content_of(answer: Any, tool: str) -> Any:
    """What `tool` returned as the content of its message: text, or parts where an image is among them.

    Raises BadResult for parts of other kinds.
    """
    if not is_blocks(answer):
        return str(answer)
    kinds = [part["type"] for part in answer]
    if strange := next((kind for kind in kinds if kind not in ("text", *IMAGE_PARTS)), None):
        raise BadResult(f"returned a block of type {strange!r} from its tool {tool!r}; only text and images are shown")
    if set(kinds) == {"text"}:
        return "".join(str(part.get("text", "")) for part in answer)
    return answer


WAYS_IN: dict[str, Callable[[Any, dict[str, Any], Mapping[str, Any]], Program]] = {
    "program": program,
    "tools": tools,
    "factory": factory,
    "verifiers": verifiers,
    "skyrl_gym": skyrl_gym,
    "gem": gem,
    "command": command,
}
"""Key of `[environment]` -> what makes a program of its value and the options."""


def load(setup: Mapping[str, Any]) -> Program:
    """The environment that `setup` names. Raises UserError, or what its file raises."""
    return WAYS_IN[setup["kind"]](setup["reference"], dict(setup["options"]), setup)
