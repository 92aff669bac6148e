"""The report shows images of prompts and turns: scaled, within the file, a bounded number, and nothing else as one."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as pil
from rich.console import Console

from grpo.config.schema import config_toml
from grpo.images import PREVIEW, preview_name, read_image
from grpo.monitor.run_log import RunLog
from grpo.report.data import IMAGE_CHARACTERS, LONGEST_IMAGE, improvements, read_run
from grpo.report.page import write_report
from grpo.run.checkpoint import CONFIG
from grpo.run.samples import Sample, SampleGroup
from tests.helpers.browser import Browser, installed, started
from tests.helpers.pictures import noise
from tests.helpers.report_run import metrics, run_config

PROGRAM = installed()
in_browser = pytest.mark.skipif(PROGRAM is None, reason="no Chromium: apt-get install chromium-headless-shell")
LARGE, SMALL, OTHER = (read_image(noise(*size, seed=1), "row 1") for size in ((800, 500), (90, 60), (60, 90)))
LOOKS: dict[str, dict[str, Any]] = {"light": {}, "dark": {"dark": True}, "phone": {"width": 390, "height": 844}}


def asked(count: int) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*[{"type": "image"}] * count, {"type": "text", "text": "How many circles?"}]}]


def write(folder: Path, *images: Any, steps: int = 2) -> Path:
    config = run_config(folder, train={"max_steps": steps}, log={"samples_every": 1})
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(config_toml(config))
    with RunLog(folder, config, max_steps=steps, console=Console(file=io.StringIO())) as log:
        for step in range(1, steps + 1):
            log.step(metrics(step, steps))
            samples = [Sample(f"{member} circles", float(member * step), {"exact": 1.0}) for member in range(3)]
            groups = [SampleGroup(asked(len(seen)), "3", samples, "shapes", seen) for seen in images]
            log.samples(step, groups)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("report") / "mine", (LARGE, SMALL), (OTHER,))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert PROGRAM is not None
    with started(PROGRAM, tmp_path_factory.mktemp("browser")) as browser:
        yield browser


def test_a_run_keeps_its_images_small_and_once(run: Path) -> None:
    kept = {path.name: pil.open(path).size for path in (run / "completions" / "images").iterdir()}
    assert kept == {
        preview_name(LARGE.digest): (PREVIEW, 240),
        preview_name(SMALL.digest): (90, 60),
        preview_name(OTHER.digest): (60, 90),
    }
    line = json.loads((run / "completions" / "step-1.jsonl").read_text().splitlines()[0])
    assert line["images"] == [preview_name(LARGE.digest), preview_name(SMALL.digest)] and line["prompt"] == asked(2)
    assert SampleGroup(asked(2), "3", [], images=(LARGE, SMALL)).question == "How many circles? [2 images]"


def test_prompts_of_equal_words_and_other_images_are_not_compared(run: Path) -> None:
    groups = read_run(run).groups
    pairs = [{groups[one[end]]["images"][0] for end in ("first", "last")} for one in improvements(groups)]
    assert len(pairs) == 2 and all(len(pair) == 1 for pair in pairs)


def test_a_report_holds_no_more_images_than_it_may_and_no_other_files(tmp_path: Path) -> None:
    folder = write(tmp_path / "mine", (LARGE, SMALL), (OTHER,))
    images = folder / "completions" / "images"
    (images / preview_name(LARGE.digest)).write_bytes(b"<svg onload=alert(1)>")
    (images / preview_name(OTHER.digest)).write_bytes(b"RIFF    WEBP" + bytes(LONGEST_IMAGE))
    secret = f"data:image/webp;base64,{base64.b64encode((images / preview_name(SMALL.digest)).read_bytes()).decode()}"
    lines = (folder / "completions" / "step-2.jsonl").read_text().splitlines()
    hostile = {**json.loads(lines[0]), "images": ["../../config.toml", "x' onerror='1", 3, preview_name(SMALL.digest)]}
    (folder / "completions" / "step-2.jsonl").write_text(json.dumps(hostile) + "\n")
    found = read_run(folder)
    assert found.images == {preview_name(SMALL.digest): secret}
    assert [group["images"] for group in found.groups if group["step"] == 2] == [[preview_name(SMALL.digest)]]
    many = [
        preview_name(LARGE.digest).replace(preview_name(LARGE.digest)[:6], f"{number:06x}") for number in range(400)
    ]
    for name in many:
        (images / name).write_bytes(b"RIFF    WEBP" + bytes(20_000))
    hostile["images"] = many[:8]
    lines = [json.dumps({**hostile, "images": many[start : start + 8]}) for start in range(0, 400, 8)]
    (folder / "completions" / "step-2.jsonl").write_text("\n".join(lines) + "\n")
    assert 50 < len(read_run(folder).images) < 400
    assert sum(map(len, read_run(folder).images.values())) <= IMAGE_CHARACTERS


@in_browser
@pytest.mark.parametrize("look", LOOKS)
def test_images_stand_beside_the_completions(browser: Browser, run: Path, look: str) -> None:
    browser.open(run / "report.html", **LOOKS[look])
    browser.run("(document.querySelector('input[value=groups]').click(), 1)")
    browser.settle()
    shown = browser.run(
        "[...document.querySelectorAll('.pictures')].map(p => [...p.querySelectorAll('img')].map(i => "
        "[i.naturalWidth, i.naturalHeight, i.alt, i.getBoundingClientRect().width <= p.clientWidth, "
        "Math.abs(i.clientWidth / i.clientHeight - i.naturalWidth / i.naturalHeight) < 0.05]))"
    )
    first = [[PREVIEW, 240, "image 1 of 2", True, True], [90, 60, "image 2 of 2", True, True]]
    assert shown == [first, [[60, 90, "image of the prompt", True, True]]] * 2
    assert browser.complaints() == []
    assert {address for address in browser.requests() if not address.startswith("data:image/webp;base64,")} == {
        (run / "report.html").as_uri()
    }
    assert browser.run("document.documentElement.scrollWidth") <= LOOKS[look].get("width", 1280)
    if folder := os.environ.get("GRPO_REPORT_PICTURES"):
        browser.picture(Path(folder) / f"images-{look}.png")


@in_browser
def test_an_image_that_is_not_kept_is_named(browser: Browser, tmp_path: Path) -> None:
    folder = write(tmp_path / "mine", (SMALL,))
    (folder / "completions" / "images" / preview_name(SMALL.digest)).unlink()
    write_report([folder], folder / "report.html")
    browser.open(folder / "report.html")
    assert browser.run("document.querySelector('.pictures').textContent") == "(image of the prompt, not kept here)"


# Of turns


def write_turns(folder: Path, *, kept: tuple[Any, ...] = (LARGE, SMALL)) -> Path:
    """A run of two steps whose episodes are shown LARGE by a tool, and then SMALL and OTHER by a user."""
    config = run_config(folder, train={"max_steps": 2}, log={"samples_every": 1})
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(config_toml(config))
    seen = {"tool": (LARGE,), "user": (SMALL, OTHER)}
    turns: list[dict[str, Any]] = [{"role": "assistant", "text": "Show me.", "calls": [], "sampled": True}]
    for role, images in seen.items():
        names = [preview_name(image.digest) for image in images]
        turns.append({"role": role, "text": "[image]" * len(names), "calls": [], "sampled": False, "images": names})
    previews = {preview_name(image.digest): base64.b64encode(image.preview()).decode() for image in kept}
    with RunLog(folder, config, max_steps=2, console=Console(file=io.StringIO())) as log:
        for step in (1, 2):
            log.step(metrics(step, 2))
            samples = [Sample("Three.", float(step), {"exact": 1.0}, turns=turns, previews=previews)]
            log.samples(step, [SampleGroup([{"role": "user", "content": "How many?"}], "3", samples, "shapes")])
    return folder


def test_images_of_turns_are_kept_beside_the_log_and_bounded(tmp_path: Path) -> None:
    folder = write_turns(tmp_path / "mine")
    images = folder / "completions" / "images"
    assert {path.name for path in images.iterdir()} == {preview_name(LARGE.digest), preview_name(SMALL.digest)}
    file = folder / "completions" / "step-2.jsonl"
    line = json.loads(file.read_text())
    assert "previews" not in line["samples"][0]
    assert set(read_run(folder).images) == {path.name for path in images.iterdir()}
    for turn in line["samples"][0]["turns"]:
        turn["images"] = ["../../config.toml", "x' onerror='1", 3, preview_name(SMALL.digest), *["a"] * 20]
    (folder / "completions" / "step-1.jsonl").unlink()
    file.write_text(json.dumps(line) + "\n")
    found = read_run(folder)
    assert list(found.images) == [preview_name(SMALL.digest)]
    assert found.groups[0]["samples"][0]["turns"][0]["images"] == [preview_name(SMALL.digest)]
    line["samples"][0]["turns"] = [{"images": value} for value in (None, "x", {}, 3, [[]])]
    file.write_text(json.dumps(line) + "\n")
    assert read_run(folder).images == {}


@in_browser
@pytest.mark.parametrize("look", LOOKS)
def test_images_stand_in_the_turns_that_showed_them(browser: Browser, tmp_path: Path, look: str) -> None:
    folder = write_turns(tmp_path / "mine")
    browser.open(folder / "report.html", **LOOKS[look])
    browser.run("(document.querySelector('input[value=groups]').click(), 1)")
    browser.settle()
    shown = browser.run(
        "[...document.querySelectorAll('.turn')].map(turn => [turn.querySelector('i').textContent, "
        "[...turn.querySelectorAll('.pictures > *')].map(one => one.tagName === 'IMG' ? [one.naturalWidth, "
        "one.naturalHeight, one.alt, one.clientHeight <= 144, one.getBoundingClientRect().width <= turn.clientWidth, "
        "Math.abs(one.clientWidth / one.clientHeight - one.naturalWidth / one.naturalHeight) < 0.05] "
        ": one.textContent)])"
    )
    tool = [[PREVIEW, 240, "image of this turn", True, True, True]]
    user = [[90, 60, "image 1 of 2", True, True, True], "(image 2 of 2, not kept here)"]
    assert shown == [["assistant", []], ["tool", tool], ["user", user]] * 2
    assert browser.complaints() == []
    assert {address for address in browser.requests() if not address.startswith("data:image/webp;base64,")} == {
        (folder / "report.html").as_uri()
    }
    assert browser.run("document.documentElement.scrollWidth") <= LOOKS[look].get("width", 1280)
    if pictures := os.environ.get("GRPO_REPORT_PICTURES"):
        browser.picture(Path(pictures) / f"turns-{look}.png")
