"""Broken configuration files, tasks, data, rewards, losses and run folders, each with what has to be said of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.helpers.bad_cases import Tables, case, put

# The configuration file


@case("config.toml:", "not valid TOML", "line")
def a_file_that_is_not_toml(home: Path) -> None:
    put(home / "config.toml", "[model\nname = 3")


@case("config.toml: cannot be read as text", "pass the path of a .toml file")
def a_file_that_is_not_text(home: Path) -> None:
    put(home / "config.toml", b"\xff\xfe\x00\x00")


# Tasks and data


def table(home: Path, name: str, content: str | bytes) -> Tables:
    put(home / name, content)
    return {"task": {"name": "table", "options": {"path": str(home / name)}}}


def own_task(home: Path, body: str) -> Tables:
    put(home / "mine.py", body)
    return {"task": {"name": f"{home / 'mine.py'}:load"}}


GOOD = '{"question": "1 + 1?", "answer": "2"}\n'


@case("'arithmetics'", "'arithmetic'")
def a_misspelt_task(home: Path) -> Tables:
    return {"task": {"name": "arithmetics"}}


@case("has no option 'row'", "did you mean 'rows'?")
def a_misspelt_option_of_a_task(home: Path) -> Tables:
    return {"task": {"options": {"row": 2}}}


@case("task.options.rows = 'two'", "integer")
def an_option_of_a_wrong_type(home: Path) -> Tables:
    return {"task": {"options": {"rows": "two"}}}


@case("set one of the options `path`")
def a_missing_option(home: Path) -> Tables:
    return {"task": {"name": "table"}}


@case("does not exist", "train.jsonl")
def data_that_do_not_exist(home: Path) -> Tables:
    return {"task": {"name": "table", "options": {"path": str(home / "nowhere.jsonl")}}}


@case("rows.jsonl:3: not valid JSON", "write one object a line")
def a_line_that_is_not_json(home: Path) -> Tables:
    return table(home, "rows.jsonl", GOOD * 2 + "{'question': 1}\n" + GOOD)


@case("rows.jsonl:2: a list where a row should be", "one JSON object a row")
def a_line_that_is_no_object(home: Path) -> Tables:
    return table(home, "rows.jsonl", GOOD + "[1]\n")


@case("rows.json:1: not valid JSON", "correct it")
def an_array_that_is_not_json(home: Path) -> Tables:
    return table(home, "rows.json", "[{]")


@case("rows.jsonl:2: column 'answer' is missing", "the columns are question")
def a_row_without_a_column(home: Path) -> Tables:
    return table(home, "rows.jsonl", GOOD + '{"question": "?"}\n')


@case("rows.jsonl:1: column 'answer' is null")
def a_row_with_null(home: Path) -> Tables:
    return table(home, "rows.jsonl", '{"question": "?", "answer": null}\n')


@case("rows.csv:2: column 'answer' is missing", "the columns are question, result")
def a_csv_without_a_column(home: Path) -> Tables:
    return table(home, "rows.csv", "question,result\n1+1?,2\n")


@case("rows.jsonl: no rows in it")
def an_empty_data_set(home: Path) -> Tables:
    return table(home, "rows.jsonl", "")


@case("rows.xlsx: cannot read .xlsx", "use one of .jsonl")
def data_of_another_kind(home: Path) -> Tables:
    return table(home, "rows.xlsx", b"PK")


@case("rows.parquet: not a Parquet file", "is it complete?")
def a_damaged_parquet_file(home: Path) -> Tables:
    return table(home, "rows.parquet", b"PAR1" + b"\0" * 50)


@case("rows.jsonl: cannot be read", "is it really .jsonl?")
def data_that_are_not_text(home: Path) -> Tables:
    return table(home, "rows.jsonl", b"\xff\xfe{")


@case("rows.jsonl:1: not valid JSON")
def a_row_of_brackets(home: Path) -> Tables:
    return table(home, "rows.jsonl", '{"a": ' + "[" * 100_000)


@case("in this folder", "name the training file so")
def a_folder_without_a_training_file(home: Path) -> Tables:
    (home / "data").mkdir()
    return {"task": {"name": "table", "options": {"path": str(home / "data")}}}


@case("longer than rollout.max_prompt_length = 4", "raise it")
def prompts_that_are_all_too_long(home: Path) -> Tables:
    return {"rollout": {"max_prompt_length": 4}}


@case("training row 1", 'overlong = "drop"')
def a_prompt_that_is_too_long(home: Path) -> Tables:
    rows = '{"question": "' + "1 + " * 200 + '1?", "answer": "201"}\n' + GOOD
    changes = table(home, "rows.jsonl", rows)
    changes["task"]["overlong"] = "error"
    return changes


@case("there is no file", "mine.py", "relative to the working folder")
def a_task_file_that_does_not_exist(home: Path) -> Tables:
    return {"task": {"name": f"{home / 'mine.py'}:load"}}


@case("mine.py", "SyntaxError", "mine.py:2")
def a_task_file_with_a_mistake(home: Path) -> Tables:
    return own_task(home, "\ndef load(:\n")


@case("mine.py", "no_such_module")
def a_task_file_that_imports_what_is_not_there(home: Path) -> Tables:
    return own_task(home, "import no_such_module\n")


@case("mine.py", "'load'")
def a_task_file_without_the_function(home: Path) -> Tables:
    return own_task(home, "def lode():\n    pass\n")


@case("mine.py:load' returned a NoneType", "must return a Task")
def a_task_function_that_returns_nothing(home: Path) -> Tables:
    return own_task(home, "def load():\n    pass\n")


@case("failed at", "mine.py:2", "ZeroDivisionError", "mend it")
def a_task_function_that_raises(home: Path) -> Tables:
    return own_task(home, "def load():\n    return 1 / 0\n")


OWN = """
from grpo.tasks.common import Task
def load():
    right = lambda text, row: True
    return Task("mine", train={rows}, eval=[], rewards=[], strict=right, flexible=right)
