"""Answers found in text: tagged, boxed, after ####, and the last number however it is written."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.rewards.extract import (
    boxed_answer,
    completion_text,
    final_number,
    hash_answer,
    last_number,
    same_number,
    xml_answer,
)

MINUS_SIGNS = ["-", "\u2212", "\u2013", "\u2011", "\ufe63", "\uff0d"]
COMMAS = [",", "{,}", "\\,", "\u202f", "\u00a0"]


@st.composite
def written_numbers(draw) -> tuple[str, Fraction]:
    """A number in one of the ways that people and models write it, and its value."""
    whole = draw(st.one_of(st.integers(0, 9), st.integers(0, 10**10)))
    decimals = draw(st.one_of(st.just(""), st.from_regex(r"\A[0-9]{1,4}\Z")))
    negative = draw(st.booleans())
    digits = draw(st.sampled_from([f"{whole}", *(f"{whole:,}".replace(",", comma) for comma in COMMAS)]))
    value = Fraction(f"{whole}.{decimals or 0}")
    text = digits + (f".{decimals}" if decimals else "")
    sign = draw(st.sampled_from(MINUS_SIGNS)) if negative else draw(st.sampled_from(["", "+"]))
    currency = draw(st.sampled_from(["", "", "$", "\\$", "€", "£"]))
    text = sign + currency + text if draw(st.booleans()) else currency + sign + text
    text += draw(st.sampled_from(["", "", "%", "\\%", " apples", " km/h", ".", "!", "°", ")"]))
    return text, -value if negative else value


openings = st.sampled_from(["", "= ", "it is ", "(", "\\(", "**", "x=", "\n", "\t", "so 7 - 3 = ", "from 1/2 to "])


@given(openings, written_numbers())
def test_a_number_is_read_however_it_is_written(opening, number):
    text, value = number
    assert last_number(opening + text) == value


@given(st.lists(written_numbers(), min_size=2, max_size=5), st.sampled_from([" ", ", ", " and ", "; ", " = ", "\n"]))
def test_of_several_numbers_the_last_counts(numbers, gap):
    assert last_number(gap.join(text for text, _ in numbers)) == numbers[-1][1]


@given(written_numbers(), written_numbers())
def test_the_marked_answer_wins_over_what_surrounds_it(answer, other):
    text, value = answer
    assert final_number(f"{other[0]} <answer>\n{text}\n</answer> {other[0]}") == value
    assert final_number(f"{other[0]} \\boxed{{{text}}} {other[0]}") == value
    assert final_number(f"{other[0]}\n#### {text}\n{other[0]}") == value
    assert final_number(f"{other[0]} and {text}") == value
    assert final_number(f"\\boxed{{{other[0]}}} <answer>{text}</answer>") == value


@given(st.integers(-999, 999), st.integers(1, 999))
def test_fractions_are_numbers(top, bottom):
    value = Fraction(top, bottom)
    assert last_number(f"{top}/{bottom}") == value
    assert last_number(f"\\frac{{{top}}}{{{bottom}}}.") == value
    assert last_number(f"it is $\\dfrac {{{top}}} {{{bottom}}}$") == value
    assert last_number(f"5\\frac{{{abs(top)}}}{{{bottom}}}") == 5 + abs(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5-3", 3),
        ("5 - 3", 3),
        ("5 -3", -3),
        ("pages 5–10", 10),
        ("x^{2}-5", 5),
        ("10/12/2024", 2024),
        ("12,34", 34),
        ("1,234,56", 56),
        ("0012", 12),
        ("1.2e3", 1200),
        ("1e-3", Fraction(1, 1000)),
        ("5e", 5),
        (".5", Fraction(1, 2)),
        ("$.50", Fraction(1, 2)),
        ("Rs.500", 500),
        ("is...42", 42),
        ("1.2.3", Fraction(12, 10)),
        ("H2O", None),
        ("x_2", None),
        ("5/0", None),
        ("٣", 3),
        ("", None),
        ("9" * 301, None),
        ("9" * 5000, None),
        ("1e999", 10**999),
        ("1e9999", None),
    ],
)
def test_what_is_and_is_not_a_number(text, value):
    assert last_number(text) == value


@given(st.text(alphabet=st.one_of(st.characters(), st.sampled_from("0123456789.,-/$\\{}#<>eE ")), max_size=200))
def test_no_text_makes_extraction_raise(text):
    for extract in (last_number, final_number, boxed_answer, hash_answer, xml_answer):
        extract(text)


@pytest.mark.timeout(30)
def test_long_hostile_texts_take_no_quadratic_time():
    for text in ("\\boxed{" * 20_000, "{" * 100_000, "1," * 50_000, "<answer>" * 20_000, "9" * 100_000, "1/" * 50_000):
        final_number(text)
        boxed_answer(text)


balanced = st.recursive(
    st.text(alphabet="ab1 ^+", max_size=4), lambda inner: st.lists(inner.map("{{{}}}".format), max_size=3).map("".join)
)


@given(st.text(alphabet="a b{\\", max_size=5), balanced, st.text(alphabet="a }", max_size=5))
def test_a_box_ends_where_its_braces_close(before, content, after):
    text = f"{before.rstrip(chr(92))} \\boxed{{{content}}}{after}"
    assert boxed_answer(text) == content.strip()


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed 7.", "7"),
        (r"\fbox{x}", "x"),
        (r"\boxed{open", None),
        ("none", None),
    ],
)
def test_the_last_box_that_closes_is_the_answer(text, content):
    assert boxed_answer(text) == content


def test_the_answer_tag_and_its_absence():
    assert xml_answer("a <answer> 1 </answer> <answer>\n2\n</answer> b </answer>") == "2"
    assert xml_answer("<answer>3") == "3"
    assert xml_answer(" just 4 ") == "just 4"
    assert xml_answer("</answer> 5") == ""


def test_the_text_after_the_last_four_hashes():
    assert hash_answer("#### 1\n#### 1,000 \n") == "1,000"
    assert hash_answer("1,000") is None


def test_the_text_of_a_completion_in_either_shape():
    assert completion_text("a") == "a"
    assert completion_text([{"role": "tool", "content": "b"}, {"role": "assistant", "content": "c"}]) == "c"


def test_same_number_compares_texts_and_numbers():
    assert same_number("$1,000", "1000.0")
    assert same_number(Fraction(1, 3), "0.333", tolerance=0.001)
    assert not same_number("none", "none")
    assert not same_number(None, "3")
