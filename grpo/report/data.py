"""A run folder as the report needs it: figures of each step, evaluations, a bounded choice of completions.

Reading is forgiving (a crash cuts lines short, a running process adds some) and sizes are bounded, so that the report
of a run of a hundred thousand steps is no heavier than that of a thousand. Charts are `grpo.report.charts`'.
"""

from __future__ import annotations

import base64
import json
import math
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpo.errors import UserError
from grpo.messages import content_text
from grpo.printable import printable
from grpo.run.checkpoint import CONFIG
from grpo.run.records import (
    COMPLETIONS,
    EVALUATIONS,
    HELD_OUT,
    IMAGES,
    METRICS,
    SUMMARY,
    TRAINING,
    completions_files,
    read_entries,
    without_secrets,
)

SAMPLED_STEPS, EVALUATED_STEPS = 60, 12
"""At most so many steps have their completions in the report: the first, the last, and between them evenly."""
CHARACTERS = 600_000
"""Of completions and prompts in the report, for training and for held-out questions each."""
IMAGE_CHARACTERS = 3_000_000
"""Of images in the report."""
LONGEST_IMAGE = 200_000
"""Bytes of an image's file."""
GROUP_IMAGES = 8
"""Images of a prompt, or of a turn, that are shown."""
IMAGE_NAME = re.compile(r"[0-9a-f]{32}\.webp")
GROUP_SAMPLES = 8
"""Completions of a group that are kept: the best, the worst, and evenly by rank."""
EPISODE_TURNS = 24
"""Of an episode, in the report."""
HEAD, TAIL = 2000, 1000
"""Characters of a longer text that are kept from its beginning and its end, where answers stand."""

Entry = dict[str, Any]


@dataclass
class RunData:
    """What is known of a run."""

    name: str
    steps: list[int] = field(default_factory=list)
    series: dict[str, list[float | None]] = field(default_factory=dict)
    """Every numeric metric, one value a step; None where a step has none."""
    evaluations: list[Entry] = field(default_factory=list)
    """Those of training, by step."""
    checks: list[Entry] = field(default_factory=list)
    """Those of `python -m grpo.evaluate` afterwards."""
    config: Entry = field(default_factory=dict)
    """The resolved configuration; empty where there is none."""
    summary: Entry = field(default_factory=dict)
    images: dict[str, str] = field(default_factory=dict)
    """Data URIs of images that prompts and turns in `groups` have, by file."""
    groups: list[Entry] = field(default_factory=list)
    """Completions, see `sampled_groups`."""
    max_steps: int | None = None

    @property
    def finished(self) -> bool:
        return bool(self.steps) and self.summary.get("steps") == self.steps[-1]

    def setting(self, section: str, key: str) -> Any:
        """A value of the configuration, None where it is not set."""
        table = self.config.get(section)
        return table.get(key) if isinstance(table, dict) else None

    def known(self, key: str) -> list[float]:
        """The values of a metric, without the steps that have none."""
        return [value for value in self.series.get(key, ()) if value is not None]

    def entries(self) -> Iterator[Entry]:
        """The steps with their metrics, as they were logged."""
        for place, step in enumerate(self.steps):
            values = ((key, column[place]) for key, column in self.series.items())
            yield {"step": step, **{key: value for key, value in values if value is not None}}

    @property
    def rewards(self) -> list[str]:
        """Names of the reward functions, in the order of the metrics."""
        parts = (key.split("/") for key in self.series)
        return [part[1] for part in parts if part[0] == "rewards" and len(part) == 2]


def read_run(folder: Path, max_steps: int | None = None, share: float = 1.0) -> RunData:
    """The run in `folder`; `max_steps` where it is known better than the configuration says.

    `share`: of the characters that a report has for completions. Raises UserError for a folder that is not a run's.
    """
    if not (folder / METRICS).is_file() and not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: neither {METRICS} nor {CONFIG} in it, so it is not a run; pass a run folder")
    run = RunData(printable(folder.resolve().name))
    by_step = {entry["step"]: entry for entry in read_entries(folder / METRICS)}
    run.steps = sorted(by_step)
    entries = [by_step[step] for step in run.steps]
    for key in dict.fromkeys(key for entry in entries for key in entry if key != "step"):
        values = [number(entry.get(key)) for entry in entries]
        if any(value is not None for value in values):
            run.series[printable(key)] = values
    evaluations = [numbers(entry) for entry in read_entries(folder / EVALUATIONS)]
    # An interrupted run that starts again evaluates step 0 again.
    training = {entry["step"]: entry for entry in evaluations if "model" not in entry}
    run.evaluations = [training[step] for step in sorted(training)]
    run.checks = [entry for entry in evaluations if "model" in entry]
    run.config = without_secrets(read_config_file(folder / CONFIG))
    run.summary = read_summary(folder / SUMMARY)
    run.max_steps = max_steps or number(run.setting("train", "max_steps")) or number(run.summary.get("steps"))
    run.groups = [
        *sampled_groups(completions_files(folder, TRAINING), "training", SAMPLED_STEPS, share),
        *sampled_groups(completions_files(folder, HELD_OUT), "held out", EVALUATED_STEPS, share),
    ]
    run.images = embedded_images(folder / COMPLETIONS / IMAGES, run.groups, share)
    return run


