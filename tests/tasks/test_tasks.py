"""The tasks that come with the project: rows exactly as documented, checks that tell right from wrong, and refusals."""

from __future__ import annotations

import itertools
import re
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.rewards.builtin import resolve_reward
from grpo.rewards.runtime.contract import RewardBatch, RewardSpec
from grpo.rewards.runtime.conventions import RewardFunction
from grpo.tasks import arithmetic, countdown, expression, gsm8k
from grpo.tasks.common import load_task
from tests.helpers.task_files import refusal, write_lines

SYSTEM = "\nRespond in the following format:\n<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>\n"
PENS = {"question": "A box holds 12 pens. 100 boxes?", "answer": "12*100=<<12*100=1200>>1200\n#### 1,200"}
TENTS = {"question": "Two tents hold 3 people each. How many people?", "answer": "2*3=6 people\n####  6 "}


@pytest.fixture
def gsm8k_folder(tmp_path: Path) -> Path:
    write_lines(tmp_path / "data" / "train.jsonl", [PENS, TENTS])
    write_lines(tmp_path / "data" / "test.jsonl", [TENTS])
    return tmp_path / "data"


# GSM8K


def test_gsm8k_rows_are_the_documented_ones(gsm8k_folder: Path) -> None:
    task = load_task("gsm8k", {"path": str(gsm8k_folder)})
    assert task.train == [
        {
            "prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": PENS["question"]}],
            "answer": "1,200",
        },
        {
            "prompt": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": TENTS["question"]}],
            "answer": "6",
        },
    ]
    assert [row["answer"] for row in task.eval] == ["6"]
    assert [reward["function"] for reward in task.rewards] == [
        "correctness", "integer", "strict_format", "soft_format", "xml_count",
    ]  # fmt: skip


def test_gsm8k_strict_compares_text_and_flexible_compares_numbers() -> None:
    row = {"answer": "1,200"}
    for text, strict, flexible in [
        ("<reasoning>\nx\n</reasoning>\n<answer>\n1,200\n</answer>\n", True, True),
        ("<answer>1200</answer>", False, True),
        ("They hold 12 each, so 1200 pens.", False, True),
        ("1,200", False, True),
        ("<answer>120</answer>", False, False),
        ("", False, False),
    ]:
        assert (gsm8k.strict(text, row), gsm8k.flexible(text, row)) == (strict, flexible), text


