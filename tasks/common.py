"""What a task is, how one is found by name, and reading rows from files and from the Hugging Face hub.

A task is rows with a prompt, the rewards it suggests, and two checks of a completion for evaluation. It knows no
tokenizer and no model: chat templates, length limits, shuffling and mixing are `grpo/data.py`'s, and scoring during
training is the rewards'. Your own task is one Python file with a function that returns a `Task`:

    [task]
    name = "my_task.py:load"
    options = { rows = 1000 }
"""

from __future__ import annotations

import csv
import difflib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from grpo.errors import UserError
from grpo.rewards.resolve import described, location, resolve

Row = dict[str, Any]
"""One question: "prompt" (a string, or a list of chat messages) and further columns, which rewards receive."""

Verifier = Callable[[str, Row], bool]
"""Is this completion text right for this row?"""

BUILT_IN = {
    name: f"grpo.tasks.{name}:load"
    for name in ("arithmetic", "calculator", "countdown", "gsm8k", "reasoning_gym", "table")
}
FORMATS = (".jsonl", ".json", ".parquet", ".csv")


@dataclass
class Task:
    """Questions, the rewards suggested for them, and two checks of an answer."""

    name: str
    train: Sequence[Row]
    eval: Sequence[Row]
    """Held-out rows; may be empty."""
    rewards: list[dict[str, Any]] = field(default_factory=list)
    """`[[rewards]]` tables, used when the configuration has none of its own."""
    strict: Verifier = field(kw_only=True)
    """Right, and in the format that the prompt asks for."""
    flexible: Verifier = field(kw_only=True)
    """Right, wherever in the completion the answer stands."""


def load_task(reference: str, options: Mapping[str, Any] | None = None) -> Task:
    """The task that `reference` names, loaded with `options` as keyword arguments.

    `reference` is a name of `BUILT_IN`, "package.module:function" or "path/file.py:function". Raises UserError when
    there is no such task, or when an option is unknown, missing or of the wrong type.
    """
    function = resolve(reference, "task", BUILT_IN)
    if not callable(function):
        raise UserError(f"task {reference!r} is a {type(function).__name__}; name a function that returns a Task")
    chosen = checked_options(reference, function, dict(options or {}))
    try:
        task = function(**chosen)
    except (UserError, MemoryError):
        raise
    except Exception as error:
        place = location(error)
        raise UserError(f"task {reference!r} failed at {place}: {described(error)}; mend it, or its options") from error
    if not isinstance(task, Task):
        raise UserError(f"task {reference!r} returned a {type(task).__name__}; its function must return a Task")
    return task


