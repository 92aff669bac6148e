"""Numbers as texts of mathematics write them: a table of spellings and values, and what holds for all of them.

`tests/data/numbers.tsv` has a line for each spelling: its kind, the value ("-": it is no number), and whether
math-verify calls the spelling equal to that value, so that where the two readers differ is written down.
"""

from __future__ import annotations

import importlib.metadata
import itertools
from fractions import Fraction
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.rewards.extract import final_number, last_number
from grpo.rewards.notation import plain, without_emphasis
from grpo.rewards.number import gold_number, stated_number
from grpo.rewards.numeric_answer import numeric_answer
from tests.helpers.paths import ROOT


class Spelling(NamedTuple):
    kind: str
    text: str
    value: Fraction | None
    math_verify: str


def read_table() -> list[Spelling]:
    lines = (ROOT / "tests" / "data" / "numbers.tsv").read_text(encoding="utf-8").split("\n")[1:-1]
    fields = (line.split("\t") for line in lines)
    return [Spelling(kind, text, None if value == "-" else Fraction(value), said) for kind, text, value, said in fields]


TABLE = read_table()
KINDS = list(dict.fromkeys(each.kind for each in TABLE))


def of_kind(kind: str) -> list[Spelling]:
    return [each for each in TABLE if each.kind == kind]


def test_the_table_is_large_and_says_everything_once() -> None:
    assert len(TABLE) >= 300 and len({each.text for each in TABLE}) == len(TABLE) and len(KINDS) >= 15
    assert sum(each.value is None for each in TABLE) >= 80


@pytest.mark.parametrize("kind", KINDS)
def test_every_spelling_is_read_as_its_value(kind: str) -> None:
    for each in of_kind(kind):
        answer = f"<answer>{each.text}</answer>"
        gold, right = (str(each.value), 1.0) if each.value is not None else ("5", 0.0)
        scores = [
            numeric_answer([f"<answer>{gold}</answer>"], [each.text])[0],
            numeric_answer([answer], [gold])[0],
            numeric_answer([f"<answer>{Fraction(gold) + 1}</answer>"], [each.text])[0],
        ]
        expected = [None, 0.0, None] if each.value is None else [1.0, 1.0, 0.0]
        if each.text in ("5!",):  # a sentence's answer may be called out, a gold answer is a factorial
            expected[1] = 1.0
        assert scores == expected, (each, scores, right)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("nothing", "words")])
def test_a_box_and_the_mark_of_gsm8k_state_the_same(kind: str) -> None:
    for each in of_kind(kind):
        stated = stated_number(each.text)
        if "\\boxed" not in each.text and each.text.count("{") == each.text.count("}"):
            assert final_number(f"So \\boxed{{{each.text}}}, not 3.") == stated, each
            assert final_number(f"3 and 4\n#### {each.text}\n") == stated, each


def test_math_verify_says_what_the_table_says_of_it() -> None:
    pytest.importorskip("math_verify")
    if not importlib.metadata.version("math-verify").startswith("0.9."):
        pytest.skip("the verdicts are those of math-verify 0.9")
    from grpo.rewards.math_verify import math_verify

    read = [each for each in TABLE if each.value is not None]
    scores = math_verify([f"<answer>{each.text}</answer>" for each in read], [str(each.value) for each in read])
    verdicts = ["equal" if score else "differs" for score in scores]
    assert [(each.text, each.math_verify) for each in read] == list(
        zip([each.text for each in read], verdicts, strict=True)
    )


def test_what_both_readers_call_a_number_is_the_same_number() -> None:
    """Where math-verify reads a plain number, it is ours: their differences are spellings that it does not read."""
    pytest.importorskip("math_verify")
    from math_verify import parse
    from sympy import Integer

    integers = [each for each in TABLE if each.kind in ("integer", "thousands", "unit") and each.math_verify == "equal"]
    for each in integers:
        for found in parse(f"${without_emphasis(each.text)}$"):
            assert not isinstance(found, Integer) or Fraction(int(found)) == each.value, each


def test_emphasis_does_not_change_math_verifys_verdict() -> None:
    pytest.importorskip("math_verify")
    from grpo.rewards.math_verify import math_verify

    for answer, mark in itertools.product(["73", "\\frac{3}{4}", "$x^2$"], ["*", "**", "***", "__", "`"]):
        gold = answer.strip("$")
        assert math_verify([f"<answer>{mark}{answer}{mark}</answer>"], [gold]) == [1.0], (answer, mark)
        assert math_verify([f"The answer is {mark}{answer}{mark}."], ["74"]) == [0.0]


# Composed spellings

SPACES = ["\u00a0", "\u202f", "\\,", "{,}", ",\\!", "'", "_", ","]
whole = st.integers(0, 10**12).flatmap(lambda n: st.sampled_from([str(n), *(f"{n:,}".replace(",", s) for s in SPACES)]))
digits = st.integers(0, 10**12).map(str)


