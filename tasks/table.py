r"""Your own questions, described in the configuration alone: JSON, JSON lines, Parquet, CSV or a hub data set.

A row {"problem": "What is $2 + 2$?", "solution": "The sum is $\\boxed{4}$."} of train.jsonl, and

    [task]
    name = "table"
    [task.options]
    path = "data/my_problems"
    prompt = "{problem}\nPut the answer in \\boxed{{}}."
    answer = "solution"
    answer_in = "boxed"             # where the gold answer is in its column
    completion_answer_in = "boxed"  # where the completion should have it
    examples = [{ problem = "What is $1 + 1$?", reply = "That is \\boxed{2}." }]

give

    prompt: [{"role": "user", "content": "What is $1 + 1$?\nPut the answer in \\boxed{}."},
             {"role": "assistant", "content": "That is \\boxed{2}."},
             {"role": "user", "content": "What is $2 + 2$?\nPut the answer in \\boxed{}."}]
    answer: "4"                     # and the row's other columns, for rewards that ask for them

Rows that need more than a template are a task in Python: a function that returns a `Task`.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from grpo.errors import UserError
from grpo.messages import content_text
from grpo.rewards.extract import boxed_answer, completion_text, hash_answer, is_no_answer, last_number, xml_answer
from grpo.tasks.cells import check_question, checked_prompt, filled, gold_text, is_blank, reach
from grpo.tasks.common import Row, Task, read_hub, read_splits
from grpo.tasks.image_paths import with_image_paths

Place = Literal["text", "xml", "boxed", "hash", "number"]
"""Where an answer is: all of the text, `<answer>` tags, `\\boxed{}`, after `####`, or the last number."""

EXTRACT: dict[Place, Callable[[str], str | None]] = {
    "text": str.strip,
    "xml": lambda text: xml_answer(text) if "<answer>" in text else None,
    "boxed": boxed_answer,
    "hash": hash_answer,
    "number": lambda text: None if (number := last_number(text)) is None else str(number),
}


def load(
    path: str | None = None,
    hub: str | None = None,
    subset: str | None = None,
    train_split: str = "train",
    eval_split: str | None = "test",
    prompt: str = "{question}",
    system_prompt: str | None = None,
    examples: list[dict[str, Any]] | None = None,
    chat: bool = True,
    answer: str = "answer",
    answer_in: Place = "text",
    completion_answer_in: Place = "xml",
    held_out: int = 0,
    images: str | None = None,
    name: str = "table",
) -> Task:
    """The rows of `path` (a folder with train.* and test.*, or one file) or of the data set `hub`, `subset`.

    `prompt` is filled with the row's columns; "{column}" alone may be a column of chat messages. Dots lead into nested
    columns, in `prompt` and in `answer`: "reward_model.ground_truth". A question or gold answer that is missing, empty,
    NaN, or no text or number is refused with its place. `examples` are rows
    whose `reply` is shown before the question. `chat = false` makes plain-text prompts, for base models. Without an
    evaluation split (`eval_split = ""`), `held_out` rows are taken from the end of the training rows. The columns
    `image` and `images` show an image or a list of them before the question, or where it says "<image>"; `images` is
    another column that does. Relative paths start at the file that has the row. `name` tells several tables apart.
    """
    shown = [{"role": "system", "content": system_prompt}] if system_prompt else []
    for number, example in enumerate(examples or [], 1):
        where = f"task {name}, example {number}"
        shown += fill(prompt, example, where)
        shown.append({"role": "assistant", "content": filled("{reply}", example, where)})

    def make(row: Row, where: str) -> Row:
        row = with_image_paths(row, where, None if path is None else Path(path).expanduser(), images)
        messages = shown + fill(prompt, row, where)
        gold = gold_answer(row, answer, answer_in, where)
        return row | {"prompt": messages if chat else plain_text(messages), "answer": gold}

    if path is not None and hub is None:
        train, test = read_splits(path, [answer], train_split, eval_split, make)
    elif hub is not None and path is None:
        train, test = read_hub(hub, subset, [answer], train_split, eval_split, make)
    else:
        raise UserError(f"task {name}: set one of the options `path` (a file or folder) and `hub` (a data set id)")
    if not test and held_out > 0:
        if held_out >= len(train):
            raise UserError(
                f"task {name}: held_out = {held_out} leaves none of {len(train)} rows to train on; lower it"
            )
        train, test = train[:-held_out], train[-held_out:]
    return Task(
        name,
        train,
        test,
        rewards=[{"function": "grpo.tasks.table:matches", "options": {"place": completion_answer_in}}],
        strict=functools.partial(strict, place=completion_answer_in),
        flexible=flexible,
    )


def gold_answer(row: Row, column: str, place: Place, where: str) -> str:
    """The gold answer at `place` of the text in `column`. Raises UserError where there is none."""
    gold = EXTRACT[place](gold_text(row, column, where))
    if gold is None or is_blank(gold):
        state = "no" if gold is None else "an empty"
        raise UserError(f"{where}: {state} {place} answer in the column {column!r}; correct it or `answer_in`")
    return gold


def fill(template: str, row: Row, where: str) -> list[dict[str, Any]]:
    """The template with the row's columns in it, as a user's turn; or the messages that a column holds."""
    only = re.fullmatch(r"\{([\w.]+)\}", template)
    if only:
        with contextlib.suppress(KeyError):
            messages = reach(row, only[1])
            if isinstance(messages, list) and messages and isinstance(messages[0], dict):
                check_question(checked_prompt(messages, where), where)
                return messages
    return [{"role": "user", "content": filled(template, row, where)}]


def plain_text(messages: Sequence[dict[str, Any]]) -> str:
    """A chat as text: turns a blank line apart, each reply right after its question."""
    text = ""
    for message in messages:
        text += "\n\n" if text and message["role"] != "assistant" else ""
        text += content_text(message["content"])
    return text


def same(answer: str | None, gold: str) -> bool:
    """`answer` is the gold text or, where both are bare numbers, the gold number."""
    if answer is None or is_blank(gold):
        return False
    if answer == gold:
        return True
    bare = re.compile(r"\$?[-+−]?[\d,]*\.?\d+(/\d+)?\s?%?", re.ASCII)
    return bool(bare.fullmatch(answer) and bare.fullmatch(gold)) and last_number(answer) == last_number(gold)


def strict(text: str, row: Row, place: Place) -> bool:
    """The gold answer stands where the completion should have it."""
    return same(EXTRACT[place](text), row["answer"])


def flexible(text: str, row: Row) -> bool:
    """The gold answer stands in any of the places that `EXTRACT` knows."""
    return any(same(extract(text), row["answer"]) for extract in EXTRACT.values())


def matches(completions: list, answer: list, place: Place = "xml", **_: Any) -> list[float | None]:
    """1 where the gold answer stands at `place` of the completion, else 0; None where there is no gold answer."""
    return [
        None if is_no_answer(gold) else float(same(EXTRACT[place](completion_text(completion)), gold))
        for completion, gold in zip(completions, answer, strict=True)
    ]
