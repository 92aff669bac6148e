"""What a question or a gold answer may be: text or a number that is there, in whatever format the rows are stored."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from grpo.api.inputs import as_task
from grpo.data import load_data
from grpo.errors import UserError
from grpo.tasks.cells import columns_of, filled, gold_text, reach
from grpo.tasks.common import load_task, read_splits
from grpo.tasks.table import matches
from tests.helpers.task_files import refusal, write_lines
from tests.test_data import configuration, tokenizer

names = st.text(alphabet="abc.", min_size=1, max_size=5)
values = st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda inner: st.dictionaries(names, inner, max_size=3) | st.lists(inner, max_size=3),
    max_leaves=8,
)


def paths(value: Any, before: str = "") -> list[str]:
    """The dotted name of everything in `value`."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [p for name, entry in inside for p in (f"{before}{name}", *paths(entry, f"{before}{name}."))]


@given(st.dictionaries(names, values, max_size=3))
def test_every_entry_of_a_row_has_a_dotted_name(row: dict[str, Any]) -> None:
    for path in paths(row):
        found = reach(row, path)
        if sum(other == path for other in paths(row)) == 1 and path in row:
            assert found == row[path]
    plain = [path for path in paths(row) if not any("." in name for name in keys(row))]
    for path in plain:
        expected: Any = row
        for name in path.split("."):
            expected = expected[int(name)] if isinstance(expected, list) else expected[name]
        assert reach(row, path) == expected
    with pytest.raises(KeyError):
        reach(row, "z.z")


def keys(value: Any) -> list[str]:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [*(value if isinstance(value, dict) else ()), *(name for entry in inside for name in keys(entry))]


def test_a_name_with_dots_comes_before_a_nested_column() -> None:
    row = {"a.b": 1, "a": {"b": 2, "c": [3, {"d": 4}]}, "text": '{"gold": {"value": "5"}}'}
    assert [reach(row, name) for name in ("a.b", "a.c.0", "a.c.1.d", "text.gold.value")] == [1, 3, 4, "5"]
    assert columns_of(row) == "a.b, a.b, a.c, text.gold"


no_text_or_number = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([math.nan, math.inf, -math.inf, numpy.float32("nan")]),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.just("a"), st.integers(), max_size=1),
    st.binary(max_size=3),
    st.complex_numbers(max_magnitude=3),
)
text_or_number = st.one_of(
    st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(min_size=1).filter(str.strip),
    st.integers(-99, 99).map(numpy.int64), st.just(10**400),
)  # fmt: skip
blank = st.text(alphabet=" \t\n\u00a0\u3000", max_size=3)


@given(no_text_or_number | blank)
def test_what_is_no_text_or_number_is_neither_a_gold_answer_nor_a_question(value: Any) -> None:
    for use in (lambda row: gold_text(row, "c", "f:1"), lambda row: filled("Q: {c}", row, "f:1")):
        assert refusal(lambda use=use: use({"c": value, "d": "2"})).startswith("f:1: ")
        with pytest.raises(UserError, match="f:1: .*'c'.*the columns are d"):
            use({"d": "2"})


@given(text_or_number)
def test_text_and_numbers_are_what_they_are_written_as(value: Any) -> None:
    assert gold_text({"c": value}, "c", "f:1") == filled("{c}", {"c": value}, "f:1") == str(value)


def test_one_of_several_columns_may_be_empty() -> None:
    assert filled("{a}\n{b}", {"a": "What?", "b": ""}, "f:1") == "What?\n"
    assert "'a' and 'b'" in refusal(lambda: filled("{a}\n{b}", {"a": " ", "b": ""}, "f:1"))
    assert "'b'" in refusal(lambda: filled("{a}\n{b}", {"a": "What?", "b": None}, "f:1"))
    assert filled("{a[b]} {a.b:>2} {{}}", {"a": {"b": 1}}, "f:1") == "1  1 {}"


# Through the tasks


