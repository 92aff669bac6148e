"""Python objects as tasks and rewards, and what the configuration says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from grpo.api.inputs import as_rewards, as_task, reward_table
from grpo.api.loaded_policy import unused_folder
from grpo.errors import UserError


def letters(completions: list, **kwargs: Any) -> list[float]:
    return [0.0 for _ in completions]


def test_a_task_is_made_of_names_tables_rows_and_data_sets() -> None:
    import datasets

    rows = [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2"}]
    assert as_task("arithmetic")[0].name == "arithmetic"
    task, table = as_task({"name": "arithmetic", "options": {"rows": 5}, "limit": 3})
    assert len(task.train) == 5 and table["limit"] == 3
    for given in (rows, tuple(rows), datasets.Dataset.from_list(rows)):
        assert as_task(given)[0].train == rows
    for wrong, expected in (
        (3, "cannot be made of a int"),
        (datasets.DatasetDict(train=datasets.Dataset.from_list(rows)), "a dict of 'train'; pass one split"),
        ("arithmetics", "did you mean 'arithmetic'"),
    ):
        with pytest.raises(UserError, match=expected):
            as_task(wrong)


def test_rewards_are_functions_names_and_tables() -> None:
    specs = as_rewards([letters, "correctness", {"function": letters, "name": "again"}, lambda **k: 0, lambda **k: 1])
    assert [spec.column for spec in specs] == ["letters", "correctness", "again", "lambda", "lambda_2"]
    assert reward_table(specs[0])["function"] == f"{__name__}:letters"
    assert as_rewards(letters)[0].function is letters
    with pytest.raises(UserError, match="a reward cannot be made of 3"):
        as_rewards([3])
    with pytest.raises(UserError, match="its options must be numbers"):
        reward_table(as_rewards({"function": letters, "options": {"model": object()}})[0])


def test_a_run_folder_is_named_after_the_task_and_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = unused_folder("tasks/my task.py:load")
    first.mkdir(parents=True)
    assert first.name.startswith("my-task-") and first.parent == Path("runs")
    assert unused_folder("tasks/my task.py:load") != first
