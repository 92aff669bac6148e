"""What is not trusted cannot run, reach out or write where it should not. Runs under attack are in `test_faults.py`."""

from __future__ import annotations

import ast
import json
import pickle
from pathlib import Path

import pytest

from grpo.config.schema import parse_config
from grpo.run.checkpoint import latest, save
from grpo.session import open_session
from tests.helpers.bad_cases import Trap
from tests.helpers.paths import ROOT
from tests.helpers.small_chat import save_small_chat_model
from tests.helpers.tiny_run import run_tables

SOURCES = [file for folder in ("grpo", "kernels", "rewards", "tasks") for file in sorted((ROOT / folder).rglob("*.py"))]
UNPICKLERS = {
    ("pickle", "load"), ("pickle", "loads"), ("pickle", "Unpickler"), ("cloudpickle", "load"), ("cloudpickle", "loads"),
    ("torch", "load"), ("joblib", "load"), ("marshal", "load"), ("marshal", "loads"), ("shelve", "open"),
    ("np", "load"), ("numpy", "load"),
}  # fmt: skip
RUNS_TEXT = {"eval", "exec", "compile", "__import__"}


def calls(file: Path) -> list[tuple[str, str]]:
    """Every called name in `file`, with the module or object it is taken from."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
        ):
            found.append((node.func.value.id, node.func.attr))
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found.append(("", node.func.id))
    return found


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_no_source_unpickles_or_runs_text(file: Path) -> None:
    """A reward's process unpickles what the trainer has sent down its own socket; nothing else does."""
    used = set(calls(file))
    runtime = ROOT / "rewards" / "runtime"
    environments = ROOT / "grpo" / "environments"
    # In processes of their own: a user's functions, and what one of the user's environments gave another.
    in_workers = (
        runtime / "worker.py",
        runtime / "protocol.py",
        environments / "ways_in.py",
        environments / "verifiers_v0.py",
    )
    allowed = {("pickle", "loads")} if file in in_workers else set()
    assert not (used & UNPICKLERS) - allowed
    assert not {name for module, name in used if module == ""} & RUNS_TEXT


def test_pickles_beside_a_good_model_and_adapter_are_left_alone(tmp_path: Path) -> None:
    mark = tmp_path / "trapped"
    save_small_chat_model(tmp_path / "model")
    config = parse_config(run_tables(tmp_path))
    with open_session(config, start_engine=False) as session:
        session.policy.save_adapter(tmp_path / "adapter")
    names = ("pytorch_model.bin", "model.pt", "training_args.bin", "optimizer.pt", "scheduler.pt", "adapter_model.bin")
    for folder in ("model", "adapter"):
        for name in names:
            (tmp_path / folder / name).write_bytes(pickle.dumps(Trap(mark)))
    with open_session(config, adapter=tmp_path / "adapter", start_engine=False) as session:
        assert session.policy.adapter_layers()
    assert not mark.exists()
    pickle.loads(pickle.dumps(Trap(mark)))
    assert mark.exists(), "the trap does not work, so the test shows nothing"


def test_a_manifest_that_names_files_elsewhere_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    folder = save(tmp_path, 1, lambda folder: None, keep=None)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {"../../secret": "0" * 64, "/etc/hostname": "0" * 64}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    notices: list[str] = []
    assert latest(tmp_path, notices.append) is None and len(notices) == 1
    assert "names a file elsewhere" in notices[0]


def test_code_of_a_model_runs_only_if_the_user_writes_so() -> None:
    assert parse_config({"model": {"name": "m"}, "task": {"name": "t"}}).model.trust_remote_code is False
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert not isinstance(node.value, ast.Constant) or node.value.value is False, file


def test_temporary_folders_are_private(tmp_path: Path) -> None:
    """Made by tempfile, whose folders are the user's alone; no source names a path below /tmp."""
    for file in SOURCES:
        assert "/tmp" not in file.read_text(), file


def test_security_md_says_what_is_trusted_and_what_is_not() -> None:
    trusted, _, rest = (ROOT / "SECURITY.md").read_text().lower().partition("## what is not")
    assert all(word in trusted for word in ("reward functions", "tasks", "the configuration", "trust_remote_code"))
    assert all(word in rest for word in ("completions", "models and adapters", "checkpoints", "data", "pickle"))
