"""A report as a parser finds it, and copies of run folders."""

from __future__ import annotations

import html.parser
import json
from pathlib import Path
from typing import Any

from grpo.report.page import write_report


class Page(html.parser.HTMLParser):
    """Elements, scripts and text of an HTML file, as a parser finds them."""

    def __init__(self, file: Path):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts.append(data)
        elif self._inside != "style":
            self.text += data

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.scripts[0])

    def charts(self) -> dict[str, dict[str, Any]]:
        return {chart["title"]: chart for section in self.data["sections"] for chart in section["charts"]}


def page_of(*folders: Path, out: Path) -> Page:
    write_report(folders, out)
    return Page(out)


def copied(run: Path, folder: Path) -> Path:
    folder.mkdir(parents=True)
    for path in run.rglob("*"):
        if path.is_file():
            (folder / path.relative_to(run)).parent.mkdir(parents=True, exist_ok=True)
            (folder / path.relative_to(run)).write_bytes(path.read_bytes())
    return folder
