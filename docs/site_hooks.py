"""What the site needs beyond the pages of docs/: the README as its first page, and links that leave docs/.

A link to a file outside docs/ gets a copy of that file; one to a folder becomes plain text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\[([^\]]*)\]\((\.\./[^)#]+)(#[^)]*)?\)")
FILES = "files"
"""Folder of the site with copies of what pages link to outside docs/."""


def on_files(files: Files, config: Any) -> Files:
    """Add the first page, and a copy of every file outside docs/ that a page links to."""
    files.append(File.generated(config, "index.md", content=first_page()))
    pages = [file.content_string for file in files.documentation_pages()]
    linked = {match[2].removeprefix("../") for page in pages for match in LINK.finditer(page)}
    for path in sorted(linked):
        if (ROOT / path).is_file():
            files.append(File.generated(config, f"{FILES}/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point links that leave docs/ to the copies."""
    return LINK.sub(mended, markdown)


def mended(match: re.Match[str]) -> str:
    text, path, anchor = match[1], match[2].removeprefix("../"), match[3] or ""
    if not (ROOT / path).is_file():
        return text
    anchor = "" if path.endswith(".md") else anchor
    return f"[{text}]({FILES}/{path}{anchor})"


def first_page() -> str:
    """The README, whose links are those of the repository's root."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    inside = re.sub(r"\]\(docs/", "](", readme)
    return re.sub(r"\]\((?!https?:|#|mailto:)([\w./-]+)\)", outside_docs, inside)


def outside_docs(match: re.Match[str]) -> str:
    path = match[1]
    return match[0] if (ROOT / "docs" / path).exists() else f"](../{path})"