def embedded_images(folder: Path, groups: Sequence[Entry], share: float) -> dict[str, str]:
    """Data URIs, by name, of the files in `folder` that `groups` name, those of prompts first and the latest
    first, while they fit in a report.

    A file counts as what a run writes there: a WebP of some kilobytes.
    """
    left = share * IMAGE_CHARACTERS
    found: dict[str, str] = {}
    of_prompts = (name for group in reversed(groups) for name in group.get("images", ()))
    of_turns = (
        name
        for group in reversed(groups)
        for sample in group["samples"]
        for turn in sample.get("turns", ())
        for name in turn.get("images", ())
    )
    for name in dict.fromkeys((*of_prompts, *of_turns)):
        try:
            with (folder / name).open("rb") as file:
                content = file.read(LONGEST_IMAGE + 1)
        except OSError:
            continue
        if content[:4] != b"RIFF" or content[8:12] != b"WEBP" or len(content) > LONGEST_IMAGE:
            continue
        uri = f"data:image/webp;base64,{base64.b64encode(content).decode()}"
        left -= len(uri)
        if left < 0:
            break
        found[name] = uri
    return found


def number(value: Any) -> Any:
    """`value` if it is a finite number, else None."""
    finite = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if finite else None


def numbers(entry: Entry) -> Entry:
    """A line of eval.jsonl with whatever should be a number and is not left out."""
    return {key: value for key, value in entry.items() if not key.startswith("eval") or number(value) is not None}


def read_config_file(path: Path) -> Entry:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def read_summary(path: Path) -> Entry:
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return summary if isinstance(summary, dict) else {}


# Completions