def checked_options(reference: str, function: Callable[..., Task], options: dict[str, Any]) -> dict[str, Any]:
    """`options`, with names and types checked against the signature of `function`."""
    parameters = inspect.signature(function).parameters
    named = [name for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name in options:
        if name not in named and not takes_any:
            near = difflib.get_close_matches(name, named, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UserError(f"task {reference!r} has no option {name!r}; {hint}valid are {', '.join(named) or 'none'}")
    missing = [name for name in named if parameters[name].default is inspect.Parameter.empty and name not in options]
    if missing:
        raise UserError(f"task {reference!r} needs the option {missing[0]!r}; set it in [task] options")
    try:
        hints = get_type_hints(function)
    except (NameError, TypeError):  # annotations of a user's function that exist for type checkers alone
        hints = {}
    for name in options.keys() & hints.keys():
        try:
            options[name] = TypeAdapter(hints[name]).validate_python(options[name])
        except PydanticUserError:
            continue  # a type that pydantic does not know
        except ValidationError as error:
            message = error.errors(include_url=False)[0]["msg"]
            raise UserError(f"task.options.{name} = {options[name]!r}: {message[0].lower()}{message[1:]}") from None
    return options


def read_splits(
    path: str | Path, columns: Sequence[str], train: str = "train", held_out: str | None = "test"
) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows of a local data set; each row must have `columns`.

    `path` is a folder with a file `train` and perhaps one `test` (other names: `train`, `held_out`) as .jsonl, .json,
    .parquet (also in shards, as hub data sets are stored) or .csv; or one such file, all of it for training.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return read_files([path], columns), []
    if not path.is_dir():
        raise UserError(f"data set {path} does not exist; give a folder with train.jsonl, or one file")
    train_files = split_files(path, train)
    if not train_files:
        raise UserError(f"{path}: no {train}.jsonl, .json, .parquet or .csv in this folder; name the training file so")
    test_files = split_files(path, held_out) if held_out else []
    return read_files(train_files, columns), read_files(test_files, columns) if test_files else []


def split_files(folder: Path, split: str) -> list[Path]:
    """The file or shards of one split in `folder`, or in its `data` folder."""
    for place in (folder, folder / "data"):
        for suffix in FORMATS:
            if (file := place / f"{split}{suffix}").is_file():
                return [file]
            if shards := sorted(place.glob(f"{split}-*{suffix}")):
                return shards
    return []


def read_files(files: Sequence[Path], columns: Sequence[str]) -> list[Row]:
    """All rows of `files`, in order. Raises UserError naming file and line of the first row that lacks a column."""
    rows = []
    for file in files:
        for where, row in located_rows(file):
            require_columns(row, columns, where)
            rows.append(row)
    if not rows:
        raise UserError(f"{files[0]}: no rows in it; a task needs at least one")
    return rows


def located_rows(file: Path) -> Iterator[tuple[str, Row]]:
    """Each row of `file` with its place as "file:line" or "file, row n"."""
    suffix = file.suffix.lower()
    if suffix not in FORMATS:
        raise UserError(f"{file}: cannot read {suffix or 'a file without an ending'}; use one of {', '.join(FORMATS)}")
    try:
        if suffix == ".parquet":
            yield from parquet_rows(file)
        elif suffix == ".csv":
            with file.open(encoding="utf-8-sig", newline="") as lines:
                reader = csv.DictReader(lines)
                yield from ((f"{file}:{reader.line_num}", row) for row in reader)
        else:
            yield from json_rows(file)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file}: cannot be read ({error}); is it really {suffix}?") from None


def json_rows(file: Path) -> Iterator[tuple[str, Row]]:
    """Rows of JSON lines, or of one JSON array."""
    text = file.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        try:
            values = [(f"{file}, row {number}", value) for number, value in enumerate(json.loads(text), 1)]
        except (json.JSONDecodeError, RecursionError) as error:
            line, reason = getattr(error, "lineno", 1), getattr(error, "msg", "nested too deeply")
            raise UserError(f"{file}:{line}: not valid JSON ({reason}); correct it") from None
    else:
        values = []
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                values.append((f"{file}:{number}", json.loads(line)))
            except (json.JSONDecodeError, RecursionError) as error:
                reason = getattr(error, "msg", "nested too deeply")
                raise UserError(f"{file}:{number}: not valid JSON ({reason}); write one object a line") from None
    for where, value in values:
        if not isinstance(value, dict):
            raise UserError(f"{where}: a {type(value).__name__} where a row should be; write one JSON object a row")
        yield where, value


def parquet_rows(file: Path) -> Iterator[tuple[str, Row]]:
    """Rows of a Parquet file."""
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(file)
    except pyarrow.ArrowException as error:
        raise UserError(f"{file}: not a Parquet file ({error}); is it complete?") from None
    yield from ((f"{file}, row {number}", row) for number, row in enumerate(table.to_pylist(), 1))


def require_columns(row: Row, columns: Sequence[str], where: str) -> None:
    """Raise UserError when `row` lacks one of `columns`, or holds null there."""
    for column in columns:
        if row.get(column) is None:
            state = "is null" if column in row else "is missing"
            raise UserError(f"{where}: column {column!r} {state}; the columns are {', '.join(map(str, row))}")


def read_hub(
    name: str, subset: str | None, columns: Sequence[str], train: str = "train", held_out: str | None = "test"
) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows of a hub data set, through `datasets`; `held_out = None`: no held-out rows."""
    import datasets

    try:
        splits = datasets.load_dataset(name, subset)
    except Exception as error:  # every way in which network, hub and parser fail
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"data set {name!r} cannot be read from the hub ({type(error).__name__}: {reason}); check its name and "
            "the network, or give the task's `path` a local copy"
        ) from None
    found: list[list[Row]] = []
    for split in filter(None, (train, held_out)):
        if split not in splits:
            raise UserError(f"data set {name!r} has no split {split!r}; its splits are {', '.join(splits)}")
        rows = splits[split].to_list()
        for number, row in enumerate(rows, 1):
            require_columns(row, columns, f"{name} {split}, row {number}")
        if not rows:
            raise UserError(f"data set {name!r}: split {split!r} has no rows; choose another one")
        found.append(rows)
    return found[0], found[1] if len(found) > 1 else []
