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
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from grpo.errors import UserError
from grpo.references import described, location, resolve
from grpo.tasks.cells import require_columns

Row = dict[str, Any]
"""One question: "prompt" (a string, or a list of chat messages) and further columns, which rewards receive."""

Make = Callable[[Row, str], Row]
"""What becomes of a row that was read; it gets the row's place as "file:line" or "file, row n"."""

Verifier = Callable[[str, Row], bool]
"""Is this completion text right for this row?"""

BUILT_IN = {
    name: f"grpo.tasks.{name}:load"
    for name in ("arithmetic", "calculator", "countdown", "gsm8k", "nim", "reasoning_gym", "shapes", "table")
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
        where = location(error)
        raise UserError(f"task {reference!r} failed at {where}: {described(error)}; mend it, or its options") from error
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


def as_read(row: Row, where: str) -> Row:
    """The row itself."""
    return row


def read_splits(
    path: str | Path,
    columns: Sequence[str],
    train: str = "train",
    held_out: str | None = "test",
    make: Make = as_read,
) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows of a local data set, as `make` returns them; each row must have `columns`.

    `path` is a folder with a file `train` and perhaps one `test` (other names: `train`, `held_out`) as .jsonl, .json,
    .parquet (also in shards, as hub data sets are stored) or .csv; or one such file, all of it for training.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return read_files([path], columns, make), []
    if not path.is_dir():
        raise UserError(f"data set {path} does not exist; give a folder with train.jsonl, or one file")
    train_files = split_files(path, train)
    if not train_files:
        raise UserError(f"{path}: no {train}.jsonl, .json, .parquet or .csv in this folder; name the training file so")
    test_files = split_files(path, held_out) if held_out else []
    return read_files(train_files, columns, make), read_files(test_files, columns, make) if test_files else []


def split_files(folder: Path, split: str) -> list[Path]:
    """The file or shards of one split in `folder`, or in its `data` folder."""
    for parent in (folder, folder / "data"):
        for suffix in FORMATS:
            if (file := parent / f"{split}{suffix}").is_file():
                return [file]
            if shards := sorted(parent.glob(f"{split}-*{suffix}")):
                return shards
    return []


def read_files(files: Sequence[Path], columns: Sequence[str], make: Make = as_read) -> list[Row]:
    """All rows of `files`, in order, as `make` returns them.

    Raises UserError naming file and line of the first row that lacks a column.
    """
    rows = []
    for file in files:
        for where, row in located_rows(file):
            require_columns(row, columns, where)
            rows.append(make(row, where))
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
            yield from csv_rows(file)
        else:
            yield from json_rows(file)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file}: cannot be read ({error}); is it really {suffix}?") from None


def csv_rows(file: Path) -> Iterator[tuple[str, Row]]:
    """Rows of a CSV file whose first line names the columns; a cell `nan` is NaN.

    Raises UserError for a row with more or fewer fields than the header, which would be shifted columns.
    """
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, strict=True)
        header: list[str] = []
        start = 1
        try:
            for fields in reader:
                where, start = f"{file}:{start}", reader.line_num + 1
                if not fields:  # a blank line
                    continue
                if not header:
                    header = fields
                    check_names(header, where)
                    continue
                if len(fields) > len(header):
                    raise UserError(f"{where}: more fields than the header; quote the comma")
                if len(fields) < len(header):
                    missing = header[len(fields)]
                    raise UserError(
                        f"{where}: fewer fields than the header, {missing!r} is missing; write empty ones too"
                    )
                cells = (math.nan if cell in ("nan", "NaN") else cell for cell in fields)
                yield where, dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise UserError(f"{file}:{start}: not valid CSV ({error}); quote fields with quotes or commas") from None


def check_names(names: Sequence[str], where: str) -> None:
    """Raise UserError when two columns have one name, as only one of them would be read."""
    twice = next((name for index, name in enumerate(names) if name in names[:index]), None)
    if twice is not None:
        raise UserError(f"{where}: two columns are called {twice!r}; rename one")


def json_object(entries: list[tuple[str, Any]]) -> Row:
    """A JSON object as a dict. Raises ValueError where a name occurs twice."""
    row = dict(entries)
    if len(row) < len(entries):
        names = [name for name, _ in entries]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} occurs twice in one object")
    return row


def json_rows(file: Path) -> Iterator[tuple[str, Row]]:
    """Rows of JSON lines, or of one JSON array."""
    text = file.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        try:
            values = [(f"{file}, row {number}", value) for number, value in enumerate(loaded(text), 1)]
        except (ValueError, RecursionError) as error:
            line, reason = getattr(error, "lineno", 1), json_reason(error)
            raise UserError(f"{file}:{line}: not valid JSON ({reason}); correct it") from None
    else:
        values = []
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                values.append((f"{file}:{number}", loaded(line)))
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{file}:{number}: not valid JSON ({json_reason(error)}); write one object a line"
                ) from None
    for where, value in values:
        if not isinstance(value, dict):
            raise UserError(f"{where}: a {type(value).__name__} where a row should be; write one JSON object a row")
        yield where, value


def loaded(text: str) -> Any:
    """`text` as JSON."""
    return json.loads(text, object_pairs_hook=json_object)


def json_reason(error: Exception) -> str:
    """Why text is no JSON."""
    return "nested too deeply" if isinstance(error, RecursionError) else getattr(error, "msg", str(error))


def parquet_rows(file: Path) -> Iterator[tuple[str, Row]]:
    """Rows of a Parquet file."""
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(file)
    except pyarrow.ArrowException as error:
        raise UserError(f"{file}: not a Parquet file ({error}); is it complete?") from None
    check_names(table.column_names, str(file))
    yield from ((f"{file}, row {number}", row) for number, row in enumerate(table.to_pylist(), 1))


def read_hub(
    name: str,
    subset: str | None,
    columns: Sequence[str],
    train: str = "train",
    held_out: str | None = "test",
    make: Make = as_read,
) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows of a hub data set, through `datasets`, as `make` returns them; `held_out = None`: no
    held-out rows."""
    import datasets

    try:
        splits = datasets.load_dataset(name, subset)
    except Exception as error:  # every way in which network, hub and parser fail
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"data set {name!r} cannot be read from the hub ({type(error).__name__}: {reason}); check its name and "
            "the network, or give the task's `path` a local copy"
        ) from None
    result: list[list[Row]] = []
    for split in filter(None, (train, held_out)):
        if split not in splits:
            raise UserError(f"data set {name!r} has no split {split!r}; its splits are {', '.join(splits)}")
        rows: list[Row] = []
        for number, row in enumerate(splits[split].to_list(), 1):
            where = f"{name} {split}, row {number}"
            require_columns(row, columns, where)
            rows.append(make(row, where))
        if not rows:
            raise UserError(f"data set {name!r}: split {split!r} has no rows; choose another one")
        result.append(rows)
    return result[0], result[1] if len(result) > 1 else []
