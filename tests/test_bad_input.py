"""Bad input, case after case: one sentence that names the place and the remedy, exit code 2, and nothing written.

Each case runs `grpo.train.main` in this process, up to where vLLM would be started; getting there is a failure. Every
field of the configuration is given a wrong spelling, a wrong type and a value out of range; the broken files are rows
of a table in `bad_models.py`, `bad_adapters.py` and `bad_data.py`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import annotated_types
import pytest

from grpo.config.toml import write_toml
from grpo.model.checks import HEAD_SIZES_ON_CPU
from grpo.train import main
from tests.config.test_config import FIELDS, OF_EACH_TYPE, limits, toml_types
from tests.helpers import (
    bad_adapters,  # noqa: F401 - adds to the table
    bad_configs,  # noqa: F401
    bad_data,  # noqa: F401
    bad_models,  # noqa: F401
)
from tests.helpers.bad_cases import CASES, Case, Tables
from tests.helpers.small_chat import save_small_chat_model
from tests.helpers.tiny_run import run_tables, save_rewards, write_config


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and rewards that nothing is wrong with."""
    folder = tmp_path_factory.mktemp("good")
    save_small_chat_model(folder / "model")
    save_rewards(folder)
    return folder


@pytest.fixture
def home(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of one case, the working directory too. vLLM is not to be started."""
    folder = tmp_path / "case"
    shutil.copytree(good, folder, copy_function=os.link)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def started(*arguments: Any, **named: Any) -> None:
        raise AssertionError("vLLM would have been started")

    monkeypatch.setattr("grpo.rollout.engine.Engine.__init__", started)
    return folder


# The configuration, field by field


def kinds(name: str) -> Iterator[tuple[str, Any, str]]:
    """(key, value, what has to be said) for a wrong spelling, a value of a wrong type and one out of range."""
    section, key = name.split(".")
    yield f"{key}x", 1, f"did you mean '{key}'?"
    fitting = toml_types(FIELDS[name].annotation)
    yield key, next(value for kind, value in OF_EACH_TYPE.items() if kind not in fitting), "must be "
    if any(isinstance(limit, annotated_types.Gt | annotated_types.Ge) for limit in limits(FIELDS[name])):
        yield key, -1, "must be "


@pytest.mark.parametrize("name", FIELDS)
def test_a_wrong_field_is_refused_with_file_line_and_key(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    section, _ = name.split(".")
    for key, value, said in kinds(name):
        tables: Tables = {"model": {"name": "m"}, "task": {"name": "t"}, "rewards": [{"function": "f"}]}
        table = tables.setdefault(section, {})
        (table[0] if isinstance(table, list) else table)[key] = value
        text = write_toml(tables)
        Path("config.toml").write_text(text)
        lines = text.splitlines()
        header = next(number for number, line in enumerate(lines) if line.strip("[]") == section)
        line = 1 + next(number for number in range(header, len(lines)) if lines[number].startswith(f"{key} = "))
        message = refused(tmp_path, ["config.toml"], capsys)
        assert message.startswith(f"grpo.train: config.toml:{line}: ") and key in message and said in message, message


# Running the table


def refused(home: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence with which `grpo.train` refuses `arguments`, having written nothing."""
    before = sorted(home.rglob("*"))
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    written = [path for path in home.rglob("*") if path not in before and "__pycache__" not in path.parts]
    assert written == [] and not (home / "trapped").exists()
    assert list((home.parent / "cache").glob("grpo/gguf/tmp*")) == []
    assert "Traceback" not in error
    message = [line for line in error.splitlines() if line.startswith("grpo.train: ")]
    assert len(message) == 1 and error.rstrip().endswith(message[0]), error
    assert error.count("\n") == 1 or "reward" in message[0], error  # a reward's own traceback may come before
    return message[0]


def test_the_set_up_that_is_broken_below_works(home: Path) -> None:
    """Else every case could fail for a reason of its own."""
    with pytest.raises(AssertionError, match="vLLM would have been started"):
        main([str(write_config(home / "config.toml", run_tables(home)))])


@pytest.mark.parametrize("broken", CASES, ids=[case.name for case in CASES])
def test_broken_input_is_refused(broken: Case, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = broken.prepare(home) or {}
    config = home / "config.toml"
    if not config.exists():
        write_config(config, run_tables(home, **changes))
    message = refused(home, [str(config)], capsys)
    for part in broken.said:
        assert part in message, message


def test_the_head_sizes_are_those_of_vllm() -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    assert tuple(CPUAttentionBackend.get_supported_head_sizes()) == HEAD_SIZES_ON_CPU


def test_the_table_is_long() -> None:
    assert len(CASES) >= 120 and len({case.name for case in CASES}) == len(CASES)
