"""`python -m grpo.doctor` says what a run would fail at, in the run's own words, before there is one."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest

from grpo import doctor
from grpo.run.machine import engine_problem, gpu_problem


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = doctor.main(arguments)
    return code, capsys.readouterr().out


def test_a_machine_that_is_ready_has_a_line_for_everything(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = printed(capsys, "--device", "cpu")
    assert code == 0 and "ready" in text and "!!" not in text
    for topic in ("grpo", "device", "vLLM", "packages", "C compiler", "host", "models", "runs"):
        assert f"ok  {topic}" in text or f"?   {topic}" in text


@pytest.mark.skipif(gpu_problem() is None, reason="there is a GPU")
def test_what_a_run_would_be_refused_for_is_said_in_the_same_words(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = printed(capsys, "--device", "cuda")
    assert code == 2 and "to mend first: driver, vLLM" in text
    assert f"-> {gpu_problem()}" in text and f"-> {engine_problem('cuda')}" in text


class Disk(NamedTuple):
    free: float


@pytest.mark.parametrize(
    ("name", "value", "words", "code"),
    [
        ("version_of", lambda name: None if name == "peft" else "1.0", "missing: peft", 2),
        ("version_of", lambda name: "0.0.1" if name == "peft" else "1.0", "peft 0.0.1 (tested: ", 0),
        ("engine_problem", lambda device: "vLLM is unwell; mend it", "-> vLLM is unwell; mend it", 2),
        ("hardware", lambda: {"memory_gib": 3.5, "cores": 1, "cpu": "x"}, "under 8 GiB only small models", 0),
    ],
    ids=["missing", "untested", "engine", "memory"],
)
def test_what_a_run_needs_is_to_mend_and_the_rest_is_advice(
    name: str, value: Any, words: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, name, value)
    found, text = printed(capsys, "--device", "cpu")
    assert (found, words in text) == (code, True), text


def test_a_full_disk_is_advice(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: Disk(3e9))
    code, text = printed(capsys, "--device", "cpu")
    assert code == 0 and text.count("less than 10 GB are free") == 2 and "3 GB free" in text


@pytest.fixture
def local_hub() -> Iterator[str]:
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def test_the_hub_is_asked_only_on_request_and_its_silence_is_advice(
    local_hub: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", local_hub)
    assert "hub" not in printed(capsys, "--device", "cpu")[1].split()
    code, text = printed(capsys, "--device", "cpu", "--online")
    assert code == 0 and f"ok  hub            {local_hub} answers" in text
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    code, text = printed(capsys, "--device", "cpu", "--online")
    assert code == 0 and "127.0.0.1:9 does not answer" in text
