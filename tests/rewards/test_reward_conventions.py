"""Reward functions as other projects write them run unchanged, and what they may return.

Each function here is our own, written to the calling convention that its project documents.
"""

from __future__ import annotations

import asyncio
import functools
import math
import re
from fractions import Fraction

import numpy as np
import pytest
import torch

from grpo.errors import UserError
from grpo.rewards.runtime.contract import BadReturn, RewardBatch, RewardResult, RewardSpec, check_scores, merge_results
from grpo.rewards.runtime.conventions import RewardFunction

QUESTIONS = ["2+2?", "3+3?"]
TEXTS = ["<answer>4</answer>", "six: <answer>7</answer>"]
CHAT = [[{"role": "system", "content": "Sums."}, {"role": "user", "content": question}] for question in QUESTIONS]


def batch(chat: bool = False, **columns) -> RewardBatch:
    columns = columns or {"answer": ["4", "6"], "question": QUESTIONS}
    return RewardBatch(CHAT if chat else QUESTIONS, TEXTS, [[1, 2], [3]], columns, step=5, max_steps=50)


def scores(function, given: RewardBatch, options=None) -> list[float | None]:
    return RewardFunction(function, "mine", options or {}).score(given).values


# TRL's documentation


def trl_with_kwargs(completions, answer, **kwargs):
    assert set(kwargs) == {
        *("prompts", "completion_ids", "question", "trainer_state", "log_extra", "log_metric"),
    }
    return [1.0 if gold in text else 0.0 for text, gold in zip(completions, answer, strict=True)]


def trl_without_kwargs(prompts, completions):
    return [float(len(prompt) + len(text)) for prompt, text in zip(prompts, completions, strict=True)]


