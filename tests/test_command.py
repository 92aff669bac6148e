"""How commands end: every `python -m grpo.NAME` has the same exit codes, and says in one sentence what ended it."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from grpo.command import CommandEnd, command
from grpo.errors import UserError
from grpo.run.signals import Interrupted
from tests.helpers.paths import ROOT

ARGUMENTS = {
    "train": ["config.toml"],
    "generate": ["model", "a prompt"],
    "evaluate": ["model"],
    "export": ["run", "--to", "adapter"],
    "report": ["run"],
    "sft": ["config.toml"],
    "init": [],
    "replay": ["dump"],
    "tune": [],
    "doctor": [],
    "serve": ["model"],
    "watch": [],
}
"""A command line of every command that its parser takes; a new command needs one."""
SERVERS = {"serve", "watch"}
"""Ctrl-C is how these are ended: they say nothing then."""


def commands() -> dict[str, str]:
    """Name -> module of every file below grpo/ that is run with `python -m`."""
    found = {}
    for file in (*(ROOT / "grpo").glob("*.py"), *(ROOT / "grpo").glob("*/__main__.py")):
        if 'if __name__ == "__main__":' in file.read_text():
            inside = file.relative_to(ROOT).with_suffix("").parts
            found[inside[1]] = ".".join(inside)
    return found


COMMANDS = commands()


def ending_with(monkeypatch: pytest.MonkeyPatch, name: str, error: BaseException) -> int:
    """The exit code of a command whose work ends with `error`."""
    module = importlib.import_module(COMMANDS[name])

    def work(*_: Any) -> None:
        raise error

    monkeypatch.setattr(*((module.Job, "run") if name == "train" else (module, "run")), work)
    return module.main(ARGUMENTS[name])


def test_every_command_is_known_here_and_only_hands_its_work_on() -> None:
    assert set(COMMANDS) == set(ARGUMENTS)
    for name, module in COMMANDS.items():
        text = Path(str(importlib.import_module(module).__file__)).read_text()
        assert "return command(" in text and "except KeyboardInterrupt" not in text.split("class Talk")[0], name
        assert "sys.exit(main())" in text, name


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (UserError("rewards.py:3: no"), 2, "rewards.py:3: no"),
        (
            OSError(errno.ENOSPC, "No space left", "x/y.json"),
            2,
            "x/y.json: No space left; make room",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "x.json"),
            2,
            "x.json: Permission denied; let this user",
        ),
        (
            FileNotFoundError(errno.ENOENT, "No such file", "x.json"),
            2,
            "x.json: No such file; correct or remove it",
        ),
        (OSError(errno.EMFILE, "Too many open files"), 2, "the system: Too many open files; raise the limit"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (Interrupted(signal.SIGTERM), 143, "interrupted"),
        (CommandEnd("another ended", 1), 1, "another ended"),
    ],
    ids=lambda value: f"{type(value).__name__}-{value}" if isinstance(value, BaseException) else "",
)
def test_how_a_command_ends_is_its_exit_code_and_one_sentence(
    name: str,
    error: BaseException,
    code: int,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert ending_with(monkeypatch, name, error) == code
    printed = capsys.readouterr()
    if name in SERVERS and isinstance(error, KeyboardInterrupt):
        assert printed.err == printed.out == ""
        return
    assert printed.err.startswith(f"grpo.{name}: {sentence}") and printed.err.count("\n") == 1 and printed.out == ""


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("error", [ZeroDivisionError(), OSError("a library's own sentence"), SystemExit(7)])
def test_a_mistake_of_the_program_keeps_its_traceback(
    name: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(type(error)):
        ending_with(monkeypatch, name, error)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_end_without_a_sentence_says_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ending_with(monkeypatch, name, CommandEnd(None, 2)) == 2
    assert capsys.readouterr().err == ""


def test_what_a_terminal_would_act_upon_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise OSError(errno.EIO, "Input/output error", "\x1b[2J.json")

    assert command("grpo.x", work) == 2
    assert capsys.readouterr().err == (
        "grpo.x: \\x1b[2J.json: Input/output error; look after the disk and run it again\n"
    )


# Real processes


def started(*arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, arguments)], env=environment, text=True, stderr=subprocess.PIPE, **options
    )


@pytest.mark.parametrize(
    ("name", "argument", "sentence"),
    [
        ("train", "config.toml", "interrupted; no checkpoint was written yet"),
        ("sft", "config.toml", "interrupted; --resume continues from the last checkpoint, if one was written"),
        ("replay", ".", "interrupted"),
    ],
)
def test_ctrl_c_ends_a_process_with_130_and_a_sentence(name: str, argument: str, sentence: str, tmp_path: Path) -> None:
    """The command waits for what nobody writes into a pipe that has the name of its file."""
    for file in ("config.toml", "report.json"):
        os.mkfifo(tmp_path / file)
    process = started(f"grpo.{name}", tmp_path / argument)
    writer = None
    for _ in range(600):  # until the command reads one of them
        for file in ("config.toml", "report.json"):
            with contextlib.suppress(OSError):
                writer = os.open(tmp_path / file, os.O_WRONLY | os.O_NONBLOCK)
        if writer is not None or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert writer is not None and process.returncode == 130 and error == f"grpo.{name}: {sentence}\n"
    os.close(writer)


def test_a_pipe_that_is_closed_early_ends_a_command_in_silence(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = started("grpo.init", tmp_path / "new", stdout=writing)
    os.close(writing)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 141 and error == ""


def test_a_parser_ends_a_command_with_2_for_an_option_that_it_does_not_know() -> None:
    for name, module in COMMANDS.items():
        program: ModuleType = importlib.import_module(module)
        assert isinstance(program.parser(), argparse.ArgumentParser)
        with pytest.raises(SystemExit) as end:
            program.main([*ARGUMENTS[name], "--nowhere"])
        assert end.value.code == 2, name
