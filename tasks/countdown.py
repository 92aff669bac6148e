"""Countdown: reach a target from a few numbers with + - * /, each number used at most once. Questions are generated.

An example row (3 numbers):

    prompt:  [{"role": "system", "content": SYSTEM_PROMPT},
              {"role": "user", "content": "Numbers: 44, 19, 35. Target: 98."}]
    numbers: [44, 19, 35]
    target:  98              # 44 + 19 + 35 is one of the answers

Every question has an answer, since its target comes from a random expression over its own numbers. An answer is any
right expression, so the check evaluates it, in exact fractions (`expression.py`).
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

from grpo.errors import UserError
from grpo.rewards.extract import completion_text, xml_answer
from grpo.tasks.common import Row, Task
from grpo.tasks.expression import evaluate, last_expression

SYSTEM_PROMPT = """\
You are given some numbers and a target. Write an expression that equals the target, with + - * / and brackets, using \
each number at most once. Think step by step first, then give only the expression between answer tags, for example
<answer>(3 + 4) * 5</answer>"""

REWARDS = [
    {"function": "grpo.tasks.countdown:equation", "weight": 1.0},
    {"function": "grpo.tasks.countdown:usable", "weight": 0.1},
]


def load(
    rows: int = 10_000,
    held_out: int = 500,
    numbers: tuple[int, int] = (3, 4),
    largest: int = 99,
    targets: tuple[int, int] = (10, 100),
    seed: int = 0,
) -> Task:
    """Generated questions with `numbers` (fewest, most) numbers from 1 to `largest` and a target within `targets`.

    Held-out questions differ from the training ones in their numbers or target.
    """
    if not 2 <= numbers[0] <= numbers[1] <= 8:
        raise UserError(f"task.options.numbers = {list(numbers)}: give the fewest and the most, from 2 to 8")
    if min(rows, held_out + 1, largest, targets[1] - targets[0]) < 1:
        raise UserError("task countdown: rows, largest and the span of targets must be positive, held_out at least 0")
    rng = random.Random(seed)
    questions: dict[tuple[Any, ...], Row] = {}
    for _ in range(100 * (rows + held_out)):
        values = [rng.randint(1, largest) for _ in range(rng.randint(*numbers))]
        target = random_value(values, rng)
        if targets[0] <= target <= targets[1]:
            questions.setdefault((*sorted(values), target), question(values, target))
        if len(questions) == rows + held_out:
            break
    else:
        raise UserError(
            f"task countdown: found only {len(questions)} different questions of {rows + held_out}; ask for fewer rows "
            "or allow more numbers, a higher `largest` or wider `targets`"
        )
    made = list(questions.values())
    return Task("countdown", made[held_out:], made[:held_out], rewards=REWARDS, strict=strict, flexible=flexible)


def question(numbers: list[int], target: int) -> Row:
    """One row."""
    user = f"Numbers: {', '.join(map(str, numbers))}. Target: {target}."
    return {
        "prompt": [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": user}],
        "numbers": numbers,
        "target": target,
    }


def random_value(numbers: list[int], rng: random.Random) -> int:
    """The value of a random expression that uses every one of `numbers` once and divides only without remainder."""
    values = numbers.copy()
    rng.shuffle(values)
    while len(values) > 1:
        left, right = values.pop(), values.pop()
        results = [left + right, left - right, left * right]
        if right and left % right == 0:
            results.append(left // right)
        values.insert(rng.randrange(len(values) + 1), rng.choice(results))
    return values[0]


def right(expression: str, row: Row) -> bool:
    """`expression` equals the target and uses no number more often than it is given."""
    result = evaluate(expression)
    return result is not None and result[0] == row["target"] and result[1] <= Counter(row["numbers"])


def strict(text: str, row: Row) -> bool:
    """The text between the answer tags is a right expression."""
    return "<answer>" in text and right(xml_answer(text), row)


def flexible(text: str, row: Row) -> bool:
    """The tagged expression is right, or else the last one on any line."""
    expression = last_expression(text)
    return strict(text, row) or (expression is not None and right(expression, row))


def equation(completions: list, numbers: list, target: list, **_: Any) -> list[float | None]:
    """1 for a right expression between answer tags, else 0; None for rows of other tasks."""
    return [
        None if given is None else float(strict(completion_text(completion), {"numbers": given, "target": goal}))
        for completion, given, goal in zip(completions, numbers, target, strict=True)
    ]


def usable(completions: list, numbers: list, **_: Any) -> list[float | None]:
    """1 for an expression between answer tags that keeps to the given numbers, right or wrong, else 0; None for rows
    of other tasks.
    """
    scores: list[float | None] = []
    for completion, given in zip(completions, numbers, strict=True):
        text = completion_text(completion)
        result = evaluate(xml_answer(text)) if "<answer>" in text else None
        scores.append(None if given is None else float(result is not None and result[1] <= Counter(given)))
    return scores
