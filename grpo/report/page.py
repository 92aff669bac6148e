"""The report of a run as one HTML file without any network: written while the run goes on, and on the command line.

    python -m grpo.report runs/mine                        # writes runs/mine/report.html anew
    python -m grpo.report runs/a runs/b --out compare.html # curves over each other, differing settings, final figures

A report is a function of the run folder alone. What a model wrote is data in it, never markup: it is JSON that cannot
end its script element, read by a script that makes text nodes, under a policy that allows nothing but this file's own
style and scripts. Reading is `grpo.report.data`'s, the choice of charts `grpo.report.charts`'.
"""

from __future__ import annotations

import base64
import datetime
import functools
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from grpo.printable import printable
from grpo.report.alarms import watch_of
from grpo.report.charts import sections, time_shares
from grpo.report.data import RunData, flattened, improvements, mean, read_run
from grpo.report.findings import findings
from grpo.run.checkpoint import write_atomically
from grpo.run.records import REPORT, json_line
from grpo.version import __version__

TEMPLATES = Path(__file__).parent / "templates"
SCRIPTS = ("charts.js", "completions.js", "report.js")
WATCH = "watch.js"
"""The script of a page that a server keeps current."""
COMPARISON = Path("comparison.html")
TIME_SHARE = 0.01
"""Of a run's time, what writing its report may take."""
ENDS = 5  # steps that "last" is a mean over, as in the summary
TITLES = {"alarms": "Alarms", "findings": "Suggestions", "final": "Final figures", "differences": "Differences"}
SHORT = {"evaluation": "Held out", "agreement": "Agreement", "time": "Time", "more": "More"}
"""What the navigation calls sections with longer titles, so that it fits one line."""

Page = dict[str, Any]


class LiveReport:
    """Keeps `report.html` of a running run current, in at most `TIME_SHARE` of the time.

    The first step is reported at once; after that a report waits until the last one's cost is small beside the time
    since. `clock`: seconds.
    """

    def __init__(self, run_folder: Path, notice: Callable[[str], None], clock: Callable[[], float] = time.perf_counter):
        self._folder, self._notice, self._clock = run_folder, notice, clock
        self._not_before = -float("inf")
        self._pending: int | None = None
        self._failed = False

    def update(self, max_steps: int) -> None:
        """There is something new; write it if it is time."""
        self._pending = max_steps
        if self._clock() >= self._not_before:
            self.flush()

    def flush(self) -> None:
        """Write what is not written yet. A failure is printed once and never ends the run."""
        if self._pending is None or self._failed:
            return
        started = self._clock()
        try:
            write_report([self._folder], self._folder / REPORT, max_steps=self._pending or None)
        except Exception as error:
            self._failed = True
            self._notice(f"{REPORT} cannot be written ({type(error).__name__}: {error}); the run goes on without it")
        self._pending = None
        ended = self._clock()
        self._not_before = ended + (ended - started) * (1 / TIME_SHARE - 1)


def write_report(folders: Sequence[Path], out: Path, *, max_steps: int | None = None) -> None:
    """Write the report of a run, or of several compared, to the file `out`.

    `max_steps`: of a single run, where its configuration does not say. Raises UserError for a folder that is not a
    run's, and OSError.
    """
    runs = [read_run(folder, max_steps, share=1 / len(folders)) for folder in folders]
    number_equal_names(runs, folders)
    write_atomically(out, render(runs).encode())


def number_equal_names(runs: Sequence[RunData], folders: Sequence[Path]) -> None:
    """Give runs of one name their parent folder's as well, or else a number."""
    for wider in (lambda index: f"{folders[index].resolve().parent.name}/{runs[index].name}", lambda n: str(n + 1)):
        names = [run.name for run in runs]
        if len(set(names)) == len(names):
            return
        for index, run in enumerate(runs):
            run.name = printable(wider(index)) if names.count(names[index]) > 1 else run.name


# The page


