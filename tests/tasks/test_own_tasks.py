"""Rows and tasks of the user's own: data files, the table task on them, a task in one file; refusals of bad input."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from grpo.rewards.builtin import resolve_reward
from grpo.tasks import common, table
from grpo.tasks.common import Task, load_task
from tests.helpers.task_files import refusal, write_lines

# Table


def test_table_makes_the_documented_rows(tmp_path: Path) -> None:
    rows = [{"problem": "What is $2 + 2$?", "solution": "The sum is $\\boxed{4}$.", "level": 1}]
    task = load_task(
        "table",
        {
            "path": str(write_lines(tmp_path / "problems.jsonl", rows * 3)),
            "prompt": "{problem}\nPut the answer in \\boxed{{}}.",
            "system_prompt": "Think.",
            "answer": "solution",
            "answer_in": "boxed",
            "completion_answer_in": "boxed",
            "examples": [{"problem": "What is $1 + 1$?", "reply": "That is \\boxed{2}."}],
            "held_out": 1,
            "name": "sums",
        },
    )
    assert task.name == "sums" and len(task.train) == 2 and len(task.eval) == 1
    row = task.train[0]
    assert row["prompt"] == [
        {"role": "system", "content": "Think."},
        {"role": "user", "content": "What is $1 + 1$?\nPut the answer in \\boxed{}."},
        {"role": "assistant", "content": "That is \\boxed{2}."},
        {"role": "user", "content": "What is $2 + 2$?\nPut the answer in \\boxed{}."},
    ]
    assert row["answer"] == "4" and row["level"] == 1
    assert task.strict("So \\boxed{4.0}.", row) and task.flexible("So it is 4", row)
    assert not task.strict("So it is 4", row) and not task.flexible("So it is 5", row)
    score = table.matches(["\\boxed{4}", "4", "\\boxed{44}"], answer=["4"] * 3, place="boxed")
    assert score == [1.0, 0.0, 0.0]


def test_table_makes_plain_text_for_base_models(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "data.jsonl", [{"question": "2 + 2", "answer": 4}])
    example = {"question": "1 + 1", "reply": " 2"}
    task = load_task("table", {"path": str(file), "prompt": "{question} =", "chat": False, "examples": [example]})
    assert task.train[0]["prompt"] == "1 + 1 = 2\n\n2 + 2 ="
    assert task.train[0]["answer"] == "4"


def test_table_takes_a_column_of_messages(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hello {you}"}]
    file = write_lines(tmp_path / "data.jsonl", [{"messages": messages, "answer": "hi"}])
    task = load_task("table", {"path": str(file), "prompt": "{messages}", "system_prompt": "Be brief."})
    assert task.train[0]["prompt"] == [{"role": "system", "content": "Be brief."}, *messages]


def test_table_compares_numbers_only_where_both_are_numbers() -> None:
    assert table.same("1,000", "1000") and table.same("$5", "5.0") and table.same("Paris", "Paris")
    assert not table.same("(3, 2)", "(1, 2)") and not table.same("section 4", "chapter 4") and not table.same(None, "")


def test_table_names_row_and_column(tmp_path: Path) -> None:
    file = str(
        write_lines(tmp_path / "data.jsonl", [{"question": "?", "answer": "1"}, {"question": "?", "answer": "x"}])
    )
    sentence = refusal(lambda: load_task("table", {"path": file, "prompt": "{qestion}"}))
    assert "data.jsonl:1" in sentence and "qestion" in sentence and "question, answer" in sentence
    assert "data.jsonl:2" in refusal(lambda: load_task("table", {"path": file, "answer_in": "number"}))
    assert "reply" in refusal(lambda: load_task("table", {"path": file, "examples": [{"question": "?"}]}))
    assert "{{" in refusal(lambda: load_task("table", {"path": file, "prompt": "{question} \\boxed{}"}))
    assert "`path`" in refusal(lambda: load_task("table", {}))
    assert "held_out" in refusal(lambda: load_task("table", {"path": file, "held_out": 2}))


# A user's own task, and references


@pytest.fixture
def own_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "my_task.py"
    file.write_text(
        "from grpo.tasks.common import Task\n"
        "def load(word: str, count: int = 2, *, upper: bool = False):\n"
        "    rows = [{'prompt': f'Say {word}', 'answer': word}] * count\n"
        "    check = lambda text, row: row['answer'] in text\n"
        "    return Task('say', rows, [], rewards=[{'function': f'{__file__}:said'}], strict=check, flexible=check)\n"
        "def nothing():\n"
        "    return None\n"
        "def said(completions, answer):\n"
        "    return [float(a in c) for c, a in zip(completions, answer)]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "my_task", None)  # restored at the end, whatever a former test left there
    del sys.modules["my_task"]
    return file


def test_a_users_task_is_one_file(own_task: Path) -> None:
    for reference in (f"{own_task}:load", "my_task:load"):
        task = load_task(reference, {"word": "hey", "count": 3})
        assert isinstance(task, Task) and len(task.train) == 3 and task.strict("hey you", task.train[0])
        assert resolve_reward(task.rewards[0]["function"])(completions=["hey"], answer=["hey"]) == [1.0]


def test_wrong_references_and_options_are_explained(own_task: Path) -> None:
    assert "did you mean 'gsm8k'" in refusal(lambda: load_task("gsm9k"))
    assert "nowhere.py" in refusal(lambda: load_task("nowhere.py:load"))
    assert "'load'" in refusal(lambda: load_task("my_task:lod"))
    sentence = refusal(lambda: load_task("my_task:load", {"wrd": "x"}))
    assert "'wrd'" in sentence and "'word'" in sentence and "word, count, upper" in sentence
    assert "needs the option 'word'" in refusal(lambda: load_task("my_task:load"))
    assert "task.options.count = 'many'" in refusal(lambda: load_task("my_task:load", {"word": "x", "count": "many"}))
    assert "must return a Task" in refusal(lambda: load_task("my_task:nothing"))


# Reading rows

ROWS = [{"question": "1 + 1", "answer": "2"}, {"question": "naïve × 2", "answer": "4"}]


def write_rows(folder: Path, form: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if form == "jsonl":
        text = "\ufeff" + json.dumps(ROWS[0]) + "\n\n" + json.dumps(ROWS[1], ensure_ascii=False)
        (folder / "train.jsonl").write_text(text, encoding="utf-8")
    elif form == "json":
        (folder / "train.json").write_text(json.dumps(ROWS, indent=1))
    elif form == "csv":
        lines = ["question,answer", "1 + 1,2", "naïve × 2,4", ""]
        (folder / "train.csv").write_text("\n".join(lines), encoding="utf-8")
    else:
        (folder / "data").mkdir()
        for number, row in enumerate(ROWS):
            parquet.write_table(
                pyarrow.Table.from_pylist([row]), folder / "data" / f"train-0000{number}-of-00002.parquet"
            )


@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, form: str) -> None:
    write_rows(tmp_path / form, form)
    assert common.read_splits(tmp_path / form, ["question", "answer"]) == (ROWS, [])


def test_the_hub_reader_gives_the_same_rows(tmp_path: Path) -> None:
    write_rows(tmp_path / "set", "jsonl")
    (tmp_path / "set" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    write_lines(tmp_path / "set" / "test.jsonl", ROWS[:1])
    assert common.read_hub(str(tmp_path / "set"), None, ["answer"]) == (ROWS, ROWS[:1])
    assert common.read_hub(str(tmp_path / "set"), None, ["answer"], held_out=None) == (ROWS, [])
    sentence = refusal(lambda: common.read_hub(str(tmp_path / "set"), None, ["answer"], train="dev"))
    assert "'dev'" in sentence and "train" in sentence
    assert "solution" in refusal(lambda: common.read_hub(str(tmp_path / "set"), None, ["solution"]))


def test_an_unreachable_hub_names_data_set_and_remedy() -> None:
    sentence = refusal(lambda: common.read_hub("nobody/no-such-data", None, []))
    assert "nobody/no-such-data" in sentence and "path" in sentence


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "train.jsonl",
            '{"question": "a", "answer": "b"}\n{"question": "a"}\n',
            ["train.jsonl:2", "'answer'", "question"],
        ),
        ("train.jsonl", '{"question": "a", "answer": null}\n', ["train.jsonl:1", "'answer'", "null"]),
        ("train.jsonl", '{"question": "a", "answer": "b"}\n\n{"question"\n', ["train.jsonl:3", "JSON"]),
        ("train.jsonl", '{"question": "a", "answer": "b"}\n"text"\n', ["train.jsonl:2", "str"]),
        ("train.jsonl", "\n", ["train.jsonl", "no rows"]),
        ("train.json", '[{"question": "a"},\n oops]', ["train.json:2", "JSON"]),
        ("train.csv", "question,answer\na\n", ["train.csv:2", "'answer'"]),
        ("train.parquet", "not parquet", ["train.parquet", "Parquet"]),
        ("train.jsonl", b"\xff\xfe\xfd", ["train.jsonl", "read"]),
        ("rows.jsonl", "{}", ["train.jsonl", "no train"]),
    ],
)
def test_bad_files_are_named_with_their_line(
    tmp_path: Path, name: str, content: str | bytes, expected: list[str]
) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    sentence = refusal(lambda: common.read_splits(tmp_path, ["question", "answer"]))
    assert all(part in sentence for part in expected), sentence


def test_a_missing_place_is_named(tmp_path: Path) -> None:
    assert "nowhere" in refusal(lambda: common.read_splits(tmp_path / "nowhere", []))
    (tmp_path / "rows.xlsx").write_text("")
    assert ".xlsx" in refusal(lambda: common.read_splits(tmp_path / "rows.xlsx", []))