def trl_on_token_ids(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


def trl_conversational(completions, answer, **kwargs):
    contents = [completion[0]["content"] for completion in completions]
    assert all(completion[-1]["role"] == "assistant" and len(completion) == 1 for completion in completions)
    return [1.0 if re.search(rf"\b{gold}\b", content) else 0.0 for content, gold in zip(contents, answer, strict=True)]


def trl_partly_applicable(prompts, completions, task, **kwargs):
    return [1.0 if kind == "math" else None for kind in task]


def trl_with_state_and_logs(completions, trainer_state, log_metric=None, log_extra=None, **kwargs):
    log_metric("progress", trainer_state.global_step / trainer_state.max_steps)
    log_metric("progress", 0.3)
    log_extra("length", [len(text) for text in completions])
    return [0.0] * len(completions)


async def trl_async(prompts, completions, **kwargs):
    await asyncio.sleep(0)
    return [0.5] * len(prompts)


def test_trl_functions_get_batches_by_keyword():
    assert scores(trl_with_kwargs, batch()) == [1.0, 0.0]
    assert scores(trl_without_kwargs, batch()) == [22.0, 27.0]
    assert scores(trl_on_token_ids, batch()) == [2.0, 1.0]
    assert scores(trl_conversational, batch(chat=True)) == [1.0, 0.0]
    assert scores(trl_partly_applicable, batch(task=["math", "code"])) == [1.0, None]
    assert scores(lambda answer: [float(gold) for gold in answer], batch()) == [4.0, 6.0]
    assert scores(lambda **kwargs: [float(len(kwargs["completions"]))] * 2, batch()) == [2.0, 2.0]


def test_trl_functions_may_log_metrics_and_extra_columns():
    result = RewardFunction(trl_with_state_and_logs, "mine", {}).score(batch())
    assert result.metrics == {"progress": [0.1, 0.3]}
    assert result.extras == {"length": [18, 23]}


def test_coroutine_functions_are_recognised_in_every_guise():
    class Callable:
        async def __call__(self, completions):
            return [0.5] * len(completions)

    async def per_sample(completion, weight):
        return weight

    for function in (trl_async, Callable(), functools.partial(per_sample, weight=0.5)):
        wrapped = RewardFunction(function, "mine", {})
        assert wrapped.is_async
        assert asyncio.run(wrapped.score_async(batch())).values == [0.5, 0.5]
    assert not RewardFunction(trl_with_kwargs, "mine", {}).is_async


# Unsloth's GRPO notebooks

CALLS = 0


def notebook_answer(text: str) -> str:
    return text.split("<answer>")[-1].split("</answer>")[0].strip()


def notebook_correctness(prompts, completions, answer, **kwargs) -> list[float]:
    global CALLS
    CALLS += 1
    responses = [completion[0]["content"] for completion in completions]
    question = prompts[0][-1]["content"]
    extracted = [notebook_answer(response) for response in responses]
    print("-" * 20, f"Question:\n{question}", f"\nAnswer:\n{answer[0]}", f"\nExtracted:\n{extracted[0]}")
    return [2.0 if guess == gold else 0.0 for guess, gold in zip(extracted, answer, strict=True)]


def notebook_numbers(prompts, completions, answer, **kwargs):
    values = []
    for completion, gold in zip(completions, answer, strict=True):
        match = re.search(r"<answer>.*?([\d.,]+)", completion[0]["content"], flags=re.DOTALL)
        values.append(0 if match is None else 1.5 if float(match.group(1)) == float(gold) else -0.5)
    return values


def test_notebook_functions_get_conversations_and_print(capsys):
    assert scores(notebook_correctness, batch(chat=True)) == [2.0, 0.0]
    assert CALLS == 1
    assert "Question:\n2+2? \nAnswer:\n4" in capsys.readouterr().out
    assert scores(notebook_numbers, batch(chat=True)) == [1.5, -0.5]


# verl


def verl_score(data_source, solution_str, ground_truth, extra_info=None):
    assert data_source == "sums" and extra_info["index"] in (0, 1)
    return 1.0 if f"<answer>{ground_truth}<" in solution_str else 0.0


def verl_short(solution_str, ground_truth, format_score=0.1):
    return 1.0 if ground_truth in solution_str else format_score


def verl_dict(data_source, solution_str, ground_truth, extra_info, bonus=0):
    right = ground_truth in solution_str
    return {"score": right + bonus, "acc": right, "pred": notebook_answer(solution_str)}


def test_verl_functions_get_one_solution_and_its_ground_truth():
    rows = batch(
        data_source=["sums"] * 2, reward_model=[{"ground_truth": gold} for gold in "46"], extra_info=[{"index": 0}] * 2
    )
    assert scores(verl_score, rows) == [1.0, 0.0]
    assert scores(verl_short, rows) == [1.0, 0.1]
    assert scores(verl_short, batch(ground_truth=["4", "7"])) == [1.0, 1.0]
    assert scores(verl_short, batch(chat=True), {"format_score": 0.2}) == [1.0, 0.2]  # gold from `answer`


def test_verl_dicts_are_scores_with_extras_and_metrics():
    result = RewardFunction(verl_dict, "mine", {"bonus": 1}).score(batch())
    assert result.values == [2.0, 1.0]
    assert result.extras == {"mine/acc": [True, False], "mine/pred": ["4", "7"]}
    assert result.metrics == {"rewards/mine/acc": [0.5]}


# verifiers


def verifiers_exact(completion, answer):
    text = completion if isinstance(completion, str) else completion[-1]["content"]
    return 1.0 if f">{answer}<" in text else 0.0


def verifiers_with_parser(parser, completion, answer, **kwargs):
    assert kwargs["info"] == {} and kwargs["task"] == "default" and "prompt" in kwargs and "question" in kwargs
    return float(parser.parse_answer(completion) == answer) + float(parser.parse(kwargs["state"]["question"]) != "")


async def verifiers_async(state, info):
    await asyncio.sleep(0)
    return info["bonus"] if state["answer"] in str(state["completion"]) else 0


def verifiers_group(completions, answers, states) -> list[float]:
    assert [state["answer"] for state in states] == answers
    return [1.0 / len(completions)] * len(completions)


@pytest.mark.parametrize("chat", [False, True])
def test_verifiers_functions_get_one_rollout_by_parameter_name(chat):
    assert scores(verifiers_exact, batch(chat)) == [1.0, 0.0]
    assert scores(verifiers_with_parser, batch(chat)) == [2.0, 1.0]
    assert scores(verifiers_group, batch(chat)) == [0.5, 0.5]
    rows = batch(chat, answer=["4", "6"], info=[{"bonus": 3}, {"bonus": 4}])
    assert asyncio.run(RewardFunction(verifiers_async, "mine", {}).score_async(rows)).values == [3.0, 0.0]


# reasoning-gym, torchforge, OpenRLHF


class GymDataset:
    def score_answer(self, answer: str | None, entry: dict) -> float:
        if answer == entry["answer"]:
            return 1.0
        return 0.05 if entry["metadata"]["partial"] and answer.isdigit() else 0.0


class ForgeReward:
    def __init__(self, partial: float = 0.1):
        self.partial = partial

    def __call__(self, prompt: str, response: str, target: str) -> float:
        assert prompt.endswith("?")
        return 1.0 if target in response else self.partial


def openrlhf_reward(queries, prompts, labels, **kwargs):
    assert all(query.startswith(prompt) for query, prompt in zip(queries, prompts, strict=True))
    right = torch.tensor([float(f">{label}<" in query) for query, label in zip(queries, labels, strict=True)])
    return {"rewards": right, "scores": right, "extra_logs": {"right": right, "share": right.mean()}}


def test_reasoning_gym_functions_get_the_extracted_answer_and_the_row():
    rows = batch(answer=["4", "6"], metadata=[{"partial": True}] * 2)
    assert scores(GymDataset().score_answer, rows) == [1.0, 0.05]


def test_torchforge_classes_are_made_with_their_options():
    assert scores(ForgeReward, batch(chat=True)) == [1.0, 0.1]
    assert scores(ForgeReward, batch(), {"partial": 0.2}) == [1.0, 0.2]
    assert scores(ForgeReward(0.3), batch(target=["4", "7"])) == [1.0, 1.0]


def test_openrlhf_functions_return_a_dict_with_logs():
    for rows in (batch(chat=True), batch(label=["4", "6"]), batch(labels=["4", "6"])):
        result = RewardFunction(openrlhf_reward, "mine", {}).score(rows)
        assert result.values == [1.0, 0.0]
        assert result.extras == {"mine/right": [1.0, 0.0]}
        assert result.metrics == {"rewards/mine/share": [0.5], "rewards/mine/right": [0.5]}


# What functions ask for and return


def test_functions_get_their_own_copies():
    def vandal(prompts, completions, answer, completion_ids):
        for values in (prompts, completions, answer, completion_ids):
            values.clear()
        return [0, 0]

    given = batch()
    scores(vandal, given)
    assert given == batch()


@pytest.mark.parametrize("function", [trl_with_kwargs, verl_short, verifiers_exact, ForgeReward, openrlhf_reward])
def test_a_missing_column_is_named_with_those_that_exist(function):
    wrapped = RewardFunction(function, "mine", {})
    for ask in (lambda: wrapped.score(batch(solution=["4", "6"])), lambda: wrapped.check_columns({"solution": "4"})):
        with pytest.raises(UserError, match=r"'mine' asks for '\w+', .* \(there are: solution\)"):
            ask()


def test_options_are_passed_and_unknown_ones_refused():
    def scaled(completions, factor, offset=0.0):
        return [factor + offset] * len(completions)

    assert scores(scaled, batch(), {"factor": 2.0, "offset": 1.0}) == [3.0, 3.0]
    extra = RewardFunction(lambda completions, **kwargs: [kwargs["factor"]] * 2, "mine", {"factor": 2.0})
    assert extra.score(batch()).values == [2.0, 2.0]
    with pytest.raises(UserError, match="takes no option 'ofset'; it takes completions, factor, offset"):
        RewardFunction(scaled, "mine", {"ofset": 1.0})
    with pytest.raises(UserError, match="'mine': got an unexpected keyword argument 'full'"):
        RewardFunction(ForgeReward, "mine", {"full": 1.0})
    with pytest.raises(UserError, match="positional-only"):
        RewardFunction(len, "mine", {})
    with pytest.raises(UserError, match="is int, not a function"):
        RewardFunction(3, "mine", {})


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ([1, 0.5], [1.0, 0.5]),
        ([True, None], [1.0, None]),
        ((1, 2), [1.0, 2.0]),
        ((value for value in (1, 2)), [1.0, 2.0]),
        ([{"score": 1}, {"score": None, "why": "?"}], [1.0, None]),
        ([Fraction(1, 4), np.float32(0.5)], [0.25, 0.5]),
        ([np.int64(3), np.bool_(True)], [3.0, 1.0]),
        ([np.array(3), np.array([0.5])], [3.0, 0.5]),
        ([torch.tensor(0.5), torch.tensor([2])], [0.5, 2.0]),
        (np.array([0.5, 1]), [0.5, 1.0]),
        (torch.tensor([0.5, 1.0], dtype=torch.bfloat16), [0.5, 1.0]),
        ({"rewards": [1, 2]}, [1.0, 2.0]),
    ],
)
def test_scores_may_be_any_kind_of_number(returned, expected):
    values = check_scores(returned, 2, "mine").values
    assert values == expected
    assert all(value is None or type(value) is float for value in values)


