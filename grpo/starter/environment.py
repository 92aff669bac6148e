"""The environment of this experiment: it thinks of a number, and says "Higher." or "Lower." until it is guessed.

It runs in a process of its own, once for each game, and may import what it likes. Try a change at once, without any
model, and be the player:

    python environment.py
"""

import asyncio
import re


async def play(row, sample):
    """One game of a `row` of games.jsonl; `sample(messages)` is the model's next turn after the conversation so far.

    The reward has steps between nothing and everything, so that most groups hold a better and a worse game: a last
    guess that is near is worth up to 0.5, and a right one 1, whenever it comes.
    """
    messages = list(row["prompt"])
    secret, span = row["secret"], row["high"] - row["low"]
    while True:
        turn = await sample(messages)
        guess = number(turn.text)
        if guess is None:
            return {"reward": 0.0, "success": False}
        if guess == secret:
            return {"reward": 1.0, "success": True}
        if turn.last:  # no further turn fits: config.toml says how many
            return {"reward": 0.5 * max(0.0, 1 - abs(guess - secret) / span), "success": False}
        answer = "Higher." if guess < secret else "Lower."
        messages = [*messages, turn.message, {"role": "user", "content": answer}]


def number(text):
    """The number that a turn says, or None where it says something else."""
    said = re.fullmatch(r"\s*(\d{1,4})\.?\s*", text)
    return int(said.group(1)) if said else None


class Player:
    """You, in the model's place, for a game of at most `turns` turns."""

    def __init__(self, turns):
        self.left = turns

    async def __call__(self, messages):
        print(messages[-1]["content"])
        self.left -= 1
        return Turn(input("> "), last=not self.left)


class Turn:
    def __init__(self, text, last):
        self.text, self.last = text, last
        self.message = {"role": "assistant", "content": text}


if __name__ == "__main__":
    question = {"role": "user", "content": "I think of a number from 1 to 20. Guess it."}
    print(asyncio.run(play({"prompt": [question], "secret": 14, "low": 1, "high": 20}, Player(turns=4))))
