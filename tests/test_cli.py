"""The command line: what it accepts, what it prints, its exit codes, and what it does not load."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grpo import train
from grpo.config.schema import Config, read_config
from grpo.distributed.launch import Launch
from grpo.errors import UserError
from grpo.run.checkpoint import open_run, save
from grpo.run.signals import Interrupted
from tests.helpers.paths import ROOT

MINIMAL = ROOT / "tests" / "data" / "minimal.toml"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test runs in an empty folder, where the default run folder would be seen."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Config, dict[str, Any]]]:
    """Stands in for `launch`, and records what it is given."""
    calls: list[tuple[Config, dict[str, Any]]] = []

    install_launch(monkeypatch, lambda config, **options: calls.append((config, options)))
    return calls


def install_launch(monkeypatch: pytest.MonkeyPatch, launch: Callable[..., None]) -> None:
    module = types.ModuleType("grpo.training.run")
    module.launch = launch  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "grpo.training.run", module)
    monkeypatch.setattr("grpo.run.library_logs.quiet_libraries", lambda verbose: None)


def failing_launch(error: BaseException) -> Callable[..., None]:
    def launch(config: Config, **options: Any) -> None:
        raise error

    return launch


def existing_run(path: Path, checkpoint: int | None = None, *overrides: str) -> Config:
    config = read_config(MINIMAL, [f"checkpoint.output_dir='{path}'", *overrides])
    with open_run(config) as run:
        (run.path / "metrics.jsonl").touch()
        if checkpoint is not None:
            save(run.path, checkpoint, lambda folder: None, keep=None)
    return config


def command(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "grpo.train", *map(str, arguments)]
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


def test_bad_input_is_one_sentence_and_exit_code_2_and_writes_nothing(folder: Path) -> None:
    result = command(MINIMAL, "--set", "train.max_setps=3", cwd=folder)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == (
        "grpo.train: --set train.max_setps=3: unknown key 'train.max_setps'; did you mean 'max_steps'?\n"
    )
    assert list(folder.iterdir()) == []


def test_help_and_dry_run_and_errors_load_neither_torch_nor_vllm(folder: Path) -> None:
    script = f"""
import contextlib, sys
from grpo.train import main
config = {str(MINIMAL)!r}
for line in (["--help"], [config, "--dry-run"], [config, "--set", "x=1"], [config, "--resume"]):
    with contextlib.suppress(SystemExit):
        main(line)
print([name for name in ("torch", "vllm", "transformers", "numpy") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and result.stdout.splitlines()[-1] == "[]", result.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "no configuration given; pass a .toml file"),
        (["nowhere.toml"], "nowhere.toml: no such configuration file"),
        (["--resume"], "no configuration given"),
        (["--resume", "nowhere"], "nowhere: there is no run to resume here"),
        ([str(MINIMAL), "--resume", "nowhere"], "nowhere: there is no run to resume here"),
        ([str(MINIMAL), "--resume"], "runs/grpo: there is no run to resume here"),
        (["--resume", str(MINIMAL)], "this is a file, not a run folder; put CONFIG before --resume"),
        ([str(MINIMAL), "--resume", "a", "--output", "b"], "a run goes on in its own folder; keep one"),
        ([str(MINIMAL), "--set", "model.name"], "--set model.name: write it as section.key=value"),
    ],
)
def test_what_cannot_be_run_is_refused(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str], folder: Path, trained: list[Any]
) -> None:
    assert train.main(arguments) == 2
    printed = capsys.readouterr()
    assert sentence in printed.err and printed.err.count("\n") == 1 and printed.out == ""
    assert trained == [] and list(folder.iterdir()) == []


def test_an_unknown_option_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        train.main([str(MINIMAL), "--reusme"])
    assert exit_.value.code == 2 and "unrecognized arguments: --reusme" in capsys.readouterr().err


def test_options_reach_the_trainer(trained: list[tuple[Config, dict[str, Any]]]) -> None:
    overrides = ["--set", "train.max_steps=3", "--set", "rewards.0.weight=2"]
    assert train.main([str(MINIMAL), *overrides, "--output", "runs/it's", "--verbose"]) == 0
    ((config, options),) = trained
    assert config.train.max_steps == 3 and config.rewards[0].weight == 2
    assert config.checkpoint.output_dir == Path("runs/it's")
    assert options == {"resume": False, "verbose": True, "rank": Launch()}


