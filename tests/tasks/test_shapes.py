"""The drawn shapes: what the image shows is what the answer says, and nothing but the image tells."""

from __future__ import annotations

import collections
import random
import re
from typing import Any

import numpy
import pytest
from PIL import Image, ImageDraw

from grpo.errors import UserError
from grpo.tasks import shapes
from grpo.tasks.common import Task, load_task


@pytest.fixture(scope="module")
def task() -> Task:
    return load_task("grpo.tasks.shapes:load", {"rows": 600, "held_out": 100})


def counted(row: dict[str, Any], colour: str) -> int:
    """Shapes of a colour in the image; they never touch, being in cells of their own, unless they share an edge."""
    left = Image.fromarray((numpy.asarray(row["image"].pil()) == shapes.COLOURS[colour]).all(-1)).convert("L")
    count = 0
    while box := left.getbbox():
        top = left.crop((box[0], box[1], box[2], box[1] + 1)).getbbox()
        assert top is not None
        ImageDraw.floodfill(left, (box[0] + top[0], box[1]), 0)
        count += 1
    return count


def question(row: dict[str, Any]) -> str:
    return str(row["prompt"][0]["content"][1]["text"])


def test_the_answer_is_what_is_drawn(task: Task) -> None:
    wrong = 0
    for row in [*task.train[:100], *task.eval[:50]]:
        names = [word for word in re.findall(r"\w+", question(row)) if word in shapes.COLOURS]
        if question(row).startswith("How many"):
            wrong += str(counted(row, names[0])) != row["answer"]
        else:
            first, second = counted(row, names[0]), counted(row, names[1])
            wrong += row["answer"] != ("equal" if first == second else names[0] if first > second else names[1])
    assert wrong <= 3, "shapes that share an edge count as one here, which is rare"


def test_rows_differ_and_are_made_anew_by_the_seed(task: Task) -> None:
    digests = [row["image"].digest for row in [*task.train, *task.eval]]
    assert len(set(digests)) == 700 == len(digests)
    again, other = (shapes.load(rows=50, held_out=10, seed=seed) for seed in (0, 1))
    assert [row["image"] for row in again.eval] == [row["image"] for row in task.eval[:10]]
    assert not {row["image"] for row in other.train} & {row["image"] for row in again.train}


def test_words_alone_do_not_tell(task: Task) -> None:
    """Of every question, the most frequent answer is about as frequent as chance has it."""
    answers: dict[str, list[str]] = collections.defaultdict(list)
    for row in task.train:
        kind = question(row).split()[0]
        answers[kind].append(row["answer"] if kind == "How" or row["answer"] == "equal" else "a colour")
    assert len(answers["How"]) == len(answers["Are"]) == 300
    assert max(collections.Counter(answers["How"]).values()) < 300 / 7 * 1.6
    assert abs(answers["Are"].count("equal") - 100) < 35


@pytest.mark.parametrize(
    ("text", "answer", "strict", "flexible", "form"),
    [
        ("3", "3", True, True, True),
        ("3.", "3", True, True, True),
        ("There are 4, no, 3 of them", "3", False, True, False),
        ("4", "3", False, False, True),
        ("Red", "red", True, True, True),
        ("There are more red than blue shapes", "red", False, False, False),
        ("", "3", False, False, False),
        ("33", "3", False, False, False),
    ],
)
def test_checks_and_rewards(text: str, answer: str, strict: bool, flexible: bool, form: bool) -> None:
    choices = ["red", "blue", "equal"] if answer == "red" else [str(number) for number in range(17)]
    row = {"answer": answer, "choices": choices}
    assert (shapes.strict(text, row), shapes.flexible(text, row)) == (strict, flexible)
    assert shapes.right([text], [answer], [choices]) == [float(flexible)]
    assert shapes.in_form([[{"role": "assistant", "content": text}]], [choices]) == [float(form)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kinds": []}, "needs a kind"),
        ({"side": 20}, "8 pixels of side"),
        ({"colours": 5}, "2 to 4 colours"),
        ({"largest": 9}, "raise grid"),
        ({"kinds": ["draw"]}, "task.options.kinds"),
    ],
)
def test_options_that_cannot_be_met_are_sentences(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_task("grpo.tasks.shapes:load", options)


def test_too_few_different_images_are_a_sentence() -> None:
    blank = shapes.drawn(random.Random(0), ["count"], 1, 0, 8, ["red", "blue"])
    assert next(blank)["answer"] == "0"
    with pytest.raises(UserError, match="too few different images"):
        next(blank)
