"""Python objects as tasks and rewards, and what the configuration says of them."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from grpo.api.arguments import EXPORT_NAMES, EXPORT_OPTIONS, as_folder, check_export, check_sampling
from grpo.api.inputs import as_rewards, as_task, reward_table
from grpo.api.loaded_policy import unused_folder
from grpo.errors import UserError
from grpo.export.build import export


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


SAMPLING = {"temperature": 0.0, "max_tokens": 8, "top_p": 1.0, "n": 1, "seed": None}


@hypothesis.given(
    st.sampled_from(sorted(SAMPLING)), st.sampled_from(["1", None, True, [], {}, 1.5, -1, 0, float("nan"), 1 << 70])
)
def test_an_argument_of_generate_is_taken_or_named(name: str, value: Any) -> None:
    try:
        check_sampling(**{**SAMPLING, name: value})
    except UserError as error:
        assert str(error).startswith(f"{name} = ")
    else:
        assert isinstance(value, int | float | None) and not isinstance(value, bool)


@pytest.mark.parametrize("folder", [3, None, "", b"x", Path(__file__)])
def test_a_folder_that_is_none_is_refused(folder: Any) -> None:
    with pytest.raises(UserError, match="^policy.save_lora: "):
        as_folder(folder, "policy.save_lora")


@pytest.mark.parametrize(
    ("to", "options", "words"),
    [
        (object(), {}, "the tokenizer is written with the model"),
        ("gguf", {"quantization_method": "q4_k_m"}, 'write to="gguf", gguf_type="q8_0"'),
        ("merged-16bit", {"save_method": "merged_16bit"}, 'write to="merged-16bit"'),
        ("gguf", {"source": "x"}, "there are to, base, gguf_type"),
        ("gguf", {"zzz": 1}, "there is no argument 'zzz'"),
    ],
)
def test_an_export_is_written_as_here(to: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match="^policy.save_merged: ") as error:
        check_export(to, options, inspect.signature(export))
    assert words in str(error.value)


def test_exports_options_are_those_of_export() -> None:
    taken = set(inspect.signature(export).parameters) - {"source", "out", "checkpoint"}
    assert set(EXPORT_OPTIONS) == taken and not set(EXPORT_NAMES) & taken
    check_export("gguf", {"gguf_type": "q8_0", "check": False}, inspect.signature(export))
