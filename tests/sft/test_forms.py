"""grpo/sft/forms.py and token_rows.py: rows of every form as conversations or tokens, and what is no row."""

from __future__ import annotations

import csv
import json

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from transformers import AutoTokenizer

from grpo.errors import UserError
from grpo.sft.config import Sft, parse_sft_config
from grpo.sft.data import load_examples, read_rows
from grpo.sft.forms import chat_of, check_optional_columns, conversation, fill
from grpo.sft.token_rows import token_example
from tests.helpers.small_chat import TOKENS, save_byte_tokenizer

SETTINGS = Sft(path="x")
EOS = TOKENS.index("<eos>")
CALL = {"name": "look", "arguments": {"at": 1}}
AS_CALL = [{"type": "function", "function": CALL}]
ENDED = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
    "{{ eos_token if m['role'] == 'assistant' else '' }}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    found = AutoTokenizer.from_pretrained(save_byte_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    found.chat_template = ENDED
    return found


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


HI = [turn("user", "Hi"), turn("assistant", "Hello")]
SAME = {
    "parts": {"messages": [turn("user", [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]), HI[1]]},
    "nulls of Parquet": {"messages": [{**HI[0], "name": None, "tool_calls": None}, HI[1]]},
    "json in a cell": {"messages": json.dumps(HI)},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    "sharegpt, other names": {"conversations": [{"from": "User", "value": "Hi"}, {"from": "model", "value": "Hello"}]},
    "messages in conversations": {"conversations": HI},
    "alpaca without input": {"instruction": "Hi", "input": None, "output": "Hello"},
    "blank input": {"instruction": "Hi", "input": "  ", "output": "Hello"},
}


@pytest.mark.parametrize("row", SAME.values(), ids=SAME)
def test_the_same_in_other_forms(row):
    assert conversation(row, SETTINGS, "row 1")[0] == HI


def test_what_stands_beside_a_conversation_belongs_to_it():
    system = turn("system", "Be short")
    assert conversation({"messages": [turn("developer", "Be short"), *HI]}, SETTINGS, "")[0] == [system, *HI]
    assert conversation({"system": "Be short", "conversations": SAME["sharegpt"]["conversations"]}, SETTINGS, "")[0][
        0
    ] == (system)
    history = {"instruction": "Hi", "output": "Hello", "history": [["q", "a"]]}
    assert conversation(history, SETTINGS, "")[0] == [turn("user", "q"), turn("assistant", "a"), *HI]


def test_calls_of_all_kinds_are_tool_calls_with_an_object_and_tools_are_schemas():
    text = json.dumps(CALL["arguments"])
    result = turn("tool", "42")
    kinds = [
        [turn("assistant", None, tool_calls=[{"type": "function", "function": {**CALL, "arguments": text}}]), result],
        [turn("assistant", None, function_call={**CALL, "arguments": text}), turn("function", "42")],
    ]
    for middle in kinds:
        ((_, calls, seen, _), _) = conversation({"messages": [HI[0], *middle, HI[1]]}, SETTINGS, "")
        assert calls == turn("assistant", "", tool_calls=AS_CALL) and seen == result
    shared = [
        {"from": "human", "value": "Hi"},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": "42"},
        {"from": "gpt", "value": "Hello"},
    ]
    assert conversation({"conversations": shared}, SETTINGS, "")[0][1:3] == [
        turn("assistant", "", tool_calls=AS_CALL), result,
    ]  # fmt: skip
    for column, schema in (
        ("functions", {"name": "look"}),
        ("tools", {"type": "function", "function": {"name": "look"}}),
    ):
        found = chat_of({"messages": HI, column: json.dumps([schema])}, SETTINGS, "").tools
        assert found == [{"type": "function", "function": {"name": "look"}}]