class Unprintable:
    def __repr__(self):
        raise RuntimeError


@pytest.mark.parametrize(
    ("returned", "problem"),
    [
        ([1.0], "returned 1 values for 2 completions"),
        ([1.0] * 3, "returned 3 values for 2 completions"),
        ([[1.0], [2.0]], r"returned \[1.0\] \(list\) for completion 1 of 2"),
        ([1.0, "2"], r"returned '2' \(str\) for completion 2 of 2"),
        ([1.0, math.nan], "returned nan .* completion 2"),
        ([-math.inf, 1.0], "returned -inf .* completion 1"),
        (np.array([1, np.nan]), "returned nan"),
        ([10**400, 1], "returned 1000.* completion 1"),
        ([10**5000, 1], "returned a int for completion 1"),
        ([1 + 1j, 1], r"returned \(1\+1j\)"),
        ([{"value": 1}, 1], 'dict without "score" for completion 1'),
        ([{"score": "1"}, 1], "returned '1'"),
        (["a" * 1000, 1], r"a{79}\.\.\. \(str\)"),
        ([Unprintable(), 1], "returned a Unprintable for completion 1"),
        (1.0, r"returned 1.0 \(float\), not a list"),
        (None, "returned None .*not a list"),
        ("11", "returned '11' .*not a list"),
        ({1.0, 2.0}, r"\(set\), not a list"),
        (torch.tensor(1.0), "not a list"),
        (np.ones((2, 2)), r"returned \[1.0, 1.0\] \(list\)"),
        ([torch.ones(2), 1], "returned tensor"),
    ],
)
def test_nonsense_is_named_with_what_was_expected(returned, problem):
    with pytest.raises(BadReturn, match=f"{problem}.*; return one finite number, None, or dict") as error:
        check_scores(returned, 2, "mine")
    assert len(str(error.value)) < 300