def test_gsm8k_without_a_marked_answer_names_the_row(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", [PENS, {"question": "How many?", "answer": "seven"}])
    assert "train.jsonl:2: " in refusal(lambda: load_task("gsm8k", {"path": str(tmp_path)}))


def test_every_suggested_reward_scores_the_tasks_rows(gsm8k_folder: Path) -> None:
    tasks = [
        load_task("gsm8k", {"path": str(gsm8k_folder)}),
        load_task("arithmetic", {"rows": 5, "held_out": 2}),
        load_task("countdown", {"rows": 5, "held_out": 2}),
        load_task("table", {"path": str(gsm8k_folder)}),
    ]
    for task in tasks:
        columns = {name: [value] for name, value in task.train[0].items() if name != "prompt"}
        batch = RewardBatch([task.train[0]["prompt"]], ["<answer>1</answer>"], [[1]], columns)
        for table_ in task.rewards:
            spec = RewardSpec.of(table_)
            function = RewardFunction(resolve_reward(spec.function), spec.column, spec.options)
            assert len(function.score(batch).values) == 1


# Arithmetic


@pytest.mark.parametrize("answer_format", ["equation", "number", "tag", "xml"])
def test_arithmetic_shows_the_form_that_it_rewards(answer_format: str) -> None:
    """The worked example, asked as a question, is itself a completion with full marks."""
    task = load_task("arithmetic", {"answer_format": answer_format, "operations": ["+", "-", "*"], "high": 99})
    example = task.train[0]["prompt"]
    asked, reply = example[0]["content"], example[1]["content"]
    a, operation, b = re.fullmatch(r"What is (-?\d+) (.) (-?\d+)\?", asked).groups()  # type: ignore[union-attr]
    row = arithmetic.row((operation, int(a), int(b)), [], arithmetic.REPLIES[answer_format], None)  # type: ignore[index]
    assert row["prompt"] == [{"role": "user", "content": asked}]
    assert task.strict(reply, row) and task.flexible(reply, row)
    assert arithmetic.right_form([reply], form=[row["form"]]) == [1.0]
    assert arithmetic.right_digits([reply], answer=[row["answer"]]) == [1.0]
    wrong = reply[: reply.rindex(row["answer"])] + "5" + reply[reply.rindex(row["answer"]) :]
    assert not task.strict(wrong, row) and not task.flexible(wrong, row)
    assert arithmetic.right_form([wrong], form=[row["form"]]) == [1.0]
    assert arithmetic.right_form([reply + " That is all."], form=[row["form"]]) == [0.0]


def test_arithmetic_answers_are_right() -> None:
    task = load_task("arithmetic", {"operations": ["+", "-", "*"], "low": -5, "high": 12, "held_out": 20})
    assert {row["question"].split()[1] for row in task.train} == {"+", "-", "*"}
    for row in [*task.train, *task.eval]:
        a, operation, b = row["question"].split()
        right = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[operation]
        assert row["answer"] == str(right)
        assert row["prompt"][-1] == {"role": "user", "content": f"What is {row['question']}?"}


@given(st.integers(0, 2**31), st.integers(0, 30), st.integers(0, 4))
def test_arithmetic_holds_out_questions_in_either_order(seed: int, held_out: int, shots: int) -> None:
    options = {"low": 0, "high": 12, "operations": ["+", "-"], "held_out": held_out, "shots": shots, "seed": seed}
    task = load_task("arithmetic", options)

    def key(question: str) -> tuple[str, ...]:
        a, operation, b = question.split()
        return (operation, a, b) if operation == "-" else (operation, *sorted((a, b)))

    train = {key(row["question"]) for row in task.train}
    held = {key(row["question"]) for row in task.eval}
    turns = task.train[0]["prompt"]
    shown = {key(turn["content"].removeprefix("What is ").removesuffix("?")) for turn in turns[:-1:2]}
    assert len(held) == len(task.eval) == held_out
    assert len(shown) == shots and len(turns) == 2 * shots + 1
    assert not train & held and not train & shown and not held & shown
    assert len({row["question"] for row in task.train}) == len(task.train)
    assert all(row["prompt"][:-1] == turns[:-1] for row in [*task.train, *task.eval])


def test_arithmetic_is_a_function_of_its_seed() -> None:
    assert load_task("arithmetic", {"seed": 3}) == load_task("arithmetic", {"seed": 3})
    assert load_task("arithmetic", {"seed": 3}).train != load_task("arithmetic", {"seed": 4}).train


def test_right_digits_grades_near_misses() -> None:
    graded = [
        ("54 it is", "54", 1.0),
        ("64", "54", 0.5),
        ("4", "54", 0.5),
        ("154", "54", 2 / 3),
        ("-54", "54", 2 / 3),
        ("54.5", "54", 0.0),
        ("no idea", "54", 0.0),
    ]
    texts, answers, scores = zip(*graded, strict=True)
    assert arithmetic.right_digits(list(texts), answer=list(answers)) == pytest.approx(scores)
    turns = [[{"role": "assistant", "content": text}] for text in texts]
    assert arithmetic.right_digits(turns, answer=list(answers)) == pytest.approx(scores)


def test_arithmetic_refuses_what_it_cannot_make() -> None:
    assert "held_out" in refusal(lambda: load_task("arithmetic", {"low": 0, "high": 3, "held_out": 50}))
    assert "low" in refusal(lambda: load_task("arithmetic", {"low": 5, "high": 3}))
    assert "'equation'" in refusal(lambda: load_task("arithmetic", {"answer_format": "prose"}))
    assert "operations" in refusal(lambda: load_task("arithmetic", {"operations": ["/"]}))


# Countdown


def reachable(numbers: list[int]) -> set[Fraction]:
    """Every value of an expression over all or some of `numbers`, by brute force."""
    values: set[Fraction] = set()
    stack = [tuple(map(Fraction, numbers))]
    while stack:
        state = stack.pop()
        values.update(state)
        for i, j in itertools.permutations(range(len(state)), 2):
            rest = tuple(state[k] for k in range(len(state)) if k not in (i, j))
            a, b = state[i], state[j]
            stack += [(*rest, value) for value in (a + b, a - b, a * b)] + ([(*rest, a / b)] if b else [])
    return values


def test_countdown_questions_have_an_answer() -> None:
    task = load_task("countdown", {"rows": 30, "held_out": 10, "numbers": [3, 3], "seed": 1})
    for row in [*task.train, *task.eval]:
        assert 10 <= row["target"] <= 100
        assert row["target"] in reachable(row["numbers"])
        assert row["prompt"][-1]["content"].startswith(f"Numbers: {row['numbers'][0]},")


def test_countdown_rows_differ_and_held_out_ones_are_new() -> None:
    task = load_task("countdown", {"rows": 400, "held_out": 100, "largest": 9, "numbers": [2, 3], "targets": [1, 80]})
    keys = [(*sorted(row["numbers"]), row["target"]) for row in [*task.train, *task.eval]]
    assert len(task.train) == 400 and len(task.eval) == 100 and len(set(keys)) == 500


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("<answer>44 + 19 + 35</answer>", True, True),
        ("Adding: <answer>\n(44 + 35) +\n19 = 98\n</answer>", True, True),
        ("- 44 + 19 + 35 = 98", False, True),
        ("I take 44, then 44 + 19 × 2, no: 44+19+35. Done", False, True),
        ("<answer>49 + 49</answer>", False, False),
        ("<answer>44 + 44 + 10</answer>", False, False),
        ("<answer>98</answer>", False, False),
        ("<answer>44 + 19</answer>", False, False),
        ("<answer>__import__('os').system('x')</answer>", False, False),
        ("<answer></answer>", False, False),
        ("", False, False),
    ],
)
def test_countdown_checks(text: str, strict: bool, flexible: bool) -> None:
    row = {"numbers": [44, 19, 35], "target": 98}
    assert (countdown.strict(text, row), countdown.flexible(text, row)) == (strict, flexible)
    assert countdown.equation([text], numbers=[row["numbers"]], target=[98]) == [float(strict)]


