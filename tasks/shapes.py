r"""Counting and comparing drawn shapes, generated: questions that nobody answers without looking at the image.

An example row (of the kind "count", grid 4, side 224):

    prompt: [{"role": "user", "content": [{"type": "image"},
              {"type": "text", "text": "How many red shapes are there? Answer with the number alone."}]}]
    image:  a white square of 224 x 224 pixels with up to 16 circles, squares and triangles in four colours
    answer: "3"
    choices: ["0", ..., "16"]     # what an answer may be

Of the kind "compare": "Are there more red or more blue shapes? Answer with red, blue or equal." Every answer of a kind
is as likely as any other, whatever the image, so that guessing gains nothing; no image is drawn twice.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from grpo.errors import UserError
from grpo.images import Image
from grpo.rewards.extract import completion_text
from grpo.tasks.common import Row, Task

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

Kind = Literal["count", "compare"]
COLOURS = {"red": (214, 39, 40), "blue": (31, 90, 200), "green": (30, 140, 60), "yellow": (240, 190, 20)}
FORMS = ("circle", "square", "triangle")
EQUAL = "equal"
REWARDS = [
    {"function": "grpo.tasks.shapes:right", "weight": 1.0},
    {"function": "grpo.tasks.shapes:in_form", "weight": 0.2},
]


def load(
    kinds: Sequence[Kind] = ("count", "compare"),
    grid: int = 4,
    largest: int = 6,
    side: int = 224,
    colours: int = 4,
    rows: int = 1000,
    held_out: int = 200,
    seed: int = 0,
) -> Task:
    """Images of `side` pixels with at most one shape in each of `grid` x `grid` cells, and a question about each.

    `largest`: the most shapes of a colour that is asked for; `colours`: the first so many of `COLOURS` occur. `seed`
    decides drawings and questions, not the run's randomness.
    """
    if not kinds or rows < 1 or held_out < 0 or side < 8 * grid or not 2 <= colours <= len(COLOURS):
        raise UserError(
            "task shapes: needs a kind, rows >= 1, held_out >= 0, 8 pixels of side for each cell, and 2 to 4 colours"
        )
    if not 1 <= 2 * largest <= grid * grid:
        raise UserError(f"task shapes: largest = {largest} of two colours needs {2 * largest} cells; raise grid")
    made = drawn(random.Random(seed), list(dict.fromkeys(kinds)), grid, largest, side, list(COLOURS)[:colours])
    every = [next(made) for _ in range(rows + held_out)]
    return Task("shapes", every[held_out:], every[:held_out], rewards=REWARDS, strict=strict, flexible=flexible)


def drawn(
    rng: random.Random, kinds: list[Kind], grid: int, largest: int, side: int, colours: list[str]
) -> Iterator[Row]:
    """Endless rows, no image among them twice. Raises UserError where there are too few."""
    seen: set[str] = set()
    number = tries = 0
    while True:
        kind = kinds[number % len(kinds)]
        one, other = rng.sample(colours, 2)
        counts = counts_of(kind, largest, rng)
        rest = [rng.choice([each for each in colours if each not in (one, other)] or [None]) for _ in range(grid)]
        shapes = [one] * counts[0] + [other] * counts[1] + [each for each in rest if each is not None]
        image = picture(shapes[: grid * grid], grid, side, rng)
        tries = tries + 1 if image.digest in seen else 0
        if tries > 100:
            raise UserError("task shapes: too few different images; raise side, grid or colours, or lower rows")
        if tries:
            continue
        seen.add(image.digest)
        number += 1
        yield row(kind, one, other, counts, image, grid)


def counts_of(kind: Kind, largest: int, rng: random.Random) -> tuple[int, int]:
    """How many shapes of two colours, such that each answer is as likely as any other."""
    first, second = rng.randint(0, largest), rng.randint(0, largest)
    if kind == "compare":
        outcome = rng.randrange(3)
        while outcome != (0 if first > second else 1 if first < second else 2):
            first, second = rng.randint(0, largest), rng.randint(0, largest)
    return first, second


def row(kind: Kind, one: str, other: str, counts: tuple[int, int], image: Image, grid: int) -> Row:
    if kind == "count":
        question = f"How many {one} shapes are there? Answer with the number alone."
        answer, choices = str(counts[0]), [str(number) for number in range(grid * grid + 1)]
    else:
        question = f"Are there more {one} or more {other} shapes? Answer with {one}, {other} or {EQUAL}."
        answer = EQUAL if counts[0] == counts[1] else one if counts[0] > counts[1] else other
        choices = [one, other, EQUAL]
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return {"prompt": [{"role": "user", "content": content}], "image": image, "answer": answer, "choices": choices}


# Drawing


def picture(shapes: Sequence[str], grid: int, side: int, rng: random.Random) -> Image:
    """An image with one shape of each colour in `shapes`, each in a cell of its own."""
    from PIL import Image as pil
    from PIL import ImageDraw

    canvas = pil.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(canvas)
    cell = side / grid
    for colour, place in zip(shapes, rng.sample(range(grid * grid), len(shapes)), strict=True):
        size = cell * rng.uniform(0.5, 0.9)
        left, top = (cell * at + rng.uniform(0, cell - size) for at in (place % grid, place // grid))
        shape(draw, rng.choice(FORMS), (left, top, left + size, top + size), COLOURS[colour])
    return Image.of(canvas)


def shape(draw: ImageDraw, form: str, box: tuple[float, ...], colour: tuple[int, int, int]) -> None:
    left, top, right, bottom = box
    if form == "circle":
        draw.ellipse((left, top, right, bottom), fill=colour)
    elif form == "square":
        draw.rectangle((left, top, right, bottom), fill=colour)
    else:
        draw.polygon([(left, bottom), (right, bottom), ((left + right) / 2, top)], fill=colour)


# Answers


def strict(text: str, row: Row) -> bool:
    """The completion is the answer, and nothing else but perhaps a full stop."""
    return text.strip().removesuffix(".").lower() == row["answer"]


def flexible(text: str, row: Row) -> bool:
    """The last of the possible answers that the completion names is right."""
    return last_choice(text, row["choices"]) == row["answer"]


def last_choice(text: str, choices: Sequence[str]) -> str | None:
    named = [word for word in re.findall(r"\w+", text.lower()) if word in choices]
    return named[-1] if named else None


def right(completions: list[Any], answer: list[str], choices: list[list[str]], **_: Any) -> list[float]:
    """1 where the last possible answer that the completion names is right, else 0."""
    return [
        float(last_choice(completion_text(completion), each) == gold)
        for completion, gold, each in zip(completions, answer, choices, strict=True)
    ]


def in_form(completions: list[Any], choices: list[list[str]], **_: Any) -> list[float]:
    """1 where the completion is one of the possible answers alone, else 0."""
    return [
        float(completion_text(completion).strip().removesuffix(".").lower() in each)
        for completion, each in zip(completions, choices, strict=True)
    ]