@st.composite
def numbers(draw: st.DrawFn) -> tuple[str, Fraction]:
    """A number without sign, currency or unit in one of the notations, and its value."""
    n, d = draw(st.integers(0, 10**9)), draw(st.integers(1, 999))
    small = draw(st.integers(1, 9))
    match draw(st.integers(0, 7)):
        case 0:
            return f"{n:,}".replace(",", draw(st.sampled_from(SPACES))), Fraction(n)
        case 1:
            decimals = draw(st.from_regex(r"\A[0-9]{1,4}\Z"))
            return f"{n:,}.{decimals}", Fraction(f"{n}.{decimals}")
        case 2:
            command = draw(st.sampled_from(["\\frac", "\\dfrac", "\\tfrac"]))
            return f"{command}{{{n}}}{{{d}}}", Fraction(n, d)
        case 3:
            return f"\\frac{small}{10 - small}", Fraction(small, 10 - small)
        case 4:
            return f"{small}{draw(st.sampled_from(['', ' ']))}\\frac{{{n}}}{{{d}}}", small + Fraction(n, d)
        case 5:
            power = draw(st.integers(-12, 12))
            times = draw(st.sampled_from(["\\times", "\\cdot", "×", "*", " x "]))
            return f"{small}.{d}{times}10^{{{power}}}", Fraction(f"{small}.{d}") * Fraction(10) ** power
        case 6:
            return f"{small} million", Fraction(small * 10**6)
        case _:
            return f"{n}/{d}", Fraction(n, d)


UNITS = [
    "",
    " cm",
    "\\text{ cm}^2",
    " km/h",
    "\\%",
    " apples",
    "\\,\\mathrm{kg}",
    "^\\circ",
    " \\text{ units}^{3}",
    " m²",
]
WRAPPERS = [
    "{}",
    "${}$",
    "\\({}\\)",
    "**{}**",
    "`{}`",
    "x = {}",
    "= {}",
    " {} ",
    "{}.",
    "\\mathbf{{{}}}",
    "the total is {}",
]


@given(numbers(), st.sampled_from(["", "-", "+", "−"]), st.sampled_from(["", "\\$", "€"]), st.data())
def test_dressing_does_not_change_a_number(number: tuple[str, Fraction], sign: str, currency: str, data: st.DataObject):
    text, value = number
    unit = data.draw(st.sampled_from(UNITS)) if not currency else ""
    wrapper = data.draw(st.sampled_from(WRAPPERS))
    if "mathbf" in wrapper and "{" in text + unit:
        wrapper = "{}"
    written = wrapper.format(sign + currency + text + unit)
    value = -value if sign in ("-", "−") else value
    assert gold_number(written) == stated_number(written) == value, written


@given(
    numbers(),
    numbers(),
    st.sampled_from([" + ", " - ", "-", " \\times ", ", ", " or ", " and ", ":", "^", " < ", " \\pm "]),
)
def test_what_is_made_of_two_numbers_is_none(first: tuple[str, Fraction], second: tuple[str, Fraction], between: str):
    if between == " and " and ("/" in second[0] or "frac" in second[0]):
        return  # "3 and 1/2" is a mixed number
    if between in ("^", " \\times ") and first[0] == "10":
        return
    text = first[0] + between + ("{" + second[0] + "}" if between == "^" else second[0])
    if between == " \\times " and second[0].startswith("10"):
        return
    assert stated_number(text) is None, text


@given(numbers(), st.sampled_from(["x", "\\pi", "\\sqrt{2}", "i", "xy", "^2", "^{10}", "_2", "!", " choose 2", "(x)"]))
def test_a_factor_makes_an_expression_of_a_gold_number(number: tuple[str, Fraction], factor: str) -> None:
    if "million" not in number[0]:
        assert gold_number(number[0] + factor) is None


@given(st.text(alphabet=st.one_of(st.characters(), st.sampled_from("0123456789.,-/$\\{}^_*#<>eE()= ½٣")), max_size=200))
def test_no_text_makes_a_reader_raise(text: str) -> None:
    for read in (stated_number, gold_number, last_number, final_number, plain, without_emphasis):
        read(text)


@pytest.mark.timeout(30)
def test_hostile_texts_take_no_quadratic_time() -> None:
    pieces = [
        "\\frac{",
        "\\frac1",
        "1,",
        "1 ",
        "*",
        "**a",
        "_",
        "\\text{",
        "1.",
        "0.(3)",
        "½",
        "^{1}",
        "5 and ",
        "= ",
        "5 cm",
        "is ",
    ]
    for piece in pieces:
        for read in (stated_number, last_number, final_number):
            read(piece * 20_000)
            read(f"<answer>{piece * 20_000}</answer>")


@given(numbers(), st.sampled_from(["", "-", "−"]), st.sampled_from(["", "The answer is ", "x = ", "So $", "("]))
def test_the_last_number_of_a_sentence_is_read_as_a_stated_one(
    number: tuple[str, Fraction], sign: str, before: str
) -> None:
    text, value = number
    assert last_number(f"{before}{sign}{text}") == (-value if sign else value)
