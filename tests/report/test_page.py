"""The report's content without a browser: what is drawn, how much of it, and the command that writes it.

How it looks and behaves is tested in a real browser by `test_page_in_browser.py`.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.report.__main__ import main
from grpo.report.charts import POINTS, curve, reward_charts, sections, smoothed, time_shares
from grpo.report.data import CHARACTERS, RunData, cut, improvements, read_run, sampled_groups, spread_evenly
from grpo.run.records import json_line
from tests.helpers.paths import ROOT
from tests.helpers.report_page import Page, copied, page_of
from tests.helpers.report_run import groups, held_out, metrics, run_config, write_episodes, write_run

# What is in it


def test_a_run_leaves_its_report_behind(run: Path, page: Page) -> None:
    assert "finished, 40 steps" in page.text and "some/model" in page.text
    assert page.data["end"] is None


def test_every_figure_that_the_report_promises_has_a_chart(page: Page) -> None:
    charts = page.charts()
    assert charts.keys() >= {
        "Reward", "numeric_answer", "brevity", "Completion length", "Cut at the length limit", "Clipped tokens",
        "KL from the base model", "Mismatch KL", "Entropy", "Learning rate", "Gradient norm", "Loss", "Time of a step",
        "Peak memory", "Sampling speed", "Accuracy", "Groups without spread",
    }  # fmt: skip
    for title, chart in charts.items():
        assert chart["series"] and all(len(one["x"]) == len(one["y"]) for one in chart["series"]), title
        assert chart["unit"] or title == "epoch", f"{title} has no unit"


def test_reward_curves_have_their_spread_and_weight(page: Page) -> None:
    (reward,) = page.charts()["Reward"]["series"]
    first = metrics(1, 40)
    assert reward["y"][0] == pytest.approx(first["reward"], rel=1e-4)
    assert reward["low"][0] == pytest.approx(first["reward"] - first["reward_std"], rel=1e-3)
    assert reward["high"][-1] == pytest.approx(metrics(40, 40)["reward"] + 0.2, rel=1e-3)
    assert "Weight 0.5" in page.charts()["brevity"]["about"]


@given(st.lists(st.lists(st.floats(-2, 2), min_size=4, max_size=6), min_size=2, max_size=700), st.booleans())
def test_a_band_stays_within_the_rewards_that_there_were(steps: list[list[float]], logged: bool) -> None:
    """Also over many steps to a point, and for runs that did not log the ends but kept completions with them."""
    series: dict[str, list[float | None]] = {
        "reward": [statistics.fmean(values) for values in steps],
        "reward_std": [statistics.stdev(values) for values in steps],
    }
    run = RunData("r", list(range(1, len(steps) + 1)), series)
    if logged:
        series |= {"reward_min": [min(values) for values in steps], "reward_max": [max(values) for values in steps]}
    else:
        samples = [{"reward": value, "rewards": {}} for values in steps for value in values]
        run.groups = [{"kind": "training", "samples": samples}]
    (band,) = reward_charts([run])[0]["series"]
    least, largest = min(map(min, steps)), max(map(max, steps))
    assert all(
        least - 1e-3 <= low <= high <= largest + 1e-3 for low, high in zip(band["low"], band["high"], strict=True)
    )


def test_completions_that_are_kept_in_part_do_not_cut_a_band() -> None:
    run = RunData("r", [1, 2], {"reward": [0.5, 0.5], "reward_std": [0.4, 0.4]})
    run.groups = [{"kind": "training", "samples": [{"reward": 0.5, "rewards": {}}]}]
    (band,) = reward_charts([run])[0]["series"]
    assert (band["low"], band["high"]) == ([0.1, 0.1], [0.9, 0.9])


def test_the_time_of_a_step_adds_up_to_the_whole(run: Path, page: Page) -> None:
    layers = page.charts()["Time of a step"]["series"]
    assert sum(layer["y"][3] for layer in layers) == pytest.approx(10.0)
    assert {layer["label"] for layer in layers} >= {"sampling", "training", "waiting for rewards", "other"}
    shares = {part["label"]: part for part in time_shares(read_run(run))}
    assert sum(part["share"] for part in shares.values()) == pytest.approx(1)
    assert shares["evaluation"]["seconds"] == 15 and shares["sampling"]["seconds"] == pytest.approx(240)


def test_evaluations_have_intervals_and_pass_at_1_is_not_said_twice(page: Page) -> None:
    strict, flexible = page.charts()["Accuracy"]["series"]
    assert (strict["x"], strict["label"], flexible["label"]) == ([0, 20, 40], "strict", "flexible")
    assert strict["low"] == pytest.approx([0.22, 0.42, 0.62]) and strict["high"][0] == pytest.approx(0.38)
    assert "70.0 %" in page.text and "[62.0, 78.0]" in page.text
    assert "pass@1" not in page.text


def test_an_evaluation_on_the_command_line_is_a_row_and_no_point(run: Path, tmp_path: Path) -> None:
    copy = copied(run, tmp_path / "copy")
    checks = [
        {"step": 40, "model": "m", "adapter": adapter, "tasks": ["gsm8k"], **held_out(0.55)} for adapter in ("a", None)
    ]
    with (copy / "eval.jsonl").open("a") as file:
        file.write("".join(map(json_line, checks)))
    page = page_of(copy, out=tmp_path / "out.html")
    assert page.charts()["Accuracy"]["series"][0]["x"] == [0, 20, 40]
    assert "afterwards: gsm8k with adapter" in page.text and "afterwards: gsm8k model alone" in page.text


def test_completions_of_a_prompt_asked_again_are_ranked_by_improvement(page: Page) -> None:
    groups = page.data["groups"]
    assert {group["step"] for group in groups if group["kind"] == "training"} == {1, 10, 20, 30, 40}
    assert {group["step"] for group in groups if group["kind"] == "held out"} == {0, 20, 40}
    pairs = [(groups[one["first"]], groups[one["last"]], one["change"]) for one in page.data["improved"]]
    assert [(a["step"], b["step"]) for a, b, _ in pairs] == [(1, 40), (0, 40)]
    assert {b["prompt"][-1]["text"] for _, b, _ in pairs} == {"What is 20 + 22?", "What is 5 + 6?"}
    assert [change for _, _, change in pairs] == pytest.approx([1.5 - 1.5 / 40, 1.0])
    first = groups[0]["samples"]
    assert [sample["reward"] for sample in first] == sorted((sample["reward"] for sample in first), reverse=True)
    assert first[-1]["rewards"] == {"numeric_answer": 0.0, "brevity": None} and first[-1]["truncated"]


def test_metrics_that_a_user_logs_have_a_chart_too(tmp_path: Path) -> None:
    charts = Page(write_run(tmp_path / "own", 3, my_metric=0.5) / "report.html").charts()
    assert charts["my_metric"]["series"][0]["y"] == [0.5] * 3


def test_missing_figures_are_gaps_and_absent_ones_have_no_chart() -> None:
    run = RunData("r", [1, 2, 3], {"reward": [1.0, None, 3.0], "kl": [None] * 3})
    charts = {chart["title"]: chart for section in sections([run]) for chart in section["charts"]}
    assert charts["Reward"]["series"][0]["y"] == [1.0, None, 3.0]
    assert "KL from the base model" not in charts and "Time of a step" not in charts


# Size


def test_a_long_run_is_thinned_to_means_with_their_extremes() -> None:
    steps = list(range(1, 10_001))
    run = RunData("r", steps, {"loss": [float(step % 10) for step in steps]})
    (series,) = [curve(run, "loss", "loss", 0)]
    assert len(series["x"]) <= POINTS and series["x"][-1] == 10_000
    size = series["span"]
    assert series["y"][0] == pytest.approx(sum(step % 10 for step in range(1, size + 1)) / size, rel=1e-4)
    assert (series["low"][0], series["high"][0]) == (0, 9)


def test_the_report_of_a_long_run_with_long_completions_stays_small(tmp_path: Path) -> None:
    folder = tmp_path / "long"
    (folder / "completions").mkdir(parents=True)
    lines = (json_line(metrics(step, 900, **{f"own/{n}": step for n in range(60)})) for step in range(1, 901))
    (folder / "metrics.jsonl").write_text("".join(lines))
    for step in range(10, 901, 10):
        made = (
            {"step": step, **json.loads(json.dumps(group, default=vars))} for group in groups(step, 5000, "é" * 9000)
        )
        (folder / "completions" / f"step-{step}.jsonl").write_text("".join(map(json_line, made)))
    page = page_of(folder, out=tmp_path / "long.html")
    assert (tmp_path / "long.html").stat().st_size < 3_000_000
    kept = {group["step"] for group in page.data["groups"]}
    assert {10, 900} <= kept and len(kept) <= 60
    assert sum(len(json.dumps(group, ensure_ascii=False)) for group in page.data["groups"]) < 1.2 * CHARACTERS


def test_evenly_spread_items_include_both_ends() -> None:
    assert spread_evenly(range(5), 9) == [0, 1, 2, 3, 4]
    assert spread_evenly(range(101), 5) == [0, 25, 50, 75, 100]


def test_a_long_text_keeps_its_beginning_and_its_end() -> None:
    assert cut("short") == {"text": "short"}
    found = cut("a" * 5000 + "b" * 5000)
    assert found["text"] == "a" * 2000 and found["tail"] == "b" * 1000 and found["omitted"] == 7000


def test_a_large_group_keeps_its_best_and_its_worst(tmp_path: Path) -> None:
    samples = [{"text": str(n), "reward": n % 64, "rewards": {}} for n in range(64)]
    (tmp_path / "step-1.jsonl").write_text(json_line({"step": 1, "prompt": "?", "samples": samples}))
    (group,) = sampled_groups({1: tmp_path / "step-1.jsonl"}, "training", 5)
    rewards = [sample["reward"] for sample in group["samples"]]
    assert len(rewards) == 8 and (rewards[0], rewards[-1]) == (63, 0) and group["count"] == 64
    assert group["mean"] == pytest.approx(31.5), "of all completions, not of those kept"


def test_a_trend_is_a_mean_over_neighbours_and_skips_gaps() -> None:
    assert smoothed([1.0, 2.0, None, 6.0, 5.0], 3) == [1.5, 1.5, 4.0, 5.5, 5.5]


def test_prompts_that_got_worse_are_listed_last() -> None:
    def group(step: int, prompt: str, mean: float) -> dict[str, Any]:
        return {"kind": "training", "task": None, "step": step, "prompt": prompt, "mean": mean}

    found = improvements(
        [group(1, "a", 1.0), group(1, "b", 0.0), group(5, "a", 0.5), group(5, "b", 1.0), group(5, "c", 1)]
    )
    assert [(one["first"], one["last"], one["change"]) for one in found] == [(1, 3, 1.0), (0, 2, -0.5)]


# The command line, and several runs


def test_runs_are_compared_by_curves_settings_and_final_figures(run: Path, tmp_path: Path) -> None:
    config = run_config(tmp_path / "faster", train={"learning_rate": 3e-4, "max_steps": 40})
    other = write_run(tmp_path / "faster", 20, config=config)
    page = page_of(run, other, out=tmp_path / "both.html")
    reward = page.charts()["Reward"]["series"]
    assert [(one["label"], len(one["x"]), "low" in one) for one in reward] == [
        ("mine", 40, False),
        ("faster", 20, False),
    ]
    assert [one["label"] for one in page.charts()["Accuracy"]["series"]] == ["mine", "faster"]
    differing = set(re.findall(r"[a-z_]+\.[a-z_]+", page.text.split("Settings that differ")[-1].split("Held-out")[0]))
    assert differing == {"train.learning_rate"}
    assert "2 runs compared" in page.text and "+1.3" in page.text
    assert {group["run"] for group in page.data["groups"]} == {"mine", "faster"}


def test_runs_of_one_name_are_told_apart(run: Path, tmp_path: Path) -> None:
    twin = copied(run, tmp_path / "elsewhere" / "mine")
    page = page_of(run, twin, run, out=tmp_path / "out.html")
    names = [one["label"] for one in page.charts()["Reward"]["series"]]
    assert len(set(names)) == 3 and names[1] == "elsewhere/mine"


def test_the_command_writes_where_it_is_told(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    copy = copied(run, tmp_path / "copy")
    (copy / "report.html").unlink()
    assert main([str(copy)]) == 0 and (copy / "report.html").is_file()
    assert main([str(copy), str(run)]) == 0 and (tmp_path / "comparison.html").is_file()
    assert main([str(copy), "--out", "x.html"]) == 0 and (tmp_path / "x.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["nowhere"],
            "grpo.report: nowhere: neither metrics.jsonl nor config.toml in it, so it is not a run; pass a run folder",
        ),
        (["RUN", "--out", "no/such/folder.html"], "grpo.report: no/such/folder.html: cannot be written"),
    ],
)
def test_bad_input_is_one_sentence(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, arguments: list[str], sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(run) if word == "RUN" else word for word in arguments]) == 2
    found = capsys.readouterr().err
    assert found.startswith(sentence) and found.count("\n") == 1


def test_a_report_needs_neither_torch_nor_vllm(run: Path, tmp_path: Path) -> None:
    script = f"""
import sys
from grpo.report.__main__ import main
main([{str(run)!r}, "--out", {str(tmp_path / "out.html")!r}])
print([name for name in ("torch", "vllm", "transformers", "numpy") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_a_run_of_no_step_has_a_report_without_charts(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('[model]\nname = "m"\n')
    assert "step 0" in page_of(tmp_path, out=tmp_path / "out.html").text


def test_a_run_with_an_environment_has_its_own_charts(tmp_path: Path) -> None:
    made = sections([read_run(write_episodes(tmp_path / "run"))])
    drawn = {section["id"]: [chart["title"] for chart in section["charts"]] for section in made}
    assert drawn["episodes"] == [
        "Turns", "Success", "Calls of tools", "Tokens of the environment", "Episodes cut short",
        "Waiting for the environment",
    ]  # fmt: skip
    assert not any("environment" in title for title in drawn.get("more", ())), "each is drawn once"
    assert "episodes" not in {section["id"] for section in sections([read_run(write_run(tmp_path / "other"))])}
