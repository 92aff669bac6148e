"""Tasks and rewards given as Python objects: rows, data sets, functions, closures, lambdas.

Each becomes what training takes, and an entry of the configuration that says in the run folder what it was. Such an
entry names the object ("__main__:brevity") but cannot bring it back: a run on them goes on where they are defined.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from grpo.config.schema import OWN_QUESTIONS
from grpo.config.toml import write_value
from grpo.errors import UserError
from grpo.rewards.runtime.contract import RewardSpec
from grpo.tasks.common import Row, Task, load_task

ROWS = "rows"
"""What a task is called that was given as rows."""


def as_task(task: Any) -> tuple[Task, dict[str, Any]]:
    """`task` as a Task and as a `[task]` table.

    It may be a Task, the name of one, a `[task]` table with a "name", a list of rows with a "prompt" each, or a
    `datasets.Dataset` of such rows. Raises UserError for anything else.
    """
    if isinstance(task, Task):
        return task, {"name": task.name}
    if isinstance(task, str):
        return load_task(task), {"name": task}
    if isinstance(task, Mapping) and isinstance(task.get("name"), str):
        return load_task(task["name"], task.get("options")), dict(task)
    if hasattr(task, "to_list"):
        task = task.to_list()
    if isinstance(task, Mapping):
        splits = ", ".join(map(repr, task))
        raise UserError(f"the task is a dict of {splits}; pass one split of a data set, or a [task] table with a name")
    if isinstance(task, Sequence) and all(isinstance(row, Mapping) for row in task):
        return task_of_rows([dict(row) for row in task]), {"name": ROWS}
    raise UserError(
        f"a task cannot be made of a {type(task).__name__}; pass a task's name, a Task, a list of dicts with a "
        '"prompt", or a datasets.Dataset'
    )


def as_own_or_task(task: Any) -> tuple[Task | None, dict[str, Any]]:
    """The same; None for the task "environment", whose questions come from the environment once it is there."""
    name = task.get("name") if isinstance(task, Mapping) else task
    if isinstance(name, str) and name == OWN_QUESTIONS:
        return None, dict(task) if isinstance(task, Mapping) else {"name": name}
    return as_task(task)


def task_of_rows(rows: list[Row]) -> Task:
    """Rows to train on. There is no check of an answer, so they cannot be evaluated on."""

    def unknown(text: str, row: Row) -> NoReturn:
        raise UserError("rows alone do not say which answers are right; pass a grpo.Task with its two checks")

    return Task(ROWS, train=rows, eval=[], strict=unknown, flexible=unknown)


def as_rewards(rewards: Any) -> list[RewardSpec]:
    """`rewards`, one or a list: functions, names of them, `[[rewards]]` tables (also with a function in them).

    Lambdas are called lambda, lambda_2 and so on, unless a table names them.
    """
    listed = list(rewards) if isinstance(rewards, list | tuple) else [rewards]
    specs: list[RewardSpec] = []
    for entry in listed:
        if not (isinstance(entry, str | Mapping | RewardSpec) or callable(entry) or hasattr(entry, "function")):
            raise UserError(
                f"a reward cannot be made of {entry!r}; pass a function, the name of one, or a dict with a 'function'"
            )
        spec = RewardSpec.of(entry)
        if spec.column == "<lambda>":
            count = sum(one.column.startswith("lambda") for one in specs)
            spec = RewardSpec(**{**vars(spec), "name": f"lambda_{count + 1}" if count else "lambda"})
        specs.append(spec)
    return specs


def reward_table(spec: RewardSpec) -> dict[str, Any]:
    """`spec` as a `[[rewards]]` table. Raises UserError for options that a configuration cannot hold."""
    table = {key: value for key, value in vars(spec).items() if value is not None}
    table["options"] = dict(spec.options)
    if not isinstance(spec.function, str):
        table |= {"function": reference(spec.function), "name": spec.column}
    try:
        write_value(table["options"])
    except TypeError as error:
        raise UserError(
            f"reward {spec.column!r}: its options must be numbers, text, lists and dicts ({error}); put other values "
            "into the function, with functools.partial"
        ) from None
    return table


def reference(function: Any) -> str:
    """Where a callable was defined, as "module:name"."""
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    return f"{getattr(function, '__module__', None) or type(function).__module__}:{name}"


def as_environment(table: Any) -> tuple[dict[str, Any], Any]:
    """`environment`, which may name functions and classes themselves, as a section; and what it names, to be sent.

    The second is None where all are names. Raises UserError for what is no table.
    """
    if not isinstance(table, Mapping):
        raise UserError(f"environment = {table!r} must be a dict of [environment] keys")
    named, given = dict(table), None
    if isinstance(several := table.get("factory"), Mapping) and any(map(callable, several.values())):
        named["factory"] = {key: reference(one) if callable(one) else one for key, one in several.items()}
        return named, dict(several)
    for kind in ("program", "factory", "tools"):
        value = table.get(kind)
        listed = list(value) if kind == "tools" and isinstance(value, list | tuple) else [value]
        if any(callable(one) for one in listed):
            if not all(callable(one) for one in listed):
                raise UserError(f"environment.{kind}: pass functions or their names, not both")
            names = [reference(one) for one in listed]
            named[kind], given = (names, listed) if kind == "tools" else (names[0], value)
    return named, given
