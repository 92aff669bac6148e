"""The text files of a run folder: their names, how a line of them is written so that it can be shown, and reading them.

    metrics.jsonl             one JSON object a step
    eval.jsonl                held-out figures
    alarms.jsonl              what was warned of, a line each time; no file without any
    completions/step-N.jsonl  completions sampled in training at step N, a group a line
    completions/eval-N.jsonl  completions of held-out questions after step N, a group a line
    completions/images/       the images of their prompts and turns, scaled down
    summary.json, report.html
    base_sample.json          beside an adapter too: by which it knows its base (`grpo.model.fingerprint`)

For what is in them see the run log, for checkpoints `grpo.run.checkpoint`. Reading passes over what a crash cut short.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from grpo.printable import UNPRINTABLE

METRICS, EVALUATIONS, SUMMARY, REPORT = "metrics.jsonl", "eval.jsonl", "summary.json", "report.html"
ALARMS = "alarms.jsonl"
COMPLETIONS = "completions"
IMAGES = "images"  # a folder in COMPLETIONS
TRAINING, HELD_OUT = "step", "eval"  # kinds of files in COMPLETIONS

SECRET = re.compile(r"(^|[_-])(api_?key|key|token|secret|password|passwd|credentials?|authorization)$", re.IGNORECASE)
HIDDEN = "(not shown)"


def json_line(value: Any, *, compact: bool = False) -> str:
    """`value` as one line of JSON: numbers of any library as plain ones, NaN and infinities as null.

    Characters that a terminal would act upon are escaped, so that the file can be shown with `cat`.
    """
    separators = (",", ":") if compact else None
    text = json.dumps(plain(value), ensure_ascii=False, allow_nan=False, separators=separators)
    return UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text) + "\n"


def plain(value: Any) -> Any:
    """`value` as what JSON can say; whatever else a user's data set holds is kept as its text."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return float(value) if math.isfinite(value) else None
        case Mapping():
            return {str(key): plain(entry) for key, entry in value.items()}
        case list() | tuple():
            return [plain(entry) for entry in value]
    # A number of numpy or torch.
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "ndim", 0) == 0:
        return plain(item())
    return str(value)


def without_secrets(value: Any) -> Any:
    """Nested tables with the text under keys such as `api_key` or `password` hidden, to be sent or shown elsewhere."""
    if isinstance(value, Mapping):
        return {
            key: HIDDEN if isinstance(entry, str) and SECRET.search(str(key)) else without_secrets(entry)
            for key, entry in value.items()
        }
    return [without_secrets(entry) for entry in value] if isinstance(value, list | tuple) else value


def read_entries(path: Path) -> Iterator[dict[str, Any]]:
    """The objects in the JSON lines of `path` that have a whole number "step"; none where there is no such file."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(entry, dict) and type(entry.get("step")) is int:
                yield entry


def completions_file(run: Path, kind: str, step: int) -> Path:
    return run / COMPLETIONS / f"{kind}-{step}.jsonl"


def completions_files(run: Path, kind: str) -> dict[int, Path]:
    """Step -> file of the completions of one kind, in the order of the steps."""
    files = {}
    for path in (run / COMPLETIONS).glob(f"{kind}-*.jsonl"):
        number = path.stem.removeprefix(f"{kind}-")
        if number.isdecimal():
            files[int(number)] = path
    return dict(sorted(files.items()))
