"""Watched runs: found, listed, served on this machine alone; in a browser they grow while the reader stays in place."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from grpo.report.watched import Pages, find_runs
from grpo.run.records import METRICS
from tests.helpers.browser import Browser, installed, started
from tests.helpers.paths import ROOT
from tests.helpers.report_run import HOSTILE, metrics, write_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("watched") / "runs"
    for name in ("first", "deep/er/second"):
        write_run(root / name)
    (root / ".hidden").mkdir()
    write_run(root / ".hidden" / "third")
    (root / "nothing").mkdir()
    return root


@pytest.fixture
def client(runs: Path) -> TestClient:
    return TestClient(Pages(runs).app(), base_url="http://127.0.0.1")


def grow(folder: Path) -> int:
    """One more step; its number."""
    lines = (folder / METRICS).read_text().splitlines()
    step = json.loads(lines[-1])["step"] + 1
    (folder / METRICS).write_text("\n".join([*lines, json.dumps(metrics(step, step))]) + "\n")
    return step


def test_runs_are_found_below_a_folder_and_a_run_itself_is_one(runs: Path) -> None:
    assert set(find_runs(runs)) == {"first", "deep/er/second"}
    assert list(find_runs(runs / "first")) == ["first"]
    assert find_runs(runs / "nothing") == {}


def test_the_list_links_every_run_and_says_how_far_it_is(client: TestClient) -> None:
    page = client.get("/")
    assert page.status_code == 200
    assert 'href="/run/deep/er/second"' in page.text and 'href="/run/first"' in page.text and "finished" in page.text


def test_a_run_and_a_comparison_are_reports_that_may_ask_this_server_alone(client: TestClient) -> None:
    for address in ("/run/first", "/compare?run=first&run=deep/er/second"):
        page = client.get(address)
        assert (
            page.status_code == 200
            and "connect-src &#39;self&#39;" in page.text
            and "default-src &#39;none&#39;" in page.text
        )


@pytest.mark.parametrize(
    "address",
    ["/run/../../../etc", "/run/%2e%2e/%2e%2e/etc/passwd", "/run/nothing", "/compare", "/compare?run=x", "/x"],
)
def test_only_runs_that_were_found_are_read(client: TestClient, address: str) -> None:
    answer = client.get(address)
    assert answer.status_code == 404 and "root:" not in answer.text


@pytest.mark.parametrize("host", ["evil.example", "10.0.0.1", ""])
def test_another_name_for_this_machine_gets_nothing(client: TestClient, host: str) -> None:
    assert client.get("/", headers={"host": host}).status_code == 400


def test_a_page_that_did_not_change_is_not_sent_again(client: TestClient, runs: Path) -> None:
    for address in ("/", "/run/first"):
        tag = client.get(address).headers["etag"]
        assert client.get(address, headers={"if-none-match": tag}).status_code == 304
        grow(runs / "first")
        again = client.get(address, headers={"if-none-match": tag})
        assert again.status_code == 200 and again.headers["etag"] != tag


def test_a_run_that_is_removed_is_a_sentence(tmp_path: Path) -> None:
    client = TestClient(Pages(tmp_path).app(), base_url="http://127.0.0.1")
    assert "No run yet" in client.get("/").text
    assert client.get("/run/gone").text == "no such run: gone; the runs are listed at /"


# The command


def watching(folder: Path) -> tuple[subprocess.Popen[str], str]:
    """`python -m grpo.watch`, and the address that it prints."""
    command = [sys.executable, "-m", "grpo.watch", str(folder), "--port", "0"]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert server.stdout is not None
    line = server.stdout.readline()
    assert " at http://127.0.0.1:" in line, line + server.stdout.read()
    return server, line.split(" at ")[1].split()[0]


@pytest.fixture(scope="module")
def served(runs: Path) -> Iterator[str]:
    server, address = watching(runs)
    yield address
    server.send_signal(signal.SIGINT)
    assert server.wait(30) == 130


def test_the_command_serves_until_it_is_interrupted(served: str) -> None:
    with urllib.request.urlopen(served, timeout=30) as answer:
        assert b"Runs in runs" in answer.read()
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{served}run/none", timeout=30)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["nowhere"], "nowhere: there is no such folder; pass the one"), ([".", "--port", "99999"], "--port 99999: ")],
)
def test_what_cannot_be_served_is_a_sentence(arguments: list[str], words: str, capsys: Any) -> None:
    from grpo.watch import main

    assert main(arguments) == 2
    assert words in capsys.readouterr().err


# In a browser

PROGRAM = installed()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if PROGRAM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium-headless-shell")
    with started(PROGRAM, tmp_path_factory.mktemp("browser")) as browser:
        yield browser


def test_a_page_grows_and_the_reader_keeps_their_place(browser: Browser, served: str, runs: Path) -> None:
    browser.open(f"{served}run/first")
    browser.run(
        """(document.querySelector('#settings details').open = true,
            document.getElementById('filter').elements.text.focus(),
            document.getElementById('filter').elements.text.value = 'needle',
            document.getElementById('filter').dispatchEvent(new Event('input')),
            window.untouched = 1, scrollTo(0, 300), 1)"""
    )
    before = browser.run("document.getElementById('state').textContent")
    cards = browser.run("document.querySelectorAll('#cards > *').length")
    step = grow(runs / "first")
    browser.wait_for(f"document.getElementById('state').textContent.includes('{step}')")
    browser.settle()
    assert browser.run("document.getElementById('state').textContent") != before
    assert browser.run("window.untouched") == 1, "the page was loaded again"
    assert browser.run("document.querySelector('#settings details').open")
    assert browser.run("document.getElementById('filter').elements.text.value") == "needle"
    assert browser.run("document.activeElement.name") == "text"
    assert browser.run("document.querySelectorAll('#cards > *').length") == cards
    assert browser.run("scrollY") == 300
    assert browser.run("document.querySelectorAll('.chart .curve').length") > 3
    assert browser.run("window.pwned === undefined") and HOSTILE
    assert browser.complaints() == []
