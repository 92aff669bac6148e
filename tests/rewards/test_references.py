"""References to reward functions: what each form finds, and what is said about one that leads nowhere."""

from __future__ import annotations

import sys

import pytest

from grpo.errors import UserError
from grpo.references import described, location, resolve
from grpo.rewards.builtin import resolve_reward
from grpo.rewards.correctness import correctness

GOOD = """
from helper_beside_it import HALF

def half(completions):
    return [HALF] * len(completions)

class Rewards:
    @staticmethod
    def full(completions):
        return [1.0] * len(completions)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with a file, a package and a module that fails; sys.path and sys.modules are put back."""
    (tmp_path / "mine.py").write_text(GOOD)
    (tmp_path / "helper_beside_it.py").write_text("HALF = 0.5\n")
    (tmp_path / "some_pkg").mkdir()
    (tmp_path / "some_pkg/__init__.py").write_text("")
    (tmp_path / "some_pkg/mod.py").write_text("def third(completions):\n    return [1 / 3] * len(completions)\n")
    (tmp_path / "fails.py").write_text("import math\n\nmath.sqrt(-1)\n")
    (tmp_path / "wants.py").write_text("import math\nimport not_installed\n")
    (tmp_path / "garbled.py").write_text("x = 1\ndef f(:\n    pass\n")
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(3)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_built_in_names_and_aliases(folder):
    assert resolve_reward("correctness") is correctness
    assert resolve_reward("correctness_reward_func") is correctness


def test_files_modules_and_attributes(folder):
    assert resolve_reward("mine.py:half")([1]) == [0.5]
    assert resolve_reward(f"{folder}/mine.py:half")([1]) == [0.5]
    assert resolve_reward("mine.py:Rewards.full")([1]) == [1.0]
    assert resolve_reward("some_pkg.mod:third")([1]) == [1 / 3]
    assert resolve_reward("some_pkg.mod.third")([1]) == [1 / 3]


@pytest.mark.parametrize(
    ("reference", "sentence"),
    [
        ("corectness", "there is no built-in reward 'corectness'; did you mean 'correctness'?"),
        ("zzz", "built in are correctness, "),
        ("absent.py:half", r"there is no file .*absent.py; the path is relative to the working folder"),
        ("mine.py", "does not say which function; write mine.py:FUNCTION"),
        ("mine.py:", "does not say which function; write mine.py:FUNCTION"),
        ("mine.py:hlaf", r"mine.py has no 'hlaf'; did you mean 'half'\?"),
        ("mine.py:Rewards.none_of_these", "has no 'none_of_these'; define it there"),
        ("no_such_pkg.mod:f", "there is no module 'no_such_pkg'; install it, start from its folder"),
        ("some_pkg.absent:f", "there is no module 'some_pkg.absent'"),
        ("some_pkg.mod:thrid", r"some_pkg.mod:thrid'.*mod.py has no 'thrid'; did you mean 'third'\?"),
        ("fails.py:f", r"failed to load at .*fails.py:3: ValueError: "),
        ("fails:f", r"failed to load at .*fails.py:3: ValueError: "),
        ("wants.py:f", r"failed to load at .*wants.py:2: ModuleNotFoundError: No module named 'not_installed'"),
        ("wants:f", r"failed to load at .*wants.py:2: ModuleNotFoundError"),
        ("garbled.py:f", r"failed to load at .*garbled.py:2: SyntaxError: "),
        ("leaves.py:f", r"failed to load at .*leaves.py:2: SystemExit: 3"),
    ],
)
def test_a_reference_that_leads_nowhere_is_explained_in_one_line(folder, reference, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        resolve_reward(reference)
    assert "\n" not in str(error.value)


def test_other_kinds_have_their_own_built_ins(folder):
    assert resolve("half", kind="task", builtin={"half": "mine.py:half"})([1]) == [0.5]
    with pytest.raises(UserError, match="there is no built-in task 'hal'; did you mean 'half'"):
        resolve("hal", kind="task", builtin={"half": "mine.py:half"})


def test_an_error_is_located_in_the_users_file(folder):
    (folder / "calls_json.py").write_text("import json\ndef parse(text):\n    return json.loads(text)\n")
    try:
        resolve_reward("calls_json.py:parse")("{")
    except ValueError as error:
        assert location(error, str(folder / "calls_json.py")).endswith("calls_json.py:3")
        assert "decoder.py" in location(error)
        assert described(error).startswith("JSONDecodeError: Expecting property name")
    assert described(ValueError("first\nsecond")) == "ValueError: first"
    assert described(KeyError()) == "KeyError"
    assert len(described(ValueError("x" * 1000))) < 350
