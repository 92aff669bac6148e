"""The notebooks run from top to bottom, and what is committed of them is what such a run gives.

They are executed as a person would, in a kernel of their own, but on a tiny random model with few and small steps; what
the real model learns in them is in their committed outputs.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.helpers.paths import ROOT
from tests.helpers.seeing import save_seeing_chat
from tests.helpers.tiny_run import save_tiny_chat_model

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
RUN_FIRST = {"first_run", "vision"}
"""Those that are run for every change: their training is that of text and of images. The others are wide."""

notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def code(book: Any) -> list[Any]:
    return [cell for cell in book.cells if cell.cell_type == "code"]


def texts(cell: Any) -> str:
    """What a cell printed and showed as text."""
    return "".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs)


def pictures(book: Any) -> list[str]:
    """The start of every cell that shows a picture."""
    return [cell.source for cell in code(book) for output in cell.outputs if "image/png" in output.get("data", {})]


@notebook
def test_committed_notebooks_are_whole_and_have_the_outputs_of_one_run(path: Path) -> None:
    book = read(path)
    nbformat.validate(book)
    assert [cell.execution_count for cell in code(book)] == list(range(1, len(code(book)) + 1))
    assert not [output for cell in code(book) for output in cell.outputs if output.output_type == "error"]
    assert not [output for cell in code(book) for output in cell.outputs if output.get("name") == "stderr"]
    assert len(pictures(book)) >= 2, "training draws, and so does the comparison after it"
    assert sum(cell.cell_type == "markdown" for cell in book.cells) >= len(code(book)) - 2, "cells are explained"
    assert max(len(cell.source.splitlines()) for cell in code(book)) <= 16
    assert not re.search(r"/(home|root|work|tmp|Users)/", path.read_text()), "nothing of the machine it ran on"


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[] if path.stem in RUN_FIRST else [pytest.mark.wide])
        for path in NOTEBOOKS
    ],
)
def test_notebooks_run_from_top_to_bottom(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    book = read(path)
    sees = any("images=True" in cell.source for cell in code(book))
    (save_seeing_chat if sees else save_tiny_chat_model)(tmp_path / "model")
    (parameters,) = [cell for cell in code(book) if "parameters" in cell.metadata.get("tags", [])]
    small = {"model": str(tmp_path / "model"), "steps": 2, "prompts_per_step": 2, "questions": 4}
    assert all(re.search(rf"^{name} = ", parameters.source, re.MULTILINE) for name in small)
    if "supervised = " in parameters.source:
        small["supervised"] = 2
    parameters.source += "".join(f"\n{name} = {value!r}" for name, value in small.items())
    NotebookClient(book, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert not [output for cell in code(book) for output in cell.outputs if output.get("name") == "stderr"]
    trained = [cell for cell in code(book) if "policy.train(" in cell.source]
    assert trained and all("step 2/2" in texts(cell) for cell in trained)
    assert len(pictures(book)) == len(trained) + 1
    assert all((run / "summary.json").is_file() for run in (tmp_path / "runs").iterdir())
    supervised = sum("-m grpo.sft" in cell.source for cell in code(book))
    assert len(list((tmp_path / "runs").iterdir())) == len(trained) + supervised
    for plan in (cell for cell in code(book) if "--card T4" in cell.source):
        assert "Fits the T4 with" in texts(plan), "what a larger model needs there is planned"