BAD = [
    ({"messages": [turn("user", [{"type": "image_url", "image_url": "x"}]), HI[1]]}, "its image x cannot be read"),
    ({"messages": [turn("user", [{"type": "input_audio"}]), HI[1]]}, "no text or image but input_audio"),
    ({"messages": [HI[0], turn("assistant", "x", weight=0.5)]}, "weight 0.5 of a message must be 0 or 1"),
    ({"messages": [HI[0], turn("assistant", None, tool_calls=[{"id": "1"}])]}, 'a tool call must have a "name"'),
    ({"messages": [HI[0], turn("assistant", None, tool_calls=[{**CALL, "arguments": "at"}])]}, "no JSON object"),
    ({"messages": ["Hi", "Hello"]}, '"role" and a text'),
    ({"messages": HI, "tools": "look"}, "list of JSON schemas"),
    ({"messages": HI, "system": 3}, 'the column "system" is a int'),
    ({"instruction": "Hi", "output": "Hello", "history": ["q"]}, "a question and an answer"),
    ({"conversations": [{"from": "human", "value": "Hi"}, {"value": "Hello"}]}, "known are human"),
    ({"messages": [*HI, turn("user", "And?")]}, "does not end with an answer"),
    ({"text": "x"}, "the columns are text"),
]