def test_countdown_rewards_know_their_rows() -> None:
    texts = ["<answer>44 - 19</answer>", "<answer>44 - 18</answer>", "44 - 19", "<answer>44 - 19</answer>"]
    numbers = [[44, 19, 35], [44, 19, 35], [44, 19, 35], None]
    assert countdown.usable(texts, numbers=numbers) == [1.0, 0.0, 0.0, None]
    assert countdown.equation(texts, numbers=numbers, target=[25, 26, 25, None]) == [1.0, 0.0, 0.0, None]


EXPRESSIONS = st.recursive(
    st.integers(0, 99).map(str),
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(
        lambda parts: f"({parts[0]} {parts[1]} {parts[2]})"
    ),
    max_leaves=8,
)


@given(EXPRESSIONS)
def test_expressions_are_evaluated_exactly(text: str) -> None:
    exact = re.sub(r"\d+", lambda number: f"Fraction({number[0]})", text)
    try:
        expected = eval(exact, {"Fraction": Fraction})
    except ZeroDivisionError:
        expected = None
    result = expression.evaluate(text)
    assert (result and result[0]) == expected
    if result:
        assert sorted(result[1].elements()) == sorted(map(int, re.findall(r"\d+", text)))


@given(st.text(alphabet="0123456789+-*/() \n=.e_,ax[]{}×÷−'\\\x00", max_size=300))
def test_no_text_breaks_the_evaluation(text: str) -> None:
    result = expression.evaluate(text)
    assert result is None or isinstance(result[0], Fraction)
    expression.last_expression(text)


@pytest.mark.parametrize(
    "text", ["2**9", "7//2", "1/0", "007", "3(4)", "9 9", "1_0", "x", "()", "1.5", "٣ + 4", "(" * 150, "1+" * 150 + "1"]
)
def test_what_is_no_expression(text: str) -> None:
    assert expression.evaluate(text) is None


# reasoning-gym


def test_reasoning_gym_rows_and_scores_are_the_packages_own() -> None:
    pytest.importorskip("reasoning_gym")
    from grpo.tasks import reasoning_gym

    options = {"dataset": "chain_sum", "rows": 40, "held_out": 20, "config": {"min_terms": 2, "max_terms": 2}}
    task = load_task("reasoning_gym", options)
    assert task.name == "chain_sum" and len(task.train) == 40
    questions = {row["prompt"][-1]["content"] for row in task.train}
    assert not questions & {row["prompt"][-1]["content"] for row in task.eval}
    row = task.train[0]
    right = f"<answer>{row['answer']}</answer>"
    assert task.strict(right, row) and task.flexible(right, row)
    assert task.flexible(f"I add.\n{row['answer']}", row) and not task.strict(row["answer"], row)
    assert not task.flexible("", row) and not task.strict("<answer>x</answer>", row)
    function, arguments = task.rewards[0]["function"], task.rewards[0]["options"]
    assert resolve_reward(function) is reasoning_gym.score
    scores = reasoning_gym.score([right, "none", right], entry=[row["entry"], row["entry"], None], **arguments)
    assert scores == [1.0, 0.0, None]


def test_reasoning_gym_refusals_are_sentences() -> None:
    pytest.importorskip("reasoning_gym")
    assert "'chain_sum'" in refusal(lambda: load_task("reasoning_gym", {"dataset": "chainsum"}))
    options = {"dataset": "chain_sum", "config": {"terms": 2}}
    assert "terms" in refusal(lambda: load_task("reasoning_gym", options))


def test_missing_reasoning_gym_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from grpo.tasks import reasoning_gym

    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    reasoning_gym.generator.cache_clear()
    assert "pip install reasoning-gym" in refusal(lambda: load_task("reasoning_gym", {"dataset": "chain_sum"}))