@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "parquet"])
@pytest.mark.parametrize("column", ["question", "answer"])
@pytest.mark.parametrize("value", [None, "", " ", math.nan])
def test_a_row_without_question_or_gold_answer_is_refused_with_its_place(
    tmp_path: Path, form: str, column: str, value: Any
) -> None:
    good: dict[str, Any] = {"question": "1 + 1?", "answer": "2"}
    rows = [good, {**good, column: value}]
    file = tmp_path / f"rows.{form}"
    if form == "jsonl":
        write_lines(file, rows)
    elif form == "json":
        file.write_text(json.dumps(rows))
    elif form == "csv":
        with file.open("w", newline="") as lines:
            writer = csv.DictWriter(lines, ["question", "answer"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        numeric = isinstance(value, float)
        columns = {name: [row[name] for row in rows] for name in good}
        columns[column] = [2.0, value] if numeric else columns[column]
        parquet.write_table(pyarrow.table(columns), file)
    place = {"jsonl": "rows.jsonl:2", "csv": "rows.csv:3"}.get(form, f"rows.{form}, row 2")
    sentence = refusal(lambda: load_task("table", {"path": str(file)}))
    assert f"{place}: " in sentence and column in sentence


def test_a_question_of_chat_messages_is_looked_into(tmp_path: Path) -> None:
    for content, said in ((None, '"prompt" must be'), (" ", "its question is empty")):
        row = {"messages": [{"role": "user", "content": content}], "answer": "1"}
        file = str(write_lines(tmp_path / "rows.jsonl", [row]))
        sentence = refusal(lambda file=file: load_task("table", {"path": file, "prompt": "{messages}"}))
        assert "rows.jsonl:1: " in sentence and said in sentence


@pytest.mark.parametrize(("place", "text"), [("boxed", "\\boxed{}"), ("xml", "<answer> </answer>"), ("hash", "#### ")])
def test_an_empty_place_holds_no_gold_answer(tmp_path: Path, place: str, text: str) -> None:
    file = str(write_lines(tmp_path / "rows.jsonl", [{"question": "?", "answer": text}]))
    assert "rows.jsonl:1: an empty" in refusal(lambda: load_task("table", {"path": file, "answer_in": place}))
    assert matches(["<answer></answer>"] * 3, answer=["", None, " "]) == [None, None, None]


def test_nested_columns_as_verl_has_them(tmp_path: Path) -> None:
    row = {
        "data_source": "sums",
        "prompt": [{"role": "user", "content": "1 + 1?"}],
        "reward_model": {"style": "rule", "ground_truth": "2"},
        "extra_info": {"question": "1 + 1?", "index": 0},
    }
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "train.parquet")
    options = {"path": str(tmp_path), "answer": "reward_model.ground_truth", "prompt": "{prompt}"}
    made = load_task("table", options).train[0]
    assert made == row | {"answer": "2"}
    asked = load_task("table", options | {"prompt": "Q: {extra_info.question}"}).train[0]
    assert asked["prompt"] == [{"role": "user", "content": "Q: 1 + 1?"}]
    sentence = refusal(lambda: load_task("table", options | {"answer": "reward_model.truth"}))
    assert "train.parquet, row 1: column 'reward_model.truth' is missing" in sentence
    assert "reward_model.ground_truth" in sentence


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": " ", "answer": "2"}, "its question is empty"),
        ({"prompt": [{"role": "user", "content": ""}], "answer": "2"}, "its question is empty"),
        ({"prompt": "one", "answer": " "}, "column 'answer' is empty"),
        ({"prompt": "one", "answer": math.nan}, "column 'answer' is NaN"),
        ({"prompt": "one", "ground_truth": ""}, "column 'ground_truth' is empty"),
        ({"prompt": "one", None: ["x"]}, "a column is called None"),
    ],
)
def test_rows_of_any_task_are_looked_into(row: dict[Any, Any], said: str) -> None:
    task, table = as_task([{"prompt": "two", "answer": "2"}, row])
    sentence = refusal(lambda: load_data(configuration(table), tokenizer(None), tasks=[task]))
    assert sentence.startswith("task 'rows', training row 2: ") and said in sentence


def test_a_row_to_which_no_gold_answer_applies_is_taken() -> None:
    task, table = as_task([{"prompt": "two", "answer": "2"}, {"prompt": "one", "answer": None}])
    assert len(load_data(configuration(table), tokenizer(None), tasks=[task]).train) == 2


# CSV and JSON whose columns are not what they seem


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("question,answer\n2,000 + 1?,2001\n", "rows.csv:2: more fields than the header; quote the comma"),
        ('question,answer\n"a\nb",1\n\nc,d,1\n', "rows.csv:5: more fields than the header"),
        ("question,level,answer\na,1\n", "rows.csv:2: fewer fields than the header, 'answer' is missing"),
        ('question,answer\na,1\n"b,2\nc,3\n', "rows.csv:3: not valid CSV"),
        ("question,answer,answer\na,1,2\n", "rows.csv:1: two columns are called 'answer'"),
    ],
)
def test_a_csv_whose_fields_are_not_its_columns(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "rows.csv").write_text(content)
    assert said in refusal(lambda: read_splits(tmp_path / "rows.csv", ["question", "answer"]))


cell = st.text(alphabet='a1,";\n é', max_size=6)


@given(st.lists(st.tuples(cell, cell), min_size=1, max_size=5), st.sampled_from(["\n", "\r\n"]))
def test_a_csv_that_is_quoted_right_is_read_back(tmp_path_factory: Any, rows: list[Any], ending: str) -> None:
    file = tmp_path_factory.mktemp("csv") / "rows.csv"
    with file.open("w", newline="", encoding="utf-8") as lines:
        csv.writer(lines, lineterminator=ending).writerows([("q", "b"), *rows])
    read, _ = read_splits(file, [])
    assert [(row["q"], row["b"]) for row in read] == rows


def test_a_name_that_occurs_twice_in_a_json_row(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a": {"b": 1, "b": 2}}\n')
    assert "rows.jsonl:2: not valid JSON ('b' occurs twice" in refusal(lambda: read_splits(tmp_path / "rows.jsonl", []))