def test_what_is_logged_is_checked_too():
    for log in (
        lambda log_metric, log_extra: log_metric("m", math.nan),
        lambda log_metric, log_extra: log_metric("m", "1"),
        lambda log_metric, log_extra: log_extra("c", [1]),
    ):

        def logging(completions, log_metric, log_extra, log=log):
            log(log_metric, log_extra)
            return [0, 0]

        with pytest.raises(BadReturn, match="^logged "):
            RewardFunction(logging, "mine", {}).score(batch())


def test_a_batch_has_equally_long_lists():
    with pytest.raises(ValueError, match="column 'answer' has 1 entries for 2 completions"):
        batch(answer=["4"])


def test_results_of_groups_merge_in_order():
    first = RewardResult({"a": [1.0, None]}, {"m": 1.0, "rewards/a/errors": 1.0}, {"x": [1, 2]}, {"a": 0.5})
    second = RewardResult({"a": [3.0]}, {"m": 2.0, "rewards/a/errors": 1.0}, {}, {"a": 0.25})
    merged = merge_results([first, second])
    assert merged.scores == {"a": [1.0, None, 3.0]}
    assert merged.extras == {"x": [1, 2, None]}
    assert merged.metrics == {"m": 1.5, "rewards/a/errors": 2.0}
    assert merged.seconds == {"a": 0.75}


def test_a_reward_may_be_given_as_a_name_a_table_a_callable_or_a_config():
    from grpo.config.schema import Reward

    assert RewardSpec.of("pkg.mod:func").column == "func"
    assert RewardSpec.of("pkg.mod.func").column == "func"
    assert RewardSpec.of("some.dir/file.py:func").column == "func"
    assert RewardSpec.of({"function": "correctness", "name": "c", "weight": 2}) == RewardSpec("correctness", 2, "c")
    assert RewardSpec.of(functools.partial(trl_with_kwargs, answer=1)).column == "trl_with_kwargs"
    assert RewardSpec.of(ForgeReward()).column == "ForgeReward"
    assert RewardSpec.of(Reward(function="integer", timeout=3.0, options={"a": 1})) == RewardSpec(
        "integer", timeout=3.0, options={"a": 1}
    )
    with pytest.raises(UserError, match="unknown key 'wieght'"):
        RewardSpec.of({"function": "correctness", "wieght": 2})
    with pytest.raises(UserError, match="'function' is missing"):
        RewardSpec.of({"weight": 2})