def spread_evenly(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of `items` in their order: the first, the last, and evenly between them."""
    if len(items) <= count:
        return list(items)
    return [items[round(index * (len(items) - 1) / (count - 1))] for index in range(count)]


def sampled_groups(files: Mapping[int, Path], kind: str, most_steps: int, share: float = 1.0) -> list[Entry]:
    """Groups of completions from some of `files`, a step's first groups first, within the report's size.

    Each is a dict of "kind", "step", "prompt" (chat messages as {"role", "text"}), "answer", "task" and "samples",
    the best first; a text is {"text", "tail", "omitted"} where it was cut, {"text"} where not.
    """
    chosen = spread_evenly(list(files.items()), most_steps)
    by_step = [step_groups(path, kind, step, share * CHARACTERS / len(chosen)) for step, path in chosen]
    size = sum(len(json.dumps(groups, ensure_ascii=False)) for groups in by_step)
    if size > share * CHARACTERS:
        by_step = spread_evenly(by_step, max(int(len(by_step) * share * CHARACTERS / size), 2))
    return [group for groups in by_step for group in groups]


def step_groups(path: Path, kind: str, step: int, characters: float) -> list[Entry]:
    """The first groups in `path`, at least one, and no more than have so many characters."""
    groups: list[Entry] = []
    for line in read_entries(path):
        entry = reduced_group(line, kind, step)
        if entry is None:
            continue
        characters -= len(json.dumps(entry, ensure_ascii=False))
        if characters < 0 and groups:
            break
        groups.append(entry)
    return groups


def reduced_group(group: Entry, kind: str, step: int) -> Entry | None:
    """One line of a completions file, cut to size; None for one without samples."""
    samples = [sample for sample in group.get("samples") or () if isinstance(sample, dict)]
    if not samples:
        return None
    ranked = sorted(samples, key=lambda sample: -(value if (value := rewarded(sample)) is not None else -math.inf))
    prompt = group.get("prompt")
    messages = prompt if isinstance(prompt, list) else [{"role": "", "content": prompt}]
    answer, task = group.get("answer"), group.get("task")
    names = image_names(group.get("images"))
    return {
        "kind": kind,
        "step": step,
        "prompt": [
            {"role": printable(str(message.get("role", ""))), **cut(said(message.get("content")))}
            for message in messages
            if isinstance(message, dict)
        ],
        "answer": None if answer is None else cut(answer),
        "task": None if task is None else printable(str(task)),
        "count": len(samples),
        "mean": mean([value for sample in samples if (value := rewarded(sample)) is not None]),
        "samples": [reduced_sample(sample) for sample in spread_evenly(ranked, GROUP_SAMPLES)],
        **({"images": names} if names else {}),
    }


def image_names(value: Any) -> list[str]:
    """Those of the first GROUP_IMAGES entries of `value` that are names of previews."""
    names = [name for name in value if isinstance(name, str)] if isinstance(value, list) else []
    return [name for name in names[:GROUP_IMAGES] if IMAGE_NAME.fullmatch(name)]


def said(content: Any) -> Any:
    """What a message says, without its images."""
    return content_text(content) if isinstance(content, list) else content


def reduced_sample(sample: Entry) -> Entry:
    scores = sample.get("rewards")
    extracted = sample.get("extracted")
    return {
        **cut(sample.get("text")),
        "reward": rounded(rewarded(sample)),
        "rewards": {
            printable(str(name)): rounded(number(value))
            for name, value in (scores if isinstance(scores, dict) else {}).items()
        },
        "extracted": None if extracted is None else cut(extracted)["text"],
        "tokens": number(sample.get("tokens")),
        "truncated": sample.get("finish_reason") == "length",
        **({"turns": reduced_turns(sample["turns"])} if isinstance(sample.get("turns"), list) else {}),
    }


def reduced_turns(turns: Sequence[Any]) -> list[Entry]:
    """An episode's turns, cut to size: {"role", "sampled", "reward", "calls"} and a text each.

    Of a long one the middle is left out; an entry with "left_out" turns stands there.
    """
    kept = [reduced_turn(turn) for turn in turns if isinstance(turn, dict)]
    more = len(kept) - EPISODE_TURNS
    if more <= 0:
        return kept
    half = EPISODE_TURNS // 2
    return [*kept[:half], {**reduced_turn({}), "left_out": more}, *kept[half + more :]]


def reduced_turn(turn: Entry) -> Entry:
    calls, names = turn.get("calls"), image_names(turn.get("images"))
    return {
        "role": printable(str(turn.get("role", ""))),
        "sampled": bool(turn.get("sampled")),
        "reward": rounded(number(turn.get("reward"))),
        "calls": [cut(json.dumps(call, ensure_ascii=False)) for call in (calls if isinstance(calls, list) else ())],
        **cut(turn.get("text")),
        **({"images": names} if names else {}),
    }


def rewarded(sample: Entry) -> float | None:
    return number(sample.get("reward"))


def cut(value: Any) -> Entry:
    """Text that a browser shows as it is, with the middle of a long one left out."""
    text = printable(str(value))
    if len(text) <= HEAD + TAIL:
        return {"text": text}
    return {"text": text[:HEAD], "tail": text[-TAIL:], "omitted": len(text) - HEAD - TAIL}


def improvements(groups: Sequence[Entry], most: int = 40) -> list[Entry]:
    """Prompts that were sampled at two steps or more, by how much their mean reward rose: {"first", "last", "change"}.

    "first" and "last" are places in `groups`. Prompts of training and of evaluation are compared apart.
    """
    seen: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        if group["mean"] is not None:
            asked = (group["prompt"], group.get("images"))
            key = json.dumps([group.get("run"), group["kind"], group["task"], *asked])
            seen.setdefault(key, []).append(index)
    entries: list[Entry] = []
    for indices in seen.values():
        first, last = min(indices, key=lambda p: groups[p]["step"]), max(indices, key=lambda p: groups[p]["step"])
        if groups[first]["step"] < groups[last]["step"]:
            change = groups[last]["mean"] - groups[first]["mean"]
            entries.append({"first": first, "last": last, "change": rounded(change)})
    # Those that fell are shown too, last: what was unlearned is worth a look.
    ranked = sorted(entries, key=lambda entry: -entry["change"])
    return ranked if len(ranked) <= most else [*ranked[: most - most // 4], *ranked[-(most // 4) :]]


# Numbers


def mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def rounded(value: float | None, digits: int = 5) -> float | None:
    """`value` to so many significant digits, which is what a page shows."""
    return None if value is None else float(f"{value:.{digits}g}")


def flattened(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("section.key", value) of nested tables; a list of tables is numbered where it has several."""
    for key, value in table.items():
        path = f"{prefix}{key}"
        tables = isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value)
        if isinstance(value, dict) and value:
            yield from flattened(value, f"{path}.")
        elif tables:
            for index, entry in enumerate(value):
                yield from flattened(entry, f"{path}.{index}." if len(value) > 1 else f"{path}.")
        else:
            yield path, value
