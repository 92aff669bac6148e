r"""Nim against an opponent: an environment of several turns, in which a small model learns to play and then to win.

From a heap of coins the players take 1, 2 or 3 in turn; who takes the last coin wins. Whoever leaves a multiple of 4
cannot be beaten, and every position can be won or lost by one move, so that success is a matter of each turn.

An example row (heaps of 5 to 12):

    prompt: [{"role": "system", "content": SYSTEM_PROMPT}, ..., {"role": "user", "content": "10 coins are left."}]
    heap:   10
    seed:   7        # of the opponent's moves

The model says a number, the opponent takes some coins, and so on. What is not a number that can be taken loses at once.
"""

from __future__ import annotations

import random
import re
from typing import Any

from grpo.errors import UserError
from grpo.tasks.common import Row, Task

SYSTEM_PROMPT = (
    "We take coins from a heap in turn: 1, 2 or 3 at a time. Who takes the last coin wins. Say only how many you take."
)
MOST = 3
"""Coins that may be taken at once."""
PLAYED = 0.2
"""What a game is worth that was lost by the rules."""


def load(rows: int = 1000, held_out: int = 100, low: int = 5, high: int = 12, seed: int = 0) -> Task:
    """Games from heaps of `low` to `high` coins; no two have the same heap and opponent."""
    if not MOST < low <= high or rows < 1 or held_out < 0:
        raise UserError(f"task nim: needs {MOST} < low <= high, rows >= 1 and held_out >= 0")
    draw = random.Random(seed)
    made = [row(draw.randint(low, high), number) for number in range(held_out + rows)]
    return Task("nim", made[held_out:], made[:held_out], strict=opens_well, flexible=opens_well)


def row(heap: int, seed: int) -> Row:
    """One game, after the end of another one that shows how it is played."""
    messages = [{"role": "system", "content": SYSTEM_PROMPT}, *example(), {"role": "user", "content": left(heap)}]
    return {"prompt": messages, "heap": heap, "seed": seed}


def example() -> list[dict[str, str]]:
    """A short game as it should be: 6 coins, of which 2 are taken, then 1, then 3."""
    said = [left(6), "2", f"I take 1. {left(3)}", "3"]
    return [{"role": "assistant" if index % 2 else "user", "content": text} for index, text in enumerate(said)]


def left(heap: int) -> str:
    return f"{heap} coins are left." if heap > 1 else "1 coin is left."


def move_of(text: str, heap: int) -> int | None:
    """The coins that a turn takes from `heap`; None where it says no number that can be taken."""
    said = re.fullmatch(r"\s*([1-9])\.?\s*", text)
    taken = int(said.group(1)) if said else 0
    return taken if 1 <= taken <= min(MOST, heap) else None


def opens_well(text: str, row: Row) -> bool:
    """Whether the text is a first move that leaves a multiple of 4, or a legal one where none does."""
    move = move_of(text, row["heap"])
    return move is not None and (not row["heap"] % (MOST + 1) or not (row["heap"] - move) % (MOST + 1))


async def play(row: Row, sample: Any, skill: float = 0.0) -> dict[str, Any]:
    """The environment. The opponent plays well with the probability `skill`, and otherwise any move."""
    messages, heap, draw = list(row["prompt"]), int(row["heap"]), random.Random(row["seed"])
    while True:
        turn = await sample(messages)
        move = move_of(turn.text, heap)
        if move is None:
            return {"reward": 0.0, "success": False, "metrics": {"illegal": 1.0}}
        heap -= move
        reply = 0 if not heap else opponent(heap, draw, skill)
        if heap <= reply or turn.last:
            return {"reward": 1.0 if not heap else PLAYED, "success": not heap, "metrics": {"illegal": 0.0}}
        heap -= reply
        messages = [*messages, turn.message, {"role": "user", "content": f"I take {reply}. {left(heap)}"}]


def opponent(heap: int, draw: random.Random, skill: float) -> int:
    """The opponent's move: 1 to 3 of `heap`."""
    best = heap % (MOST + 1)
    well, any_move = draw.random() < skill, draw.randint(1, min(MOST, heap))
    return best if best and well else any_move
