"""The built-in rewards: the five of the GSM8K run against a reference written without their patterns, then the rest."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.errors import UserError
from grpo.rewards.builtin import ALIASES, BUILTIN, resolve_reward
from grpo.rewards.correctness import correctness
from grpo.rewards.format import soft_format, strict_format
from grpo.rewards.integer import integer
from grpo.rewards.length_penalty import LengthPenalty
from grpo.rewards.numeric_answer import numeric_answer
from grpo.rewards.regular_expression import RegularExpression
from grpo.rewards.repetition_penalty import RepetitionPenalty
from grpo.rewards.tag_count import tag_count
from grpo.rewards.xml_count import xml_count

PERFECT = "<reasoning>\n2 and 2\n</reasoning>\n<answer>\n4\n</answer>\n"

# Texts that are close to the format, so that a wrong character more or less is often the only difference.
pieces = st.sampled_from(
    [
        "<reasoning>",
        "</reasoning>",
        "<answer>",
        "</answer>",
        "\n",
        "\n",
        "\n\n",
        " ",
        "\t",
        "4",
        "1,000",
        "²",
        "٣",
        "x y",
    ]
)
near_format = st.builds(
    lambda head, gaps: "".join(
        [head, "<reasoning>", gaps[0], "</reasoning>", gaps[1], "<answer>", gaps[2], "</answer>", gaps[3]]
    ),
    st.sampled_from(["", "", "", " ", "\n", "Well: "]),
    st.lists(st.lists(pieces, max_size=3).map("".join), min_size=4, max_size=4),
)
lines = st.sampled_from(["think", "", "4", " 12 ", "<answer>", "</answer>", "a\nb"])
tails = st.sampled_from(["", "\n", "\n\n", "\n\n\n", "\nbye", " "])
right_format = st.builds(
    lambda thought, answer, tail: f"<reasoning>\n{thought}\n</reasoning>\n<answer>\n{answer}\n</answer>" + tail,
    lines,
    lines,
    tails,
)
texts = st.one_of(right_format, near_format, st.lists(pieces, max_size=14).map("".join), st.text(max_size=30))


def reference_answer(text: str) -> str:
    start = max((place + 8 for place in range(len(text)) if text[place : place + 8] == "<answer>"), default=0)
    end = text.find("</answer>", start)
    return (text[start:] if end < 0 else text[start:end]).strip()


def reference_strict(text: str) -> float:
    rows = text.split("\n")
    ending = rows[5:] in (["</answer>", ""], ["</answer>", "", ""])  # `$` lets one more line break follow
    middle = len(rows) > 5 and [rows[0], rows[2], rows[3]] == ["<reasoning>", "</reasoning>", "<answer>"]
    return 0.5 if middle and ending else 0.0


def reference_soft(text: str) -> float:
    opening, closing = "<reasoning>", "</reasoning>"
    if not text.startswith(opening):
        return 0.0
    first_line_end = text.find("\n") if "\n" in text else len(text)
    for place in range(len(opening), first_line_end):
        if text.startswith(closing, place) and place + len(closing) <= first_line_end:
            rest = text[place + len(closing) :].lstrip()
            if rest.startswith("<answer>") and "</answer>" in rest[len("<answer>") :].partition("\n")[0]:
                return 0.5
    return 0.0


def reference_xml_count(text: str) -> float:
    def places(tag: str) -> list[int]:
        return [match.start() for match in re.finditer(re.escape(tag), text)]

    def after_last(tag: str) -> int:
        return len(text) - (text.rindex(tag) + len(tag)) if tag in text else len(text)

    score = 0.125 * (len(places("<reasoning>\n")) == 1) + 0.125 * (len(places("\n</reasoning>\n")) == 1)
    if len(places("\n<answer>\n")) == 1:
        score += 0.125 - 0.001 * after_last("\n</answer>\n")
    if len(places("\n</answer>")) == 1:
        score += 0.125 - 0.001 * (after_last("\n</answer>") - 1)
    return score


def in_both_shapes(reward, text: str, **columns) -> float | None:
    """The score of one completion, which must not depend on whether it is a string or a conversation."""
    columns = {name: [value] for name, value in columns.items()}
    as_string = reward(completions=[text], prompts=["q"], **columns)
    as_chat = reward(completions=[[{"role": "assistant", "content": text}]], prompts=[[]], **columns)
    assert as_string == as_chat
    return as_string[0]


@given(texts, texts)
def test_correctness_is_two_for_exactly_the_gold_string(text, other):
    assert in_both_shapes(correctness, text, answer=reference_answer(text)) == 2.0
    expected = 2.0 if reference_answer(text) == other else 0.0
    assert in_both_shapes(correctness, text, answer=other) == expected


@given(texts)
def test_integer_is_half_for_digits_only(text):
    assert in_both_shapes(integer, text) == (0.5 if reference_answer(text).isdigit() else 0.0)


@given(texts)
def test_strict_format_is_half_for_seven_exact_lines(text):
    assert in_both_shapes(strict_format, text) == reference_strict(text)


@given(texts)
def test_soft_format_is_half_for_two_one_line_blocks_at_the_start(text):
    assert in_both_shapes(soft_format, text) == reference_soft(text)


@given(texts)
def test_xml_count_is_the_published_sum(text):
    assert in_both_shapes(xml_count, text) == pytest.approx(reference_xml_count(text), abs=1e-12)


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        (PERFECT, (2.0, 0.5, 0.5, 0.0, 0.5)),
        ("<reasoning>2 and 2</reasoning>\n<answer>4</answer>", (2.0, 0.5, 0.0, 0.5, 0.0)),
        ("4", (2.0, 0.5, 0.0, 0.0, 0.0)),
        ("<answer>3</answer> no: <answer>4</answer>", (2.0, 0.5, 0.0, 0.0, 0.0)),
        ("<answer>4 apples</answer>", (0.0, 0.0, 0.0, 0.0, 0.0)),
        (PERFECT.replace("and", "\nand"), (2.0, 0.5, 0.0, 0.0, 0.5)),  # two lines of reasoning
        (PERFECT + "0123456789", (2.0, 0.5, 0.0, 0.0, 0.48)),
        (PERFECT.rstrip("\n"), (2.0, 0.5, 0.0, 0.0, 0.501 - 0.001 * len(PERFECT.rstrip("\n")))),
    ],
)
def test_the_five_scores_of_texts_worked_out_by_hand(text, scores):
    computed = [
        in_both_shapes(correctness, text, answer="4"),
        *(in_both_shapes(reward, text) for reward in (integer, strict_format, soft_format, xml_count)),
    ]
    assert computed == pytest.approx(scores, abs=1e-12)


def test_several_lines_match_only_with_multiline():
    text = "<reasoning>\nfirst\nsecond\n</reasoning>\n<answer>\n4\n5\n</answer>\n"
    for reward in (strict_format, soft_format):
        assert reward(completions=[text]) == [0.0]
        assert reward(completions=[text], multiline=True) == [0.5]
    assert strict_format(completions=[text.replace("\n</answer>", "</answer>")], multiline=True) == [0.0]


def test_a_missing_gold_answer_is_not_applicable():
    assert correctness(completions=["4", "4"], answer=[None, "4"]) == [None, 2.0]


@pytest.mark.parametrize(
    ("text", "gold", "score"),
    [
        ("<answer>$1,234.50</answer>", "1234.5", 1.0),
        ("6 times 7 is \\boxed{42}, not 43", "42", 1.0),
        ("first 3\n#### 42\nand 5 more", "42", 1.0),
        ("perhaps 5, no, 42.", "42", 1.0),
        ("<answer>none</answer> 42", "42", 0.0),  # the tag says where the answer is
        ("no number", "42", 0.0),
        ("42", "no number", None),
        ("42", 42, 1.0),
        ("<answer>−3/4</answer>", "-0.75", 1.0),
    ],
)
def test_numeric_answer_compares_numbers_not_spelling(text, gold, score):
    assert in_both_shapes(numeric_answer, text, answer=gold) == score


def test_numeric_answer_has_an_absolute_and_a_relative_tolerance():
    def score(text, **options):
        return numeric_answer(completions=[text], answer=["200"], **options)[0]

    assert (score("200.000001"), score("200.1")) == (1.0, 0.0)
    assert (score("200.1", tolerance=0.1), score("200.11", tolerance=0.1)) == (1.0, 0.0)
    assert (score("225", relative_tolerance=0.125), score("225.1", relative_tolerance=0.125)) == (1.0, 0.0)


def test_math_verify_sees_through_notation():
    pytest.importorskip("math_verify", reason="an optional install")
    math_verify = resolve_reward("math_verify")
    cases = [
        ("<answer>1/2</answer>", r"\frac{1}{2}", 1.0),
        (r"so it is \boxed{0.5}", "1/2", 1.0),
        ("<answer>x+1</answer>", "1+x", 1.0),
        ("<answer>5 dollars</answer>", "5", 1.0),
        ("<answer>3</answer>", "4", 0.0),
        ("nothing", "4", 0.0),
        ("4", r"\text{Monday}", None),
    ]
    for text, gold, score in cases:
        assert in_both_shapes(math_verify, text, answer=gold) == score, (text, gold)


def test_length_penalty_is_dapos_equation():
    def reference(length: int) -> float:
        if length <= 80:
            return 0.0
        return (80 - length) / 20 if length <= 100 else -1.0

    penalty = LengthPenalty(max_completion_length=100, soft_punish_cache=20)
    lengths = range(0, 130)
    assert penalty([[7] * length for length in lengths]) == pytest.approx([reference(length) for length in lengths])


@given(st.lists(st.integers(0, 3), max_size=12), st.integers(1, 4))
def test_repetition_penalty_is_the_share_of_repeated_ngrams(ids, size):
    grams = [tuple(ids[start : start + size]) for start in range(len(ids) - size + 1)]
    repeated = sum(gram in grams[:place] for place, gram in enumerate(grams))
    expected = -0.5 * repeated / len(grams) if grams else 0.0
    assert RepetitionPenalty(ngram_size=size, max_penalty=-0.5)([ids]) == pytest.approx([expected])


def test_regular_expression_scores_a_match_where_it_is_told_to_look():
    texts = ["ab", "xab", "abx"]
    assert RegularExpression("ab")(texts) == [1.0, 1.0, 1.0]
    assert RegularExpression("ab", how="match", score=-2)(texts) == [-2.0, 0.0, -2.0]
    assert RegularExpression("(?i)AB", how="fullmatch")(texts) == [1.0, 0.0, 0.0]


def test_tag_count_is_the_share_of_tags_that_occur_once():
    assert tag_count(["<reasoning></reasoning><answer></answer>", "<answer></answer><answer>", ""]) == [1.0, 0.25, 0.0]
    assert tag_count(["<think>", "<think></think>"], tags=["think"]) == [0.5, 1.0]


@pytest.mark.parametrize(
    "make",
    [
        lambda: LengthPenalty(100, 0),
        lambda: LengthPenalty(100, 101),
        lambda: RepetitionPenalty(ngram_size=0),
        lambda: RepetitionPenalty(max_penalty=0.5),
        lambda: RegularExpression("("),
        lambda: RegularExpression("a", how="find"),
    ],
)
def test_options_out_of_range_are_refused(make):
    with pytest.raises(ValueError, match=" = "):
        make()


def test_every_built_in_name_and_alias_leads_to_a_reward():
    for name in [*BUILTIN, *ALIASES]:
        try:
            assert callable(resolve_reward(name))
        except UserError as error:
            assert name == "math_verify" and "pip install math-verify" in str(error)
