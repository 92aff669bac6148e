"""Imports between packages run one way: what the order is, and that the sources keep to it.

A name in ORDER may import those above it and never those below it; within a package any file may import any other, so
long as no two of them need each other. An import inside a function counts as one at the top: it changes when a module
is loaded, not which module knows which.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

ORDER = (
    # What everybody may use.
    "version", "printable", "errors", "command", "references", "image_urls", "images", "messages",
    "special_tokens", "tokenizing", "config",
    # The three folders beside grpo/. What runs in a reward's process is among them, so none imports torch but kernels.
    "kernels", "rewards", "rewards.runtime", "environments", "tasks", "data",
    # A model and what it takes, before anything is loaded.
    "model", "memory",
    # What a run keeps, alone or on several ranks.
    "run", "distributed",
    # The two graphs over the one copy of the weights, and what opens both.
    "policy", "rollout", "report", "monitor", "session",
    # What is done with them.
    "training", "export", "sft",
    # Ways in: the Python interface, then the commands, none of which imports another.
    "api", "train", "generate", "evaluate", "serve", "init", "replay", "doctor", "tune", "watch",
)  # fmt: skip
"""Packages of `grpo`, and its modules beside them, from what knows least to what knows most."""
COMMANDS = ORDER[ORDER.index("api") + 1 :]


def sources() -> dict[str, Path]:
    """Dotted name -> file of every module, as it is imported."""
    found = {}
    for folder in ("grpo", "kernels", "rewards", "tasks"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            if file.is_relative_to(ROOT / "grpo" / "starter"):
                continue  # a user's files, copied by `grpo.init`
            inside = file.relative_to(ROOT if folder != "grpo" else ROOT / "grpo").with_suffix("")
            found[".".join(("grpo", *inside.parts)).removesuffix(".__init__")] = file
    return found


SOURCES = sources()


def imported(source: str, known: set[str]) -> Iterator[str]:
    """The modules among `known` that the text `source` imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in known or node.module in known:
                    yield inner if inner in known else node.module


def package(module: str) -> str:
    """The entry of ORDER that `module` belongs to; "" for the doorway `grpo` itself."""
    inside = module.removeprefix("grpo").removeprefix(".")
    return next((name for name in sorted(ORDER, key=len, reverse=True) if f"{inside}.".startswith(f"{name}.")), inside)


GRAPH = {name: set(imported(file.read_text(), set(SOURCES))) - {name} for name, file in SOURCES.items()}


def upward(graph: dict[str, set[str]]) -> list[str]:
    """Imports of `graph` that run against ORDER, as "importer -> imported"."""
    place = {name: number for number, name in enumerate(ORDER)}
    return [
        f"{importer} -> {module}"
        for importer, modules in graph.items()
        for module in sorted(modules)
        if package(importer) not in ("", package(module)) and place[package(module)] > place[package(importer)]
    ]


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one circle of imports in `graph`; none if there is none."""
    done: set[str] = set()
    path: list[str] = []

    def visit(module: str) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return []
        path.append(module)
        found = next((found for other in sorted(graph[module]) if (found := visit(other))), [])
        if not found:
            path.pop()
            done.add(module)
        return found

    return next((found for module in graph if (found := visit(module))), [])


def test_every_module_has_a_place_in_the_order() -> None:
    assert {package(module) for module in SOURCES} - {""} == set(ORDER)
    assert len(set(ORDER)) == len(ORDER)


def test_no_import_runs_upwards() -> None:
    assert upward(GRAPH) == []


def test_no_modules_import_each_other() -> None:
    # The doorway hands on names of the interface, which everybody's `import grpo...` runs through.
    assert circle({module: others for module, others in GRAPH.items() if module != "grpo"} | {"grpo": set()}) == []


def test_no_command_imports_another() -> None:
    for command in COMMANDS:
        others = {f"grpo.{name}" for name in COMMANDS} - {f"grpo.{command}"}
        assert not GRAPH[f"grpo.{command}"] & others, command


@pytest.mark.parametrize(
    ("graph", "expected"),
    [
        ({"grpo.run.records": {"grpo.training.trainer"}}, ["grpo.run.records -> grpo.training.trainer"]),
        ({"grpo.rewards.format": {"grpo.rewards.runtime.pool"}}, ["grpo.rewards.format -> grpo.rewards.runtime.pool"]),
        ({"grpo.training.trainer": {"grpo.run.records"}, "grpo.run.a": {"grpo.run.b"}}, []),
    ],
)
def test_an_import_against_the_order_is_seen(graph: dict[str, set[str]], expected: list[str]) -> None:
    assert upward(graph) == expected


def test_a_circle_is_seen_also_where_an_import_is_inside_a_function() -> None:
    texts = {
        "grpo.run.a": "def f():\n    from grpo.run import b\n",
        "grpo.run.b": "from grpo.run.c import x\n",
        "grpo.run.c": "import grpo.run.a\n",
    }
    graph = {name: set(imported(text, set(texts))) for name, text in texts.items()}
    assert circle(graph) == ["grpo.run.a", "grpo.run.b", "grpo.run.c"]
    assert circle(graph | {"grpo.run.c": set()}) == []


def test_a_package_hands_on_nothing() -> None:
    """Its __init__.py says what it is for and imports nothing, so that no command loads torch for its help."""
    files = [file for name, file in SOURCES.items() if file.name == "__init__.py" and name != "grpo"]
    assert len(files) > 12
    for file in files:
        (node,) = ast.parse(file.read_text()).body
        assert isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant), file
