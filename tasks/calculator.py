r"""Products of two numbers with a calculator: an environment of two turns, in which a small model learns to use it.

An example row (operands 12 to 99):

    prompt:   [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": "What is 47 * 36?"}]
    question: "47 * 36"
    answer:   "1692"

What the model writes as <calc>47 * 36</calc> is computed and comes back as the next message; its last turn is the
answer. The product is beyond what a small model computes by itself, so that success means using the calculator.
"""

from __future__ import annotations

import random
import re
from typing import Any

from grpo.errors import UserError
from grpo.rewards.extract import final_number
from grpo.tasks.common import Row, Task

SYSTEM_PROMPT = "To calculate, write the expression like <calc>12 + 30</calc> and wait. Then say the result."
CALL = re.compile(r"<calc>\s*(\d{1,6})\s*([-+*])\s*(\d{1,6})\s*</calc>")
CALLED, ASKED_RIGHT = 0.1, 0.3
"""What a turn with a call is worth, and one that calculates what was asked for."""


def load(rows: int = 1000, held_out: int = 100, low: int = 12, high: int = 99, shots: int = 1, seed: int = 0) -> Task:
    """Questions "a * b" with both operands from `low` to `high`, and `shots` worked examples before each."""
    span = high - low + 1
    if not 0 <= low <= high or rows < 1 or min(held_out, shots) < 0 or span * span < rows + held_out + shots:
        raise UserError("task calculator: low, high and held_out leave too few different questions; widen the range")
    numbers = random.Random(seed).sample(range(span * span), rows + held_out + shots)
    pairs = [(low + number // span, low + number % span) for number in numbers]
    shown = [message for pair in pairs[:shots] for message in example(*pair)]
    made = [row(*pair, shown) for pair in pairs[shots:]]
    return Task("calculator", made[held_out:], made[:held_out], strict=right, flexible=right)


def example(a: int, b: int) -> list[dict[str, str]]:
    """An episode as it should be."""
    said = [f"What is {a} * {b}?", f"<calc>{a} * {b}</calc>", f"{a * b}", f"{a * b}"]
    return [{"role": "assistant" if index % 2 else "user", "content": text} for index, text in enumerate(said)]


def row(a: int, b: int, shown: list[dict[str, str]]) -> Row:
    """One question."""
    messages = [{"role": "system", "content": SYSTEM_PROMPT}, *shown, *example(a, b)[:1]]
    return {"prompt": messages, "question": f"{a} * {b}", "answer": str(a * b)}


def right(text: str, row: Row) -> bool:
    """The number that the text ends on is right."""
    return final_number(text) == int(row["answer"])


async def play(row: Row, sample: Any) -> dict[str, Any]:
    """The environment: answers calls until the model says something else, which is its answer."""
    messages, worth = list(row["prompt"]), 0.0
    while True:
        turn = await sample(messages)
        call = CALL.search(turn.text)
        if call is None or turn.last:
            success = call is None and right(turn.text, row)
            return {"reward": 1.0 if success and worth else worth, "success": success}
        worth = max(worth, CALLED, ASKED_RIGHT * (call.expand(r"\1 \2 \3") == row["question"]))
        messages = [*messages, turn.message, {"role": "user", "content": computed(call)}]


def computed(call: re.Match[str]) -> str:
    """What the calculator shows."""
    a, b = int(call.group(1)), int(call.group(3))
    return str({"+": a + b, "-": a - b, "*": a * b}[call.group(2)])