"""


@case("training row 2", '"prompt" must be text or a list of messages')
def a_prompt_that_is_a_number(home: Path) -> Tables:
    return own_task(home, OWN.format(rows='[{"prompt": "a"}, {"prompt": 3}]'))


@case("task 'mine' has no training rows", "check its options")
def a_task_without_rows(home: Path) -> Tables:
    return own_task(home, OWN.format(rows="[]"))


@case("a plain-text prompt takes no system_prompt", "remove it from [task]")
def a_system_prompt_for_plain_text(home: Path) -> Tables:
    changes = own_task(home, OWN.format(rows='[{"prompt": "a"}]'))
    changes["task"]["system_prompt"] = "Be brief."
    return changes


@case("no held-out rows to evaluate on", "unset eval.every")
def an_evaluation_without_rows(home: Path) -> Tables:
    return {**own_task(home, OWN.format(rows='[{"prompt": "a"}]')), "eval": {"every": 1}}


@case("suggests no rewards", "[[rewards]]")
def neither_rewards_nor_suggestions(home: Path) -> Tables:
    return {**own_task(home, OWN.format(rows='[{"prompt": "a"}]')), "rewards": []}


# Rewards, loss, trackers


def reward(function: str, **keys: Any) -> Tables:
    return {"rewards": [{"function": function, **keys}]}


@case("'corectness'", "'correctness'")
def a_misspelt_reward(home: Path) -> Tables:
    return reward("corectness")


@case("there is no file", "nowhere.py", "relative to the working folder")
def a_reward_file_that_does_not_exist(home: Path) -> Tables:
    return reward(f"{home / 'nowhere.py'}:f")


@case("scores.py", "'scre'", "score")
def a_reward_file_without_the_function(home: Path) -> Tables:
    return reward(f"{home / 'scores.py'}:scre")


@case("mine.py", "SyntaxError")
def a_reward_file_with_a_mistake(home: Path) -> Tables:
    put(home / "mine.py", "def f(:\n")
    return reward(f"{home / 'mine.py'}:f")


@case("mine.py:1", "RuntimeError: not today")
def a_reward_file_that_raises(home: Path) -> Tables:
    put(home / "mine.py", "raise RuntimeError('not today')\n")
    return reward(f"{home / 'mine.py'}:f")


@case("no_such_module")
def a_reward_module_that_does_not_exist(home: Path) -> Tables:
    return reward("no_such_module.inside:f")


@case("'wants_a_column'", "solution", "neither a column of the data")
def a_reward_that_asks_for_a_column_that_is_not_there(home: Path) -> Tables:
    return reward(f"{home / 'scores.py'}:wants_a_column")


@case("reward 'f': its process ended itself with exit code 7 while loading", "mend what its file does at import")
def a_reward_file_that_ends_its_process(home: Path) -> Tables:
    put(home / "mine.py", "import os\nos._exit(7)\n")
    return reward(f"{home / 'mine.py'}:f")


@case("there is no file", "no_such.py")
def a_loss_that_does_not_exist(home: Path) -> Tables:
    return {"loss": {"function": "no_such.py:loss"}}


@case("loss.function", "is no reference", "loss_type")
def a_loss_that_is_no_reference(home: Path) -> Tables:
    return {"loss": {"function": "ppo"}}


# Run folders


@case("already exists", "--resume", "--output")
def a_run_folder_that_exists(home: Path) -> None:
    (home / "run").mkdir()
    (home / "run" / "metrics.jsonl").touch()


@case("already exists", "--output")
def a_file_in_place_of_the_run_folder(home: Path) -> None:
    (home / "run").touch()


@case("cannot be written", "--output")
def a_run_folder_in_a_file(home: Path) -> Tables:
    return {"checkpoint": {"output_dir": str(home / "scores.py" / "run")}}


@case("/proc/run: cannot be written", "--output")
def a_run_folder_where_nothing_can_be_written(home: Path) -> Tables:
    return {"checkpoint": {"output_dir": "/proc/run"}}
