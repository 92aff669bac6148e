"""Evaluation: estimators equal their definitions, and every completion is counted once, for its own question."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo import evaluate as module
from grpo.config.schema import Config, Eval, parse_config
from grpo.data import Prompt
from grpo.errors import UserError
from grpo.run.model_reference import folder_of_adapter
from grpo.tasks.common import Task
from grpo.training.evaluation import (
    EvalResult,
    Sample,
    evaluate,
    measure_pass_rates,
    pass_at_k,
    summarise,
    wilson_interval,
)
from tests.helpers.report_run import write_run

# Statistics


@given(st.integers(1, 9), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(samples: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, samples))
    k = data.draw(st.integers(1, samples))
    outcomes = [True] * correct + [False] * (samples - correct)
    subsets = list(itertools.combinations(outcomes, k))
    assert pass_at_k(samples, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_is_unbiased() -> None:
    """Its expectation over draws of n samples is 1 - (1 - p)^k."""
    p, n, k = 0.3, 6, 3
    expectation = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
    assert expectation == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


@pytest.mark.parametrize(("samples", "correct", "k"), [(4, 2, 5), (4, 2, 0), (4, 5, 1), (4, -1, 1)])
def test_undefined_pass_at_k_is_refused(samples: int, correct: int, k: int) -> None:
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(samples, correct, k)


@given(st.integers(1, 500), st.data())
def test_wilson_ends_are_where_the_score_test_is_at_its_limit(trials: int, data: st.DataObject) -> None:
    """The interval is the set of p with |mean - p| <= z sqrt(p (1 - p) / n)."""
    mean = data.draw(st.integers(0, trials)) / trials
    low, high = wilson_interval(mean, trials)
    assert 0 <= low <= mean <= high <= 1
    for end in (low, high):
        if 0 < end < 1:
            assert abs(mean - end) == pytest.approx(1.959963984540054 * math.sqrt(end * (1 - end) / trials), rel=1e-6)


def test_wilson_interval_of_a_known_case() -> None:
    """Newcombe 1998, table I: 81 of 263 and 0 of 20."""
    assert wilson_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0.0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    with pytest.raises(ValueError):
        wilson_interval(0.5, 0)


def test_wilson_interval_covers_as_often_as_it_says() -> None:
    """Exactly, by summing the binomial distribution; on average over p, since for a single p it depends on luck."""
    trials = 40
    intervals = [wilson_interval(count / trials, trials) for count in range(trials + 1)]

    def coverage(p: float) -> float:
        chance = [math.comb(trials, count) * p**count * (1 - p) ** (trials - count) for count in range(trials + 1)]
        return sum(share for share, (low, high) in zip(chance, intervals, strict=True) if low <= p <= high)

    assert sum(coverage(step / 500) for step in range(1, 500)) / 499 == pytest.approx(0.95, abs=0.006)


# Evaluating: a fake engine that answers out of order


class FakeEngine:
    """Returns, shuffled, what `answer(prompt number, member)` says; token 0 ends a completion."""

    def __init__(self, answers: dict[int, list[str]]):
        self.answers = answers
        self.calls: list[tuple[list[Any], Any, bool]] = []

    def generate(self, requests: Sequence[Any], sampling: Any, *, adapter: bool = True) -> Iterator[Any]:
        self.calls.append((list(requests), sampling, adapter))
        asked: dict[int, int] = {}
        replies = []
        for request in requests:
            question = request.prompt_ids[0]
            member = asked[question] = asked.get(question, -1) + 1
            text = self.answers[question][member % len(self.answers[question])] if adapter else "base"
            replies.append(
                SimpleNamespace(
                    request_id=request.id,
                    token_ids=[ord(letter) for letter in text],
                    finish_reason="length" if text.endswith("…") else "stop",
                )
            )
        random.Random(0).shuffle(replies)
        yield from replies


def session(answers: dict[int, list[str]], **sections: Any) -> Any:
    config = parse_config({"model": {"name": "m"}, "task": {"name": "t"}, "rewards": [], **sections})
    return SimpleNamespace(
        config=config,
        engine=FakeEngine(answers),
        decode=lambda ids: "".join(map(chr, ids)),
        sampling=lambda temperature, max_tokens, top_p=1.0: (temperature, max_tokens, top_p),
    )


def prompts(task: str, *answers: str, start: int = 0) -> list[Prompt]:
    return [
        Prompt(start + n, task, "?", {"answer": answer, "id": start + n}, [start + n, 7])
        for n, answer in enumerate(answers)
    ]


def same_text(text: str, row: dict[str, Any]) -> bool:
    return text == row["answer"]


def contains(text: str, row: dict[str, Any]) -> bool:
    return row["answer"] in text and row["prompt"] == "?"


TASK = Task("t", [], [], strict=same_text, flexible=contains)


def test_strict_and_flexible_are_counted_side_by_side() -> None:
    answers = {0: ["a", "a!"], 1: ["x", "b!"], 2: ["c", "c"], 3: ["", "…"]}
    settings = Eval(num_generations=2, temperature=0.7, top_p=0.9, max_completion_length=5, pass_at=[1, 2])
    asked = session(answers)
    result = evaluate(asked, prompts("t", "a", "b", "c", "d"), {"t": TASK}, settings)
    metrics = result.metrics
    assert metrics["eval/strict_accuracy"] == pytest.approx(3 / 8)
    assert metrics["eval/flexible_accuracy"] == pytest.approx(5 / 8)
    assert metrics["eval/pass@1"] == pytest.approx(3 / 8) and metrics["eval/pass@2"] == pytest.approx(2 / 4)
    assert metrics["eval/flexible_pass@2"] == pytest.approx(3 / 4)
    low, high = wilson_interval(3 / 8, 4)
    assert (metrics["eval/strict_accuracy/low"], metrics["eval/strict_accuracy/high"]) == (low, high)
    assert metrics["eval/completion_length"] == pytest.approx(9 / 8) and metrics["eval/clipped_ratio"] == 1 / 8
    assert metrics["eval_prompts"] == 4
    assert [(s.prompt.index, s.member, s.text) for s in result.samples] == [
        (index, member, answers[index][member]) for index in range(4) for member in range(2)
    ]
    assert asked.engine.calls[0][1:] == ((0.7, 5, 0.9), True)
    json.dumps([metrics, *(sample.entry() for sample in result.samples)], allow_nan=False)
    assert result.samples[1].entry()["completion"] == "a!" and result.samples[1].entry()["answer"] == "a"


def test_the_answers_to_the_first_questions_are_kept_with_both_verdicts() -> None:
    asked = session({0: ["a", "a!"], 1: ["x", "b!"], 2: ["c", "c"]})
    result = evaluate(asked, prompts("t", "a", "b", "c"), {"t": TASK}, Eval(num_generations=2))
    first, second = result.groups(2)
    assert (first.prompt, first.answer, first.task, second.answer) == ("?", "a", "t", "b")
    assert [(s.text, s.reward, s.rewards["flexible"]) for s in first.samples] == [("a", 1.0, 1.0), ("a!", 0.0, 1.0)]
    assert [(s.text, s.tokens) for s in second.samples] == [("x", 1), ("b!", 2)]


def test_several_tasks_have_their_own_figures_too() -> None:
    both = [*prompts("t", "a", "b"), *prompts("u", "c", start=2)]
    tasks = {"t": TASK, "u": Task("u", [], [], strict=contains, flexible=contains)}
    metrics = evaluate(session({0: ["a"], 1: ["x"], 2: ["cc"]}), both, tasks, Eval()).metrics
    assert metrics["eval/strict_accuracy"] == pytest.approx(2 / 3)
    assert metrics["eval/t/strict_accuracy"] == 0.5 and metrics["eval/u/strict_accuracy"] == 1.0
    alone = evaluate(session({0: ["a"]}), prompts("t", "a"), {"t": TASK}, Eval()).metrics
    assert not [key for key in alone if key.startswith("eval/t/")]


def test_samples_have_their_own_seeds_which_no_evaluation_changes() -> None:
    settings = Eval(num_generations=4, temperature=1.0)

    def seeds(questions: list[Prompt], seed: int = 0) -> dict[tuple[int, int], int]:
        asked = session({0: ["a"], 1: ["b"], 2: ["c"]}, train={"seed": seed})
        evaluate(asked, questions, {"t": TASK}, settings)
        requests = asked.engine.calls[0][0]
        return {(request.prompt_ids[0], request.id % 4): request.seed for request in requests}

    three = prompts("t", "a", "b", "c")
    assert len(set(seeds(three).values())) == 12
    assert seeds(three[1:]).items() <= seeds(three).items()
    assert not set(seeds(three, seed=1).values()) & set(seeds(three).values())


def test_the_run_s_completion_length_holds_unless_evaluation_has_its_own() -> None:
    asked = session({0: ["a"]}, rollout={"max_completion_length": 33})
    evaluate(asked, prompts("t", "a"), {"t": TASK}, Eval())
    assert asked.engine.calls[0][1] == (0.0, 33, 1.0)


def test_a_failing_check_is_named_with_its_row() -> None:
    broken = Task("t", [], [], strict=lambda text, row: row["missing"], flexible=contains)
    with pytest.raises(UserError, match=r"'t'.*row 1.*KeyError"):
        evaluate(session({0: ["a"]}), prompts("t", "a"), {"t": broken}, Eval())


def test_no_questions_is_an_error() -> None:
    with pytest.raises(UserError, match="no held-out questions"):
        evaluate(session({}), [], {"t": TASK}, Eval())


def test_pass_rates_are_the_bare_models_and_flexible() -> None:
    asked = session({0: ["a"], 1: ["b"]}, rollout={"temperature": 0.8})
    tasks = {"t": Task("t", [], [], strict=same_text, flexible=lambda text, row: text == "base" and row["id"] == 1)}
    assert measure_pass_rates(asked, prompts("t", "a", "b"), tasks, 4) == [0.0, 1.0]
    requests, sampling, adapter = asked.engine.calls[0]
    assert (len(requests), sampling[0], adapter) == (8, 0.8, False)


# The command line, with the session replaced


def save_adapter(folder: Path) -> Path:
    """As much of an adapter as says that it is one."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    return folder


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of two steps on two questions "a" and "b"; its adapter answers "a" to both."""
    run = tmp_path / "run"
    save_adapter(run / "adapter")
    (run / "config.toml").write_text('[model]\nname = "m"\n[task]\nname = "t"\n[eval]\nlimit = 7\n')
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    monkeypatch.setattr(module, "evaluate_model", fake_target)
    return run


OPENED: list[tuple[Config, Path | None, bool]] = []


def fake_target(config: Config, adapter: Path | None, *, with_base: bool) -> dict[str, EvalResult]:
    OPENED.append((config, adapter, with_base))
    kinds = ([module.ADAPTER] if adapter else []) + ([module.BASE] if with_base or not adapter else [])
    results = {}
    for kind in kinds:
        samples = [Sample(p, 0, "a", 1, False, p.index == 0, kind == module.ADAPTER) for p in prompts("t", "a", "b")]
        results[kind] = EvalResult(summarise(samples, Eval()), samples)
    return results


def test_a_run_is_evaluated_with_its_adapter_and_recorded(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = run_folder / "samples.jsonl"
    arguments = [str(run_folder), "--base", "--set", "eval.limit=none", "--samples", str(samples)]
    assert module.main(arguments) == 0
    config, adapter, with_base = OPENED[-1]
    assert (config.eval.limit, adapter, with_base) == (None, run_folder / "adapter", True)
    entries = [json.loads(line) for line in (run_folder / "eval.jsonl").read_text().splitlines()]
    assert [(entry["step"], entry["eval/flexible_accuracy"]) for entry in entries] == [(2, 1.0), (0, 0.0)]
    assert [entry["adapter"] for entry in entries] == [str(run_folder / "adapter"), None]
    assert len(samples.read_text().splitlines()) == 4
    shown = capsys.readouterr().out.splitlines()
    assert json.loads(shown[-1]) == entries[0]
    assert any("strict_accuracy" in line and "0.500" in line for line in shown)


def test_a_model_is_evaluated_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "evaluate_model", fake_target)
        output = tmp_path / "out.jsonl"
        assert module.main(["some/model", "--task", "gsm8k", "--output", str(output)]) == 0
    config, adapter, _ = OPENED[-1]
    assert (config.model.name, config.task[0].name, adapter) == ("some/model", "gsm8k", None)
    assert json.loads(output.read_text())["step"] == 0


def test_another_task_replaces_the_runs_own(run_folder: Path) -> None:
    assert module.main([str(run_folder), "--task", "countdown", "--set", "task.options.rows=3"]) == 0
    config = OPENED[-1][0]
    assert [(task.name, task.options) for task in config.task] == [("countdown", {"rows": 3})]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["some/model"], "--task"),
        (["RUN", "--set", "eval.limt=3"], "did you mean 'limit'"),
        (["RUN", "--adapter", "nowhere"], "nowhere"),
        (["RUN", "--output", "no/such/folder/eval.jsonl"], "--output"),
    ],
)
def test_bad_arguments_end_with_a_sentence(
    run_folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    assert module.main([str(run_folder) if argument == "RUN" else argument for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("grpo.evaluate: ") and expected in error and error.count("\n") == 1


def test_a_run_without_an_adapter_says_so(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_folder / "adapter" / "adapter_config.json").unlink()
    assert module.main([str(run_folder)]) == 2
    assert "no adapter" in capsys.readouterr().err


def test_a_run_is_evaluated_with_the_adapter_that_other_commands_take(run_folder: Path) -> None:
    """An adapter folder that was begun and not written is none: the newest checkpoint's adapter counts."""
    (run_folder / "adapter" / "adapter_config.json").unlink()
    for step in (2, 10):
        checkpoint = run_folder / "checkpoints" / f"step-{step}"
        save_adapter(checkpoint / "adapter")
        (checkpoint / "manifest.json").write_text('{"files": {}}')
    assert module.main([str(run_folder)]) == 0
    assert OPENED[-1][1] == folder_of_adapter(run_folder) == run_folder / "checkpoints" / "step-10" / "adapter"


