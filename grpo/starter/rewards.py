"""The rewards of this experiment: functions from completions to numbers, one number a completion.

A function gets what its parameters name: `completions` (chat messages), `prompts`, `completion_ids` (token ids), every
column of the data, or all of it in `**kwargs`. None instead of a number: does not apply. Try a change at once, without
any model:

    python rewards.py
"""

import re


def right_digits(completions, number, **kwargs):
    """Share of the digits that are right, counted from the last: 64 for 54 is 0.5.

    It has steps between nothing and everything, so that most groups hold a better and a worse completion. Where all
    completions of a group score the same there is nothing to learn from it.
    """
    return [share_right(text_of(completion), gold) for completion, gold in zip(completions, number, strict=True)]


def only_digits(completions, **kwargs):
    """1 for digits and nothing else, else 0."""
    return [float(text_of(completion).strip().isdigit()) for completion in completions]


def share_right(text, gold):
    said = (re.findall(r"\d+", text.replace(",", "")) or [""])[-1]
    same = sum(a == b for a, b in zip(reversed(said), reversed(gold), strict=False))
    return same / max(len(said), len(gold))


def text_of(completion):
    """A completion is the messages that the model added to the chat: one, with its text in "content"."""
    return completion[-1]["content"]


if __name__ == "__main__":
    said = ["57", "It is 57.", "75", "5,7", "no idea"]
    completions = [[{"role": "assistant", "content": text}] for text in said]
    for text, digits, only in zip(
        said, right_digits(completions, ["57"] * len(said)), only_digits(completions), strict=True
    ):
        print(f"{text!r:14} right_digits {digits:.2f}  only_digits {only:.0f}")
