"""A simulated run and its report, which several files look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.report_page import Page
from tests.helpers.report_run import write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("report") / "mine")


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return Page(run / "report.html")
