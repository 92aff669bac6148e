"""What a newcomer meets first holds together: licence, CONTRIBUTING, hooks, CI and the suite's markers."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.helpers.paths import ROOT

MAKEFILE = (ROOT / "Makefile").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


def test_the_licence_is_apaches_own_text() -> None:
    """Of https://www.apache.org/licenses/LICENSE-2.0.txt."""
    digest = hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest()
    assert digest == "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"


def test_hooks_use_the_ruff_of_make_lint() -> None:
    (pinned,) = re.findall(r"^ruff==\S+$", (ROOT / "requirements/dev.txt").read_text(), re.MULTILINE)
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert {hook["id"]: hook["additional_dependencies"] for hook in repository["hooks"]} == {
        "ruff-check": [pinned],
        "ruff-format": [pinned],
    }


def test_ci_runs_what_a_change_has_to_pass() -> None:
    run = (ROOT / ".ci/run").read_text()
    assert re.findall(r"^make (\S+)$", run, re.MULTILINE) == ["lint", "test", "test-wide"]
    assert "set -euo pipefail" in run, "the first that fails ends it"


@pytest.mark.parametrize(
    ("target", "selected"),
    [
        ("test", ""),
        ("test-quick", '-m "not (vllm or slow or wide or long)"'),
        ("test-wide", "-m wide"),
    ],
)
def test_what_the_targets_select(target: str, selected: str, tmp_path: Path) -> None:
    (tmp_path / ".installed").touch()
    command = ["make", "--dry-run", "--old-file", str(tmp_path / ".installed"), target, f"VENV={tmp_path}"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "OMP_", "PYTEST_"))}
    printed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    (line,) = [line for line in printed.splitlines() if "-m pytest" in line]
    assert line.split(" --dist loadfile")[1].strip() == selected


def test_every_marker_is_in_the_table_of_commands() -> None:
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    markers = {entry.partition(":")[0] for entry in options["markers"]}
    assert markers == {"gpu", "vllm", "slow", "wide", "long"}
    assert all(f"`{marker}`" in CONTRIBUTING for marker in markers)


def test_every_target_that_tests_is_in_the_table_of_commands() -> None:
    targets = re.findall(r"^(test[\w-]*):", MAKEFILE, re.MULTILINE)
    rows = re.findall(r"^\| `make (test[\w-]*)` \|", CONTRIBUTING, re.MULTILINE)
    assert sorted(targets) == sorted(rows)


def test_the_readme_fits_a_terminal() -> None:
    """80 columns, but for tables and pictures, which no terminal shows as such."""
    lines = (ROOT / "README.md").read_text().splitlines()
    assert [line for line in lines if len(line) > 80 and not line.startswith(("|", "!["))] == []


def test_what_a_gpu_takes_is_said_where_people_look() -> None:
    readme, install = ((ROOT / name).read_text() for name in ("README.md", "docs/install.md"))
    for words in ("580 or newer", "WSL2", "Colab"):
        assert words in " ".join(readme.split()) and words in " ".join(install.split())