def test_an_existing_run_folder_is_refused_before_the_trainer_is_loaded(
    trained: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    existing_run(Path("runs/a"))
    assert train.main([str(MINIMAL), "--output", "runs/a"]) == 2
    assert "runs/a already exists; continue that run with --resume" in capsys.readouterr().err
    assert trained == []


def test_a_run_is_resumed_in_its_folder_with_its_own_configuration_or_a_fitting_one(
    trained: list[tuple[Config, dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    saved = existing_run(Path("runs/a"), None, "train.max_steps=5")
    assert train.main(["--resume", "runs/a"]) == 0
    assert train.main(["--resume", "runs/a", "--set", "train.max_steps=9"]) == 0
    assert train.main([str(MINIMAL), "--resume", "runs/a"]) == 0
    assert train.main([str(MINIMAL), "--output", "runs/a", "--resume"]) == 0
    assert [options["resume"] for _, options in trained] == [True] * 4
    assert trained[0][0] == saved
    assert [config.train.max_steps for config, _ in trained] == [5, 9, None, None]
    assert {config.checkpoint.output_dir for config, _ in trained} == {Path("runs/a")}
    assert train.main([str(MINIMAL), "--resume", "runs/a", "--set", "lora.r=4"]) == 2
    assert "lora.r = 4 does not fit the run in runs/a, which has 16" in capsys.readouterr().err
    assert len(trained) == 4


def test_a_moved_run_folder_is_resumed_where_it_is_now(trained: list[tuple[Config, dict[str, Any]]]) -> None:
    existing_run(Path("runs/a"))
    Path("runs/a").rename("moved")
    assert train.main(["--resume", "moved"]) == 0
    assert trained[0][0].checkpoint.output_dir == Path("moved")


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (UserError("rewards.py:3: no"), 2, "grpo.train: rewards.py:3: no\n"),
        (
            OSError(28, "No space left on device", "runs/grpo/metrics.jsonl"),
            2,
            "runs/grpo/metrics.jsonl: No space left",
        ),
        (KeyboardInterrupt(), 130, "interrupted; no checkpoint was written yet\n"),
        (Interrupted(signal.SIGINT), 130, "interrupted; no checkpoint was written yet\n"),
        (Interrupted(signal.SIGTERM), 143, "interrupted; no checkpoint was written yet\n"),
    ],
)
def test_how_training_ends_is_told_by_exit_code_and_sentence(
    error: BaseException,
    code: int,
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install_launch(monkeypatch, failing_launch(error))
    assert train.main([str(MINIMAL)]) == code
    assert sentence in capsys.readouterr().err


def test_an_interrupted_run_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    existing_run(Path("runs/a"), 7)
    install_launch(monkeypatch, failing_launch(KeyboardInterrupt()))
    assert train.main(["--resume", "runs/a"]) == 130
    assert "the last checkpoint is step 7, continue with --resume runs/a" in capsys.readouterr().err


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    install_launch(monkeypatch, failing_launch(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        train.main([str(MINIMAL)])


def test_a_dry_run_prints_a_configuration_that_is_the_same_run(
    capsys: pytest.CaptureFixture[str], folder: Path, trained: list[Any]
) -> None:
    assert train.main([str(MINIMAL), "--set", "train.max_steps=3", "--dry-run"]) == 0
    assert trained == [] and list(folder.iterdir()) == []
    (folder / "printed.toml").write_text(capsys.readouterr().out)
    assert read_config(folder / "printed.toml") == read_config(MINIMAL, ["train.max_steps=3"])


def test_a_dry_run_does_the_arithmetic_of_a_step() -> None:
    config = read_config(
        MINIMAL,
        [
            "rollout.prompts_per_step=10",
            "rollout.num_generations=6",
            "rollout.max_prompt_length=256",
            "rollout.max_completion_length=200",
            "train.optimizer_steps_per_rollout=4",
            "train.num_iterations=2",
            "train.tokens_per_micro_batch=2000",
            "train.max_steps=250",
        ],
    )
    text = " ".join(train.arithmetic(config))
    assert "10 prompts x 6 generations = 60 completions, of at most 200 tokens each" in text
    assert "at most 12,000 sampled tokens, and 27,360 with prompts" in text  # 60 x (256 + 200)
    # 10 prompts in 4 parts: 3 at most, 18 completions; 4 of 456 tokens fit 2000, so 5 micro-batches.
    assert "8 optimiser steps (2 passes over the batch, 4 updates in each)," in text
    assert "each on at most 18 completions, in at most 5 micro-batches of 2,000 tokens" in text
    assert "250 steps = 2,000 optimiser steps on 15,000 completions" in text
