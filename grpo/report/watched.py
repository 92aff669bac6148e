"""The pages of `python -m grpo.watch`: every run below a folder, each as its report, and several compared.

A page is made when it is asked for and kept until a file of its runs changes; its ETag says which state it shows. Only
run folders that were found are read, whatever an address says. Not here: the server (watch.py), the report (page.py).
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route

from grpo.errors import UserError
from grpo.printable import printable
from grpo.report.alarms import watch_of
from grpo.report.data import RunData, read_run
from grpo.report.page import WATCH, accuracy, figure, number_equal_names, policy, render, state, template, text_of
from grpo.run.checkpoint import CONFIG
from grpo.run.records import EVALUATIONS, METRICS, SUMMARY
from grpo.version import __version__

DEPTH = 3
"""Folders below the one that is watched in which runs are looked for."""
HOSTS = ("127.0.0.1", "localhost")
"""Names under which the server answers: another site's script that reaches it by a name of its own gets nothing."""
LATEST = ("completions", "checkpoints")
"""Folders of a run whose time says that there is something new in them."""
KEPT_PAGES = 8


def find_runs(root: Path) -> dict[str, Path]:
    """Name below `root` -> folder of every run in it, `root` itself included; those that changed last come first."""
    runs = {name: folder for name, folder in folders(root, DEPTH) if (folder / METRICS).is_file()}
    return dict(sorted(runs.items(), key=lambda item: (-changed(item[1]), item[0])))


def folders(root: Path, depth: int, name: str = "") -> Iterator[tuple[str, Path]]:
    """(name, folder) of `root` and of what is below it, without hidden folders and those of a run itself."""
    yield name or root.resolve().name, root
    if depth == 0 or (root / METRICS).is_file():
        return
    try:
        below = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        return
    for folder in below:
        yield from folders(folder, depth - 1, f"{name}/{folder.name}" if name else folder.name)


def changed(folder: Path) -> float:
    """When the run in `folder` last wrote something that a report shows."""
    return max(time for _, time in stamps(folder))


def stamps(folder: Path) -> Iterator[tuple[str, float]]:
    """(name, time of change) of each file and folder that a report is made from."""
    for name in (METRICS, EVALUATIONS, SUMMARY, CONFIG, *LATEST):
        try:
            status = (folder / name).stat()
        except OSError:
            continue
        yield f"{name}:{status.st_size}", status.st_mtime


class Pages:
    """What the server answers with."""

    def __init__(self, root: Path):
        self.root = root
        self._kept: dict[str, tuple[str, str]] = {}

    def app(self) -> Starlette:
        routes = [
            Route("/", self.index),
            Route("/run/{name:path}", self.run),
            Route("/compare", self.compare),
        ]
        return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=list(HOSTS))])

    def index(self, request: Request) -> Response:
        runs = find_runs(self.root)
        tag = self.tag("index", list(runs.values()))
        return self.answer(request, "/", tag, lambda: index_page(self.root, runs, tag))

    def run(self, request: Request) -> Response:
        return self.report(request, [request.path_params["name"]])

    def compare(self, request: Request) -> Response:
        return self.report(request, request.query_params.getlist("run"))

    def report(self, request: Request, names: Sequence[str]) -> Response:
        """The report of one run, or of several over each other."""
        runs = find_runs(self.root)
        unknown = [name for name in names if name not in runs]
        if unknown or not names:
            missing = printable(unknown[0]) if unknown else "none is named"
            return PlainTextResponse(f"no such run: {missing}; the runs are listed at /", 404)
        chosen = [runs[name] for name in dict.fromkeys(names)]
        tag = self.tag(",".join(names), chosen)
        return self.answer(request, str(request.url), tag, lambda: report_page(chosen, tag))

    def tag(self, name: str, chosen: Sequence[Path]) -> str:
        """What a page of `chosen` is known by: changes with any of their files."""
        text = repr((name, [(str(folder), list(stamps(folder))) for folder in chosen]))
        return f'"{hashlib.sha256(text.encode()).hexdigest()[:20]}"'

    def answer(self, request: Request, address: str, tag: str, make: Any) -> Response:
        """304 where the reader has the page, else the page, made at most once for each state."""
        headers = {"ETag": tag, "Cache-Control": "no-store"}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        if self._kept.get(address, ("", ""))[0] != tag:
            try:
                self._kept[address] = (tag, make())
            except (UserError, OSError) as error:  # a folder that is removed while it is read
                return PlainTextResponse(str(error), 404)
            while len(self._kept) > KEPT_PAGES:
                self._kept.pop(next(iter(self._kept)))
        return HTMLResponse(self._kept[address][1], headers=headers)


def report_page(chosen: Sequence[Path], tag: str) -> str:
    runs = [read_run(folder, share=1 / len(chosen)) for folder in chosen]
    number_equal_names(runs, chosen)
    return render(runs, tag)


def index_page(root: Path, runs: dict[str, Path], tag: str) -> str:
    style, script = text_of("report.css"), text_of(WATCH)
    return template("runs.html.jinja").render(
        root=printable(root.resolve().name),
        runs=[row(name, folder) for name, folder in runs.items()],
        tag=tag,
        policy=policy(style, [script], server=True),
        style=Markup(style),
        script=Markup(script),
        version=__version__,
    )


def row(name: str, folder: Path) -> dict[str, str]:
    """A run's line in the list."""
    run: RunData = read_run(folder, share=0)
    rewards = run.known("reward")
    held_out = accuracy(run.evaluations[-1], "eval/strict_accuracy")["value"] if run.evaluations else ""
    when = datetime.datetime.fromtimestamp(changed(folder)).astimezone()
    return {
        "key": printable(name),
        "state": state(run),
        "alarms": ", ".join(on.alarm.title.lower() for on in watch_of(run).standing.values()),
        "reward": figure(rewards[-1]) if rewards else "",
        "held_out": held_out,
        "changed": when.strftime("%Y-%m-%d %H:%M:%S"),
    }
