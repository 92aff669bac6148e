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

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

from grpo.errors import UserError
from grpo.rewards.extract import boxed_answer, completion_text, hash_answer, last_number, xml_answer
from grpo.tasks.common import Row, Task, read_hub, read_splits

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
    name: str = "table",
) -> Task:
    """The rows of `path` (a folder with train.* and test.*, or one file) or of the data set `hub`, `subset`.

    `prompt` is filled with the row's columns; "{column}" alone may be a column of chat messages. `examples` are rows
    whose `reply` is shown before the question. `chat = false` makes plain-text prompts, for base models. Without an
    evaluation split (`eval_split = ""`), `held_out` rows are taken from the end of the training rows. `name` tells
    several tables apart.
    """
    if path is not None and hub is None:
        train, test = read_splits(path, [answer], train_split, eval_split)
    elif hub is not None and path is None:
        train, test = read_hub(hub, subset, [answer], train_split, eval_split)
    else:
        raise UserError(f"task {name}: set one of the options `path` (a file or folder) and `hub` (a data set id)")
    if not test and held_out > 0:
        if held_out >= len(train):
            raise UserError(
                f"task {name}: held_out = {held_out} leaves none of {len(train)} rows to train on; lower it"
            )
        train, test = train[:-held_out], train[-held_out:]
    shown = [{"role": "system", "content": system_prompt}] if system_prompt else []
    for number, example in enumerate(examples or [], 1):
        where = f"task {name}, example {number}"
        shown += fill(prompt, example, where)
        shown.append({"role": "assistant", "content": fill("{reply}", example, where)[0]["content"]})

    def rows(raw: Sequence[Row], split: str) -> list[Row]:
        made = []
        for number, row in enumerate(raw, 1):
            where = f"task {name}, {split} row {number}"
            messages = shown + fill(prompt, row, where)
            gold = EXTRACT[answer_in](str(row[answer]))
            if gold is None:
                raise UserError(f"{where}: no {answer_in} answer in the column {answer!r}; correct it or `answer_in`")
            made.append(row | {"prompt": messages if chat else plain_text(messages), "answer": gold})
        return made

    return Task(
        name,
        rows(train, "training"),
        rows(test, "held-out"),
        rewards=[{"function": "grpo.tasks.table:matches", "options": {"place": completion_answer_in}}],
        strict=functools.partial(strict, place=completion_answer_in),
        flexible=flexible,
    )


def fill(template: str, row: Row, where: str) -> list[dict[str, Any]]:
    """The template with the row's columns in it, as a user's turn; or the messages that a column holds."""
    only = re.fullmatch(r"\{(\w+)\}", template)
    if only and isinstance(messages := row.get(only[1]), list):
        return messages
    try:
        return [{"role": "user", "content": template.format_map(row)}]
    except KeyError as error:
        raise UserError(f"{where}: the prompt asks for {error}; the columns are {', '.join(map(str, row))}") from None
    except (ValueError, IndexError, AttributeError) as error:
        raise UserError(
            f"{where}: prompt {template!r} cannot be filled ({error}); write a literal {{ as {{{{"
        ) from None


def plain_text(messages: Sequence[dict[str, Any]]) -> str:
    """A chat as text: turns a blank line apart, each reply right after its question."""
    text = ""
    for message in messages:
        text += "\n\n" if text and message["role"] != "assistant" else ""
        text += str(message["content"])
    return text


def same(answer: str | None, gold: str) -> bool:
    """`answer` is the gold text or, where both are bare numbers, the gold number."""
    if answer is None or answer == gold:
        return answer is not None
    bare = re.compile(r"\$?[-+−]?[\d,]*\.?\d+(/\d+)?\s?%?", re.ASCII)
    return bool(bare.fullmatch(answer) and bare.fullmatch(gold)) and last_number(answer) == last_number(gold)


def strict(text: str, row: Row, place: Place) -> bool:
    """The gold answer stands where the completion should have it."""
    return same(EXTRACT[place](text), row["answer"])


def flexible(text: str, row: Row) -> bool:
    """The gold answer stands in any of the places that `EXTRACT` knows."""
    return any(same(extract(text), row["answer"]) for extract in EXTRACT.values())


def matches(completions: list, answer: list, place: Place = "xml", **_: Any) -> list[float]:
    """1 where the gold answer stands at `place` of the completion, else 0."""
    return [
        float(same(EXTRACT[place](completion_text(completion)), gold))
        for completion, gold in zip(completions, answer, strict=True)
    ]
