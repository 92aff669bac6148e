"""Processes that a benchmark starts find the packages that it found itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

SOURCES = sorted((ROOT / "benchmarks").rglob("*.py"))


def replacements(tree: ast.AST) -> Iterator[str]:
    """What each PYTHONPATH of an environment is set to."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            pairs = [(key, value) for key, value in zip(node.keys, node.values, strict=True)]
        elif isinstance(node, ast.Assign):
            pairs = [(target.slice, node.value) for target in node.targets if isinstance(target, ast.Subscript)]
        else:
            continue
        yield from (
            ast.unparse(value) for key, value in pairs if isinstance(key, ast.Constant) and key.value == "PYTHONPATH"
        )


@pytest.mark.parametrize("path", SOURCES, ids=[path.stem for path in SOURCES])
def test_a_path_for_children_keeps_their_parents(path: Path) -> None:
    for value in replacements(ast.parse(path.read_text())):
        assert "PYTHONPATH" in value, f"PYTHONPATH = {value} hides what the benchmark itself was given"


def test_a_path_that_is_replaced_is_found() -> None:
    assert list(replacements(ast.parse("run(env={**os.environ, 'PYTHONPATH': str(ROOT)})"))) == ["str(ROOT)"]
    assert list(replacements(ast.parse("environment['PYTHONPATH'] = x"))) == ["x"]
