r"""Small sums, generated: what the quickstart trains on.

An example row (operations ["+"], operands 10 to 49, answer format "equation", one worked example):

    prompt:   [{"role": "user", "content": "What is 21 + 14?"},
               {"role": "assistant", "content": "21 + 14 = 35"},
               {"role": "user", "content": "What is 38 + 27?"}]
    question: "38 + 27"
    answer:   "65"
    form:     r"38 \+ 27 = -?\d+"    # what the completion should look like, whatever the answer

The worked examples are the same in every prompt, so that vLLM caches them once; their questions occur nowhere else.
A held-out question is not in the training rows in either order of its operands. Restating the question before the
answer is what lets a very small model calculate at all.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Sequence
from typing import Any, Literal

from grpo.errors import UserError
from grpo.rewards.extract import completion_text, final_number
from grpo.tasks.common import Row, Task

Operation = Literal["+", "-", "*"]
AnswerFormat = Literal["equation", "number", "tag", "xml"]

REPLIES: dict[AnswerFormat, str] = {
    "equation": "{question} = {answer}",
    "number": "{answer}",
    "tag": "<answer>{answer}</answer>",
    "xml": "<reasoning>\n{question} = {answer}\n</reasoning>\n<answer>\n{answer}\n</answer>",
}
"""The completion that is asked for, in each answer format."""

REWARDS = [
    {"function": "numeric_answer", "weight": 1.0},
    {"function": "grpo.tasks.arithmetic:right_digits", "weight": 0.5},
    {"function": "grpo.tasks.arithmetic:right_form", "weight": 0.5},
]


def load(
    operations: Sequence[Operation] = ("+",),
    low: int = 10,
    high: int = 49,
    rows: int = 2000,
    held_out: int = 200,
    shots: int = 1,
    answer_format: AnswerFormat = "equation",
    system_prompt: str | None = None,
    seed: int = 0,
) -> Task:
    """Questions "a + b" with both operands from `low` to `high`.

    `rows`: training rows at most; small ranges have fewer. `held_out`: questions kept for evaluation. `shots`: worked
    examples in each prompt. `seed` decides the questions, not the run's randomness.
    """
    if low > high or not operations or rows < 1 or min(held_out, shots) < 0:
        raise UserError("task arithmetic: needs low <= high, an operation, rows >= 1, held_out >= 0 and shots >= 0")
    questions = drawn(tuple(dict.fromkeys(operations)), low, high, rows + 2 * (held_out + shots), random.Random(seed))
    kept_apart: dict[tuple[str, int, int], tuple[str, int, int]] = {}
    for question in questions:
        if len(kept_apart) == shots + held_out:
            break
        kept_apart.setdefault(unordered(question), question)
    apart = list(kept_apart.values())
    train = [question for question in questions if unordered(question) not in kept_apart][:rows]
    if not train or len(apart) < shots + held_out:
        raise UserError(
            f"task arithmetic: operands from {low} to {high} give too few questions to hold out {held_out} of them; "
            "widen the range or lower held_out"
        )
    make = functools.partial(row, examples=apart[:shots], reply=REPLIES[answer_format], system_prompt=system_prompt)
    return Task(
        "arithmetic",
        [make(question) for question in train],
        [make(question) for question in apart[shots:]],
        rewards=REWARDS,
        strict=strict,
        flexible=flexible,
    )


def drawn(
    operations: Sequence[Operation], low: int, high: int, count: int, rng: random.Random
) -> list[tuple[str, int, int]]:
    """At most `count` different (operation, a, b), in random order."""
    span = high - low + 1
    space = len(operations) * span * span
    numbers = rng.sample(range(space), min(count, space))
    return [(operations[n // span**2], low + n // span % span, low + n % span) for n in numbers]


def unordered(question: tuple[str, int, int]) -> tuple[str, int, int]:
    """The same for a + b and b + a."""
    operation, a, b = question
    return question if operation == "-" else (operation, min(a, b), max(a, b))


def row(
    question: tuple[str, int, int], examples: list[tuple[str, int, int]], reply: str, system_prompt: str | None
) -> Row:
    """One row, with its worked examples as earlier turns of the chat."""
    messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
    for shown in (*examples, question):
        operation, a, b = shown
        text = f"{a} {operation} {b}"
        answer = str({"+": a + b, "-": a - b, "*": a * b}[operation])
        messages.append({"role": "user", "content": f"What is {text}?"})
        messages.append({"role": "assistant", "content": reply.format(question=text, answer=answer)})
    form = re.escape(reply.format(question=text, answer="\0")).replace("\0", r"-?\d+")
    return {"prompt": messages[:-1], "question": text, "answer": answer, "form": form}


def strict(text: str, row: Row) -> bool:
    """The completion has the form asked for and the right number."""
    return re.fullmatch(row["form"], text.strip()) is not None and flexible(text, row)


def flexible(text: str, row: Row) -> bool:
    """The number that the completion ends on is right."""
    return final_number(text) == int(row["answer"])


def right_digits(completions: list, answer: list, **_: Any) -> list[float]:
    """Share of the digits of the completion's number that are right, counted from the last; 64 for 54 is 0.5.

    Missing or surplus digits, and a missing or surplus minus sign, count as wrong ones.
    """
    scores = []
    for completion, gold in zip(completions, answer, strict=True):
        number = final_number(completion_text(completion))
        text = "" if number is None or number.denominator != 1 else str(number)
        same = sum(a == b for a, b in zip(reversed(text), reversed(gold), strict=False))
        scores.append(same / max(len(text), len(gold)))
    return scores


def right_form(completions: list, form: list, **_: Any) -> list[float]:
    """1 where the completion has the form asked for, whatever its number; else 0."""
    return [
        float(re.fullmatch(pattern, completion_text(completion).strip()) is not None)
        for completion, pattern in zip(completions, form, strict=True)
    ]