def reported_run(folder: Path) -> Path:
    """A finished run with its report, and an adapter."""
    run = write_run(folder, steps=2)
    save_adapter(run / "adapter")
    return run


def test_an_evaluation_of_a_finished_run_is_in_its_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "evaluate_model", fake_target)
    run, other = reported_run(tmp_path / "run"), tmp_path / "other.jsonl"
    before = (run / "report.html").read_bytes()
    assert b"afterwards:" not in before
    assert module.main([str(run), "--output", str(other)]) == 0
    assert (run / "report.html").read_bytes() == before
    assert module.main([str(run)]) == 0
    assert (run / "report.html").read_bytes().count(b"afterwards:") == 1


def test_a_run_without_a_report_gets_none_from_an_evaluation(run_folder: Path) -> None:
    assert module.main([str(run_folder)]) == 0
    assert not (run_folder / "report.html").exists()


def test_a_report_that_cannot_be_written_takes_nothing_from_an_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unwritable(*arguments: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(module, "evaluate_model", fake_target)
    monkeypatch.setattr(module, "write_report", unwritable)
    run = reported_run(tmp_path / "run")
    assert module.main([str(run)]) == 0
    output = capsys.readouterr()
    entry = json.loads((run / "eval.jsonl").read_text().splitlines()[-1])
    assert json.loads(output.out.splitlines()[-1]) == entry and entry["eval/flexible_accuracy"] == 1.0
    assert "report.html" in output.err and "no space left" in output.err and output.err.count("\n") == 1