@functools.cache
def template(name: str = "report.html.jinja") -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def render(runs: Sequence[RunData], tag: str = "") -> str:
    """The whole file. `tag`: of a page that a server watches, what its contents are known by."""
    style = text_of("report.css")
    scripts = [text_of(name) for name in (*SCRIPTS, *((WATCH,) if tag else ()))]
    drawn = sections(runs)
    return template().render(
        **page(runs, drawn),
        policy=policy(style, scripts, server=bool(tag)),
        tag=tag,
        style=Markup(style),
        scripts=[Markup(script) for script in scripts],
        data=Markup(script_json(data(runs, drawn))),
        version=__version__,
    )


def text_of(name: str) -> str:
    """A file of templates/."""
    return (TEMPLATES / name).read_text(encoding="utf-8")


def policy(style: str, scripts: Sequence[str], *, server: bool = False) -> str:
    """A Content-Security-Policy under which nothing is loaded and only these texts style or run.

    server: and where the page's own server may be asked for it again.
    """

    def digest(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    allowed = " ".join(map(digest, scripts))
    own = "'self'" if server else "'none'"
    return (
        f"default-src 'none'; img-src data:; style-src {digest(style)}; script-src {allowed}; base-uri 'none'; "
        f"form-action {own}; connect-src {own}"
    )


def script_json(value: Any) -> str:
    """JSON that no HTML parser sees an end or a comment in, whatever the texts in it are."""
    text = json_line(value, compact=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def data(runs: Sequence[RunData], drawn: list[Page]) -> Page:
    """What the scripts draw."""
    one = len(runs) == 1
    groups = [group if one else {"run": run.name, **group} for run in runs for group in run.groups]
    return {
        "sections": drawn,
        "groups": groups,
        "images": {name: uri for run in runs for name, uri in run.images.items()},
        "improved": improvements(groups),
        "end": None if one and runs[0].finished else max((run.max_steps or 0 for run in runs), default=0),
    }


def page(runs: Sequence[RunData], drawn: list[Page]) -> Page:
    """What the template fills in."""
    one = len(runs) == 1
    run = runs[0]
    now = datetime.datetime.now().astimezone()
    made: Page = {
        "one": one,
        "title": run.name if one else f"{len(runs)} runs compared",
        "subtitle": described(run) if one else ", ".join(each.name for each in runs),
        "state": state(run) if one else "",
        "live": one and not run.finished,
        "tiles": tiles(run) if one else [],
        "alarms": alarms(run) if one else [],
        "findings": findings(run, {alarm.name for alarm in watch_of(run).raised}) if one else [],
        "final": None if one else final_figures(runs),
        "differences": None if one else differences(runs),
        "sections": [{"id": section["id"], "title": section["title"]} for section in drawn],
        "accuracies": accuracy_table(runs),
        "time_bars": [bar for each in runs if (bar := time_bar(each, named=not one))],
        "has_completions": any(each.groups for each in runs),
        "settings": settings(run) if one else [],
        "written": {"iso": now.isoformat(timespec="seconds"), "text": now.strftime("%Y-%m-%d %H:%M:%S %Z")},
    }
    return made | {"contents": contents(made)}


def alarms(run: RunData) -> list[Page]:
    """Those that were raised, the ones that stand first."""
    watch = watch_of(run)
    standing = [on.alarm for on in watch.standing.values()]
    made = [
        {"title": alarm.title, "text": alarm.said, "step": f"{alarm.step:,}", "stands": alarm in standing}
        for alarm in watch.raised
    ]
    return sorted(made, key=lambda entry: not entry["stands"])


def contents(made: Page) -> list[dict[str, str]]:
    """The sections of the page in their order, for its navigation."""
    listed = [{"id": name, "title": title} for name, title in TITLES.items() if made[name]]
    listed += [{**section, "title": SHORT.get(section["id"], section["title"])} for section in made["sections"]]
    if made["has_completions"]:
        listed.append({"id": "completions", "title": "Samples"})
    return [*listed, {"id": "settings", "title": "Settings"}] if made["one"] else listed


def described(run: RunData) -> str:
    """The model and the tasks."""
    tasks = run.config.get("task") or []
    names = [str(table.get("name", "")) for table in (tasks if isinstance(tasks, list) else [tasks])]
    return printable(" · ".join(filter(None, [str(run.setting("model", "name") or ""), ", ".join(names)])))


def state(run: RunData) -> str:
    done = run.steps[-1] if run.steps else 0
    steps = f"step {done:,} of {run.max_steps:,}" if run.max_steps else f"step {done:,}"
    return f"finished, {done:,} steps" if run.finished else steps


# Figures


def tiles(run: RunData) -> list[dict[str, str]]:
    """The figures at the top."""
    made = []
    if rewards := run.known("reward"):
        first, last = mean(rewards[:ENDS]), mean(rewards[-ENDS:])
        made.append(tile("reward", figure(last), f"last {ENDS} steps; first {ENDS}: {figure(first)}"))
    if run.evaluations and "eval/strict_accuracy" in run.evaluations[-1]:
        before, after = run.evaluations[0], run.evaluations[-1]
        text = accuracy(after, "eval/strict_accuracy")
        detail = f"{text['interval']}; step {before['step']}: {accuracy(before, 'eval/strict_accuracy')['value']}"
        made.append(tile("held-out accuracy", text["value"], detail))
    if losses := [entry["eval/loss"] for entry in run.evaluations if "eval/loss" in entry]:
        detail = f"lowest {figure(min(losses))}, at first {figure(losses[0])}"
        made.append(tile("held-out loss", figure(losses[-1]), detail))
    if seconds := run.known("step_seconds"):
        recent = mean(seconds[-20:]) or 0.0
        left = (run.max_steps or 0) - run.steps[-1]
        detail = f"{figure(recent)} s a step" + (f", {duration(left * recent)} left" if left > 0 else "")
        made.append(tile("time", duration(sum(seconds)), detail))
    if speed := run.known("tokens_per_second"):
        made.append(tile("sampling", f"{mean(speed[-20:]):,.0f} tokens/s", "last 20 steps"))
    if memory := run.known("peak_memory_gib"):
        made.append(tile("peak memory", f"{memory[-1]:.1f} GiB", "so far" if not run.finished else ""))
    return made


def tile(label: str, value: str, detail: str) -> dict[str, str]:
    return {"label": label, "value": value, "detail": detail}


def figure(value: float | None) -> str:
    return "none" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def duration(seconds: float) -> str:
    """Two units at most: "1 h 12 min", "45 s"."""
    whole = round(seconds)
    parts = ((whole // 86400, "d"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "min"), (whole % 60, "s"))
    start = next((index for index, (count, _) in enumerate(parts) if count), len(parts) - 1)
    return " ".join(f"{count} {unit}" for count, unit in parts[start : start + 2] if count or start == 3) or "0 s"


def accuracy(entry: Mapping[str, Any], key: str) -> dict[str, str]:
    """A share as a percentage, with its interval where there is one."""
    if key not in entry:
        return {"value": "", "interval": ""}
    low, high = entry.get(f"{key}/low"), entry.get(f"{key}/high")
    interval = "" if low is None or high is None else f"[{100 * low:.1f}, {100 * high:.1f}]"
    return {"value": f"{100 * entry[key]:.1f} %", "interval": interval}


def accuracy_table(runs: Sequence[RunData]) -> Page | None:
    """Every evaluation of a single run with those made afterwards, or the last one of each of several."""
    rows = []
    for run in runs:
        if len(runs) > 1:
            rows += [(run.name, entry) for entry in run.evaluations[-1:]]
            continue
        rows += [(f"step {entry['step']}", entry) for entry in run.evaluations]
        rows += [(f"afterwards: {check_name(entry)}", entry) for entry in run.checks]
    keys = dict.fromkeys(key for _, entry in rows for key in entry if is_accuracy(key))
    if not keys:
        return None
    return {
        "first": "after" if len(runs) == 1 else "run, last evaluation",
        "columns": [key.removeprefix("eval/").replace("_", " ") for key in keys],
        "rows": [{"name": name, "cells": [accuracy(entry, key) for key in keys]} for name, entry in rows],
    }


def is_accuracy(key: str) -> bool:
    """pass@1 is the accuracy under another name."""
    name = key.rpartition("/")[2]
    return key.startswith("eval/") and (name.endswith("_accuracy") or ("pass@" in name and not name.endswith("pass@1")))


def check_name(entry: Mapping[str, Any]) -> str:
    """Of an evaluation by `python -m grpo.evaluate`: what was asked, with or without the adapter."""
    tasks = entry.get("tasks")
    asked = ", ".join(map(str, tasks)) if isinstance(tasks, list) else ""
    return printable(f"{asked} {'model alone' if entry.get('adapter') is None else 'with adapter'}".strip())


def time_bar(run: RunData, *, named: bool) -> Page | None:
    """One stacked bar of where the run's time went; positions are per cent."""
    parts, at = [], 0.0
    for part in time_shares(run):
        width = 100 * part["share"]
        share, spent = f"{width:.1f} %", duration(part["seconds"])
        bar = {"x": round(at, 3), "width": round(width, 3), "colour": part["colour"]}
        parts.append({**bar, "label": part["label"], "share": share, "time": spent})
        at += width
    if not parts:
        return None
    total = duration(sum(part["seconds"] for part in time_shares(run)))
    description = ", ".join(f"{part['label']} {part['share']}" for part in parts)
    return {"name": run.name if named else "", "total": total, "parts": parts, "description": description}


def final_figures(runs: Sequence[RunData]) -> Page:
    """One row a run."""
    functions = dict.fromkeys(name for run in runs for name in run.rewards)
    columns = ["steps", f"reward, last {ENDS}", "change", *functions, "held-out accuracy", "time", "tokens/s", "GiB"]
    rows = []
    for colour, run in enumerate(runs):
        rewards = run.known("reward")
        first, last = mean(rewards[:ENDS]), mean(rewards[-ENDS:])
        change = "" if first is None or last is None else f"{last - first:+.3g}"
        held_out = accuracy(run.evaluations[-1] if run.evaluations else {}, "eval/strict_accuracy")
        speed, memory = run.known("tokens_per_second"), run.known("peak_memory_gib")
        cells = [
            f"{run.steps[-1]:,}" if run.steps else "0",
            figure(last),
            change,
            *(figure(mean(run.known(f"rewards/{name}")[-ENDS:])) for name in functions),
            f"{held_out['value']} {held_out['interval']}".strip(),
            duration(sum(run.known("step_seconds"))),
            f"{mean(speed):,.0f}" if speed else "",
            f"{memory[-1]:.1f}" if memory else "",
        ]
        rows.append({"name": run.name, "colour": colour, "cells": cells})
    return {"columns": columns, "rows": rows}


def differences(runs: Sequence[RunData]) -> Page:
    """The settings that are not the same in all runs, the run folder left out."""
    flat = [dict(flattened(run.config)) for run in runs]
    keys = [key for key in dict.fromkeys(key for values in flat for key in values) if key != "checkpoint.output_dir"]
    missing = object()
    differing = [key for key in keys if any(values.get(key, missing) != flat[0].get(key, missing) for values in flat)]
    return {
        "columns": [run.name for run in runs],
        "rows": [{"name": printable(key), "cells": [setting(values, key) for values in flat]} for key in differing],
    }


def setting(values: Mapping[str, Any], key: str) -> str:
    return printable(json.dumps(values[key], ensure_ascii=False, default=str)) if key in values else "not set"


def settings(run: RunData) -> list[tuple[str, str]]:
    """Every setting, then versions and hardware."""
    tables = {name: run.summary[name] for name in ("versions", "hardware") if isinstance(run.summary.get(name), dict)}
    values = dict(flattened({**run.config, **tables}))
    return [(printable(key), setting(values, key)) for key in values]