@pytest.mark.parametrize(("row", "sentence"), BAD, ids=[sentence for _, sentence in BAD])
def test_what_is_no_conversation_is_named_with_its_place(row, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        chat_of(row, SETTINGS, "data.jsonl:7")
    assert str(error.value).startswith("data.jsonl:7: ")


TEMPLATE = "[[The passenger is {Sex}.]][[ They are {Age} years old[{Age}]!]] [[Fare {Fare:.1f}, class {Pclass}.]] Who?"
CELLS = st.sampled_from([None, "", "  ", float("nan"), 0, 7.25, "male"])


@given(sex=CELLS, age=CELLS, fare=st.sampled_from([None, 7.25, 0.0]), pclass=CELLS)
def test_a_part_in_double_brackets_stands_exactly_where_all_its_columns_say_something(sex, age, fare, pclass):
    row = {"Sex": sex, "Age": age, "Fare": fare, "Pclass": pclass}
    there = {
        name: not (value is None or value != value or (isinstance(value, str) and not value.strip()))
        for name, value in row.items()
    }
    if not any(there.values()):
        return
    expected = f"The passenger is {sex}." if there["Sex"] else ""
    expected += f" They are {age} years old[{age}]!" if there["Age"] else ""
    expected += " " + (f"Fare {fare:.1f}, class {pclass}." if there["Fare"] and there["Pclass"] else "") + " Who?"
    if there["Sex"] or there["Age"] or (there["Fare"] and there["Pclass"]):
        assert fill(TEMPLATE, row, "row 1") == expected


def test_double_brackets_without_a_column_are_text_and_a_column_that_no_row_has_is_named(tokenizer):
    assert fill("Sum [[1, 2], [3, 4]] and {x}", {"x": 5}, "row 1") == "Sum [[1, 2], [3, 4]] and 5"
    settings = Sft(path="x", prompt="{a}[[ {agee}]]", completion="{b}")
    rows = [{"a": "1", "b": "2", "age": "3"}]
    with pytest.raises(UserError, match="no row has the column 'agee'.*the columns are a, b, age"):
        load_examples(settings, rows, tokenizer, [EOS], 0)
    data = load_examples(settings, [*rows, {**rows[0], "agee": "4"}], tokenizer, [EOS], 0)
    assert data.notices == ["columns that nothing was made of: age"] and len(data.examples) == 2


def test_json_lines_json_csv_and_parquet_are_the_same_rows(tmp_path, tokenizer):
    rows = [{"question": f"What is {n}?", "hint": "" if n % 2 else "think", "answer": str(n)} for n in range(5)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = []
    for ending in ("jsonl", "json", "csv", "parquet"):
        sft = Sft(
            path=tmp_path / f"a.{ending}",
            prompt="{question}[[ ({hint})]]",
            completion="{answer}",
            conversation_extension=2,
        )
        found.append(load_examples(sft, read_rows(sft, "train"), tokenizer, [EOS], seed=3))
    assert all(data == found[0] for data in found) and len(found[0].examples) == 3
    text = tokenizer.decode(found[0].examples[0].input_ids)
    assert text.count("user: What is") == 2 == text.count("<eos>") and "(think)" in "".join(
        tokenizer.decode(each.input_ids) for each in found[0].examples
    )


def test_rows_are_drawn_by_the_seed_and_each_is_used_once(tokenizer):
    rows = [{"prompt": f"q{n}", "completion": f"a{n}"} for n in range(6)]
    first, again, other = (
        load_examples(Sft(path="x", conversation_extension=3), rows, tokenizer, [EOS], seed).examples
        for seed in (0, 0, 1)
    )
    assert first == again != other and len(first) == 2
    said = "".join(tokenizer.decode(each.input_ids) for each in first)
    assert all(said.count(f"a{n}<eos>") == 1 for n in range(6))
    rows[1]["tools"] = [{"name": "look"}]
    with pytest.raises(UserError, match="other tools than .*set sft.conversation_extension = 1"):
        load_examples(Sft(path="x", conversation_extension=6), rows, tokenizer, [EOS], 0)


def test_the_earlier_name_of_a_key_is_taken():
    tables = {"model": {"name": "m"}, "sft": {"path": "x", "turns_per_conversation": 2}}
    assert parse_sft_config(tables).sft.conversation_extension == 2
    with pytest.raises(UserError, match="turns_per_conversation"):
        parse_sft_config({**tables, "sft": {**tables["sft"], "conversation_extension": 2}})
    with pytest.raises(UserError, match="every token"):
        parse_sft_config({**tables, "sft": {"path": "x", "train_on": "last", "completion_only_loss": False}})


# Rows of tokens


def test_rows_of_tokens_are_trained_on_as_they_are(tokenizer):
    rows = [
        {"input_ids": [5, 6, 7, EOS], "labels": [-100, -100, 7, EOS]},
        {"input_ids": "[5, 6, 0, 0]", "attention_mask": [1, 1, 0, 0]},
    ]
    tokenizer.chat_template, kept = None, tokenizer.chat_template
    try:
        data = load_examples(SETTINGS, rows, tokenizer, [EOS], 0)
    finally:
        tokenizer.chat_template = kept
    assert [each.input_ids for each in data.examples] == [[5, 6, 7, EOS], [5, 6]]
    assert [each.labels for each in data.examples] == [[-100, -100, 7, EOS], [5, 6]]
    assert data.notices[0].startswith("1 of 2 sequences do not end with a token that ends generation (<eos> (1))")
    with pytest.raises(UserError, match="sft.system_prompt makes nothing"):
        load_examples(Sft(path="x", system_prompt="s"), rows, tokenizer, [EOS], 0)
    with pytest.raises(UserError, match="row 3: there is no input_ids"):
        load_examples(SETTINGS, [*rows, {"text": "x"}], tokenizer, [EOS], 0)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"input_ids": []}, "input_ids is empty"),
        ({"input_ids": [1, 2], "labels": [1]}, "labels has 1 entries and input_ids 2"),
        ({"input_ids": [1, -2]}, "-2, which is no token"),
        ({"input_ids": [1, 2], "labels": [1, -1]}, "labels has -1"),
        ({"input_ids": [1, 2], "labels": [1, -100]}, "no label after the first token"),
        ({"input_ids": [1, 2.5]}, "'2.5', which is no token number"),
        ({"input_ids": [[1, 2], [3, 4]]}, "several codebooks at once are not supported"),
        ({"input_ids": "abc"}, "must be a list of token numbers"),
        ({"input_ids": [1, 2], "attention_mask": [1, 2]}, "other values than 0 and 1"),
    ],
)
def test_tokens_that_do_not_fit_are_named(row, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        token_example(row, "row 4")
    assert str(error.value).startswith("row 4: ")


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{a}[[ with {b}", "an optional part without its end; add ]]"),
        ("{a}[[ x ]] and [[ {b}", "an optional part without its end"),
        ("{a}[[ with [[{b}]]]]", "an optional part within another"),
        ("{a}[[ see [[link]] ]]", ""),
        ("{a} [[link]] {b} [[", ""),
        ("{a}[[, {b}]][[ ({a})]]", ""),
    ],
)
def test_brackets_that_are_no_optional_part_are_named(template: str, sentence: str) -> None:
    rows = [{"a": "1", "b": "2", "out": "z"}]
    settings = Sft(path="x", prompt=template, completion="{out}")
    if not sentence:
        check_optional_columns(settings, rows, "")
        return
    with pytest.raises(UserError) as caught:
        check_optional_columns(settings, rows, "")
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
