"""`python -m grpo.init`: what it writes trains as it is, and nothing of the user's is overwritten."""

from __future__ import annotations

import asyncio
import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from grpo import train
from grpo.config.schema import read_config
from grpo.init import ENVIRONMENT_FILES, FILES, HUB_MODEL, PACKAGED_MODEL, STARTER, default_model, main
from grpo.rewards.builtin import resolve_reward
from grpo.rewards.runtime.contract import RewardBatch
from grpo.rewards.runtime.conventions import RewardFunction
from grpo.tasks.common import load_task
from tests.helpers.tiny_run import read_metrics, save_tiny_chat_model


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_files_are_written_here_or_in_a_new_folder(home: Path, capsys: Any) -> None:
    assert main([]) == 0 and {path.name for path in home.iterdir()} == set(FILES)
    assert capsys.readouterr().out.splitlines()[-1] == "train with: python -m grpo.train config.toml"
    assert main(["new/one"]) == 0 and {path.name for path in (home / "new" / "one").iterdir()} == set(FILES)
    assert capsys.readouterr().out.splitlines()[-1] == "train with: cd new/one && python -m grpo.train config.toml"


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_overwritten_and_nothing_half_written(home: Path, capsys: Any, name: str) -> None:
    (home / name).write_text("mine")
    assert main([]) == 2
    assert capsys.readouterr().err == (
        f"grpo.init: {name} exists and is never overwritten; name another folder, or move it away\n"
    )
    assert [path.name for path in home.iterdir()] == [name] and (home / name).read_text() == "mine"


def test_a_folder_that_cannot_be_made_is_one_sentence(home: Path, capsys: Any) -> None:
    (home / "file").write_text("")
    assert main(["file/below"]) == 2
    assert "file/below: cannot be written (Not a directory)" in capsys.readouterr().err


def test_the_model_is_one_that_is_there_or_the_one_that_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_model() == PACKAGED_MODEL, "the tests' environment has it"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert default_model() == HUB_MODEL
    assert main(["--model", 'a "quoted"/model']) == 0
    assert read_config("config.toml").model.name == 'a "quoted"/model'


def test_every_setting_of_the_configuration_is_explained(home: Path) -> None:
    """Each section has a comment, and the whole is short enough to read."""
    text = (STARTER / "config.toml").read_text()
    assert len(text.splitlines()) < 70 and text.count("#") > 15
    assert all(len(line) <= 120 for line in text.splitlines())


def test_the_rewards_have_a_slope_over_the_task_s_own_answers(home: Path) -> None:
    assert main([]) == 0
    config = read_config("config.toml")
    task = load_task(config.task[0].name, config.task[0].options)
    assert len(task.eval) == 40 and len(task.train) == 360
    row = next(row for row in task.eval if len(row["answer"]) == 3)
    gold, wrong = row["answer"], row["answer"][:-1] + str((int(row["answer"][-1]) + 1) % 10)
    assert task.strict(gold, row) and not task.strict(wrong, row)
    batch = RewardBatch([row["prompt"]] * 3, [gold, wrong, "none"], [[1]] * 3, {"number": [row["number"]] * 3})
    scores = {}
    for table in config.rewards:
        function = RewardFunction(resolve_reward(table.function), table.function, table.options)
        scores[table.function.split(":")[1]] = function.score(batch).values
    assert scores["right_digits"] == [1.0, pytest.approx(2 / 3), 0.0]
    assert scores["only_digits"] == [1.0, 1.0, 0.0]


def test_questions_are_right_and_all_different() -> None:
    rows = [json.loads(line) for line in (STARTER / "questions.jsonl").read_text().splitlines()]
    assert len({row["words"] for row in rows}) == len({row["number"] for row in rows}) == len(rows) == 400
    tens = {"twenty": 2, "thirty": 3, "forty": 4, "fifty": 5, "sixty": 6, "seventy": 7, "eighty": 8, "ninety": 9}
    for row in rows:
        last = row["words"].split()[-1].split("-")[0]
        if last in tens:
            assert int(row["number"]) // 10 % 10 == tens[last], row


