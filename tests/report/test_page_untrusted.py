"""What models and users wrote stays text in the report, and the report loads nothing."""

from __future__ import annotations

import re
from pathlib import Path

from grpo.report import page as report
from tests.helpers.report_page import Page
from tests.helpers.report_run import HOSTILE, run_config, write_run


def test_nothing_that_a_model_writes_becomes_markup(tmp_path: Path) -> None:
    clean = Page(write_run(tmp_path / "clean", 3) / "report.html")
    config = run_config(tmp_path / "hostile", task={"name": f"x.py:{HOSTILE}".replace("\ud800", "")})
    folder = write_run(tmp_path / f"hostile{'<script>'}", 3, text=HOSTILE, config=config, **{f"m{HOSTILE}": 1.0})
    page = Page(folder / "report.html")
    shape = [tag for tag, _ in clean.elements if tag not in ("tr", "th", "td", "code")]
    assert [tag for tag, _ in page.elements if tag not in ("tr", "th", "td", "code")] == shape
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    text = page.data["groups"][0]["samples"][0]["text"]
    assert text.startswith("</script><script>window.pwned=1</script>") and "\\x1b[2J" in text and "\\u202e" in text
    raw = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", raw)
    assert "&lt;script&gt;window.pwned" in raw, "the task's name is shown, escaped"


def test_the_policy_allows_this_files_own_style_and_scripts_and_nothing_else(page: Page) -> None:
    (policy,) = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None and policy.startswith("default-src 'none';") and "unsafe" not in policy
    allowed = re.findall(r"script-src ([^;]*);", policy)[0].split()
    executed = page.scripts[1:]
    assert allowed == re.findall(r"script-src ([^;]*);", report.policy("", executed))[0].split() and len(executed) == 3


def test_the_file_names_no_address_and_loads_nothing(page: Page, run: Path) -> None:
    loading = {"src", "srcset", "data", "action", "poster", "style"}
    assert not [(tag, name) for tag, attributes in page.elements for name in attributes if name in loading]
    assert not [tag for tag, _ in page.elements if tag in ("link", "iframe", "object", "img", "base")]
    links = {a["href"] for tag, a in page.elements if tag == "a"}
    assert links and all(link and link.startswith("#") for link in links)
    addresses = set(re.findall(r"https?://[\w./]+", (run / "report.html").read_text()))
    assert addresses <= {"http://www.w3.org/2000/svg"}, "the name of SVG's elements, which is never fetched"


def test_secrets_among_the_options_are_hidden(run: Path) -> None:
    assert "hunter2" in (run / "config.toml").read_text()
    raw = (run / "report.html").read_text()
    assert "hunter2" not in raw and "(not shown)" in raw