def test_the_reward_file_shows_itself(home: Path) -> None:
    assert main([]) == 0
    done = subprocess.run([sys.executable, "rewards.py"], cwd=home, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[0].split() == [
        "'57'", "right_digits", "1.00", "only_digits", "1",
    ]  # fmt: skip


@pytest.mark.vllm
def test_what_it_writes_trains_at_once(home: Path) -> None:
    save_tiny_chat_model(home / "model")
    assert main([".", "--model", "model"]) == 0
    small = ["train.max_steps=2", "rollout.prompts_per_step=2", "rollout.num_generations=4", "eval.limit=4"]
    assert train.main(["config.toml", *(word for each in small for word in ("--set", each))]) == 0
    steps = read_metrics(home / "runs" / "first")
    assert [entry["step"] for entry in steps] == [1, 2]
    assert all("rewards/right_digits" in entry and "rewards/only_digits" in entry for entry in steps)
    assert (home / "runs/first/adapter/adapter_model.safetensors").is_file()
    assert "right_digits" in (home / "runs/first/report.html").read_text()


# A game in place of questions


def test_a_game_is_written_and_nothing_of_the_users_overwritten(home: Path, capsys: Any) -> None:
    assert main(["game", "--environment"]) == 0
    assert {path.name for path in (home / "game").iterdir()} == set(ENVIRONMENT_FILES.values())
    (home / "environment.py").write_text("mine")
    assert main(["--environment"]) == 2 and [path.name for path in home.glob("*.*")] == ["environment.py"]
    assert "environment.py exists and is never overwritten" in capsys.readouterr().err
    text = (STARTER / "environment.toml").read_text()
    assert len(text.splitlines()) < 70 and all(len(line) <= 120 for line in text.splitlines())


def test_the_games_can_be_won_and_are_all_different(home: Path) -> None:
    assert main(["--environment"]) == 0
    config = read_config("config.toml")
    assert config.environment is not None
    task, namespace = load_task(config.task[0].name, config.task[0].options), runpy.run_path("environment.py")
    rows = [*task.train, *task.eval]
    assert len({(row["low"], row["high"], row["secret"]) for row in rows}) == len(rows) == 400

    def halving(row: dict[str, Any]) -> dict[str, Any]:
        low, high, turns = row["low"], row["high"], config.environment.max_turns

        async def sample(messages: list[dict[str, str]]) -> Any:
            nonlocal low, high, turns
            guess, turns = (low + high) // 2, turns - 1
            low, high = (guess + 1, high) if row["secret"] > guess else (low, guess - 1)
            return namespace["Turn"](str(guess), not turns)

        return asyncio.run(namespace["play"](row, sample))

    results = [halving(row) for row in rows]
    assert 0.4 < sum(result["success"] for result in results) / len(results) < 0.9
    assert all(0.4 < result["reward"] <= 1 for result in results)


def test_the_environment_can_be_played_by_hand(home: Path) -> None:
    assert main(["--environment"]) == 0
    done = subprocess.run([sys.executable, "environment.py"], input="10\n14\n", capture_output=True, text=True)
    assert done.returncode == 0 and "Higher." in done.stdout and "'success': True" in done.stdout


@pytest.mark.vllm
@pytest.mark.wide
def test_the_game_trains_at_once(home: Path) -> None:
    save_tiny_chat_model(home / "model")
    assert main([".", "--environment", "--model", "model"]) == 0
    small = ["train.max_steps=2", "rollout.prompts_per_step=2", "rollout.num_generations=4", "eval.limit=4"]
    assert train.main(["config.toml", *(word for each in small for word in ("--set", each))]) == 0
    assert all(entry["environment/turns"] >= 1 for entry in read_metrics(home / "runs" / "first"))
