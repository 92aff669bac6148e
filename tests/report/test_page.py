"""The report's content without a browser: what is drawn, how much of it, how often it is written, and that it is inert.

How it looks and behaves is tested in a real browser by `test_report_browser.py`.
"""

from __future__ import annotations

import html.parser
import io
import itertools
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from grpo.monitor.run_log import RunLog
from grpo.report import page as report
from grpo.report.__main__ import main
from grpo.report.charts import POINTS, curve, reward_charts, sections, smoothed, time_shares
from grpo.report.data import CHARACTERS, RunData, cut, improvements, read_run, sampled_groups, spread_evenly
from grpo.report.findings import findings
from grpo.report.page import LiveReport, write_report
from grpo.run.records import json_line
from tests.helpers.paths import ROOT
from tests.helpers.report_run import HOSTILE, groups, held_out, metrics, run_config, write_episodes, write_run


class Page(html.parser.HTMLParser):
    """Elements, scripts and text of an HTML file, as a parser finds them."""

    def __init__(self, file: Path):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self._inside = ""
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts.append(data)
        elif self._inside != "style":
            self.text += data

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.scripts[0])

    def charts(self) -> dict[str, dict[str, Any]]:
        return {chart["title"]: chart for section in self.data["sections"] for chart in section["charts"]}


def page_of(*folders: Path, out: Path) -> Page:
    write_report(folders, out)
    return Page(out)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("report") / "mine")


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return Page(run / "report.html")


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


# Untrusted text


def test_nothing_that_a_model_writes_becomes_markup(tmp_path: Path) -> None:
    clean = Page(write_run(tmp_path / "clean", 3) / "report.html")
    config = run_config(tmp_path / "hostile", task={"name": f"x.py:{HOSTILE}".replace("\ud800", "")})
    folder = write_run(tmp_path / f"hostile{'<script>'}", 3, text=HOSTILE, config=config, **{f"m{HOSTILE}": 1.0})
    page = Page(folder / "report.html")
    shape = [tag for tag, _ in clean.elements if tag not in ("tr", "th", "td", "code")]
    assert [tag for tag, _ in page.elements if tag not in ("tr", "th", "td", "code")] == shape
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    text = page.data["groups"][0]["samples"][0]["text"]
    assert text.startswith("</script><script>window.pwned=1</script>") and "\\x1b[2J" in text and "\\u202e" in text
    raw = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", raw)
    assert "&lt;script&gt;window.pwned" in raw, "the task's name is shown, escaped"


def test_the_policy_allows_this_files_own_style_and_scripts_and_nothing_else(page: Page) -> None:
    (policy,) = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None and policy.startswith("default-src 'none';") and "unsafe" not in policy
    allowed = re.findall(r"script-src ([^;]*);", policy)[0].split()
    executed = page.scripts[1:]
    assert allowed == re.findall(r"script-src ([^;]*);", report.policy("", executed))[0].split() and len(executed) == 3


def test_the_file_names_no_address_and_loads_nothing(page: Page, run: Path) -> None:
    loading = {"src", "srcset", "data", "action", "poster", "style"}
    assert not [(tag, name) for tag, attributes in page.elements for name in attributes if name in loading]
    assert not [tag for tag, _ in page.elements if tag in ("link", "iframe", "object", "img", "base")]
    links = {a["href"] for tag, a in page.elements if tag == "a"}
    assert links and all(link and link.startswith("#") for link in links)
    addresses = set(re.findall(r"https?://[\w./]+", (run / "report.html").read_text()))
    assert addresses <= {"http://www.w3.org/2000/svg"}, "the name of SVG's elements, which is never fetched"


def test_secrets_among_the_options_are_hidden(run: Path) -> None:
    assert "hunter2" in (run / "config.toml").read_text()
    raw = (run / "report.html").read_text()
    assert "hunter2" not in raw and "(not shown)" in raw


# While a run goes on


class Clock:
    """Seconds that pass only when a report is written or a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cost: float):
        self.now, self.written = 0.0, list[float]()
        monkeypatch.setattr(report, "write_report", self.write)
        self._cost = cost

    def __call__(self) -> float:
        return self.now

    def write(self, *arguments: Any, **options: Any) -> None:
        self.now += self._cost
        self.written.append(self.now)


@pytest.mark.parametrize("step_seconds", [0.05, 2.0, 300.0])
def test_reports_take_at_most_a_hundredth_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step_seconds: float
) -> None:
    clock = Clock(monkeypatch, cost=0.25)
    live = LiveReport(tmp_path, pytest.fail, clock)
    live.update(500)
    assert len(clock.written) == 1, "the first step is reported at once"
    for _ in range(499):
        clock.now += step_seconds
        live.update(500)
    spent = 0.25 * len(clock.written)
    assert spent <= 0.01 * clock.now + 0.25
    assert len(clock.written) >= min(500, int(0.009 * clock.now / 0.25)), "and no more seldom than that"


def test_the_last_step_is_always_in_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Each look at the clock is an hour after the one before, so a report seems to take an hour.
    clock = itertools.count(0, 3600)
    monkeypatch.setattr(report.LiveReport.__init__, "__defaults__", (lambda: next(clock),))
    folder = write_run(tmp_path / "stopped", 7, finished=False)
    page = Page(folder / "report.html")
    assert "step 7 of 7" in page.text and page.charts()["Reward"]["series"][0]["x"][-1] == 7
    assert page.data["end"] == 7


def test_a_reader_never_finds_half_a_report(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = copied(run, tmp_path / "copy")
    before = (copy / "report.html").read_bytes()
    monkeypatch.setattr(Path, "replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    said: list[str] = []
    live = LiveReport(copy, said.append)
    for _ in range(3):
        live.update(40)
        live.flush()
    assert (copy / "report.html").read_bytes() == before
    assert said == [
        "report.html cannot be written (OSError: [Errno 28] No space left on device); the run goes on without it"
    ]
    assert not [path for path in copy.iterdir() if path.name.startswith(".report")]


def test_no_report_is_written_where_the_configuration_says_so(tmp_path: Path) -> None:
    config = run_config(tmp_path / "quiet", log={"report": False})
    assert not (write_run(tmp_path / "quiet", 2, config=config) / "report.html").exists()


def test_a_report_is_read_while_lines_are_being_written(run: Path, tmp_path: Path) -> None:
    copy = copied(run, tmp_path / "copy")
    for name in ("metrics.jsonl", "eval.jsonl", "completions/step-1.jsonl"):
        with (copy / name).open("a") as file:
            file.write('{"step": 41, "rew')
    (copy / "summary.json").write_text('{"steps"')
    page = page_of(copy, out=tmp_path / "out.html")
    assert "step 40 of 40" in page.text


def test_a_write_is_cheap_beside_a_step(run: Path, tmp_path: Path) -> None:
    write_report([run], tmp_path / "out.html")
    started = time.process_time()
    write_report([run], tmp_path / "out.html")
    assert time.process_time() - started < 0.5


# Findings


def run_of(steps: int = 40, **changes: Any) -> RunData:
    """The simulated run with some metrics replaced by functions of the share of the run that is done."""
    made = [metrics(step, steps) for step in range(1, steps + 1)]
    series = {key: [entry[key] for entry in made] for key in made[0] if key != "step"}
    for key, function in changes.items():
        series[key] = [function(step / steps) for step in range(1, steps + 1)]
    return RunData("r", list(range(1, steps + 1)), series, config={"train": {"max_grad_norm": 1.0}})


def said(run: RunData) -> list[str]:
    return [finding.text for finding in findings(run)]


def test_a_healthy_run_gets_one_good_finding() -> None:
    (finding,) = findings(run_of())
    assert finding.good and finding.text.startswith("The reward rose from 0.678")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"reward": lambda done: 0.5 + 0.1 * (int(done * 40) % 3)}, "The reward is flat"),
        ({"reward": lambda done: 2 - done}, "The reward fell"),
        ({"frac_reward_zero_std": lambda done: done}, "of the last groups have equal rewards"),
        ({"clipped_ratio": lambda done: 0.5 * done}, "were cut at rollout.max_completion_length"),
        ({"grad_norm": lambda done: 50.0}, "The gradient's norm is 50"),
        ({"reward_seconds": lambda done: 4.0}, "40 % of a step is waiting for rewards"),
        ({"environment/calls": lambda done: 0.0}, "The tool is as good as never called"),
        (
            {"environment/calls": lambda done: 2.0, "environment/call_errors": lambda done: 1.0},
            "50 % of the calls fail",
        ),
        ({"environment/lost": lambda done: 0.1}, "10 % of the episodes are lost"),
        ({"environment/out_of_room": lambda done: 0.5}, "50 % of the episodes end because nothing fits"),
        (
            {"environment_wait_seconds": lambda done: 2.0, "rollout_seconds": lambda done: 5.0},
            "is too small: the engine waits for the environment in 40 % of a rollout",
        ),
    ],
)
def test_each_trouble_is_named(changes: dict[str, Any], sentence: str) -> None:
    assert [text for text in said(run_of(**changes)) if sentence in text]


def test_format_and_skill_are_told_apart() -> None:
    run = run_of()
    run.evaluations = [{"step": 0, **held_out(0.2)}, {"step": 40, **held_out(0.6)}]
    assert not [text for text in said(run) if "learned the format" in text]
    flexible = {key: value for key, value in held_out(0.2).items() if "flexible" in key}
    run.evaluations[1] |= flexible
    assert [text for text in said(run) if "learned the format" in text]
    run.evaluations = run.evaluations[::-1]
    assert [text for text in said(run) if "keep_best kept the best adapter" in text]


def test_a_few_steps_prove_nothing() -> None:
    assert findings(run_of(steps=10)) == []


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


def copied(run: Path, folder: Path) -> Path:
    folder.mkdir(parents=True)
    for path in run.rglob("*"):
        if path.is_file():
            (folder / path.relative_to(run)).parent.mkdir(parents=True, exist_ok=True)
            (folder / path.relative_to(run)).write_bytes(path.read_bytes())
    return folder


def test_a_resumed_run_reports_no_step_twice(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 6, finished=False)
    with RunLog(folder, run_config(folder), max_steps=6, console=Console(file=io.StringIO())) as log:
        log.resume(3)
        for step in range(4, 7):
            log.step(metrics(step, 6, reward=9.0))
    (reward,) = Page(folder / "report.html").charts()["Reward"]["series"]
    assert reward["x"] == [1, 2, 3, 4, 5, 6] and reward["y"][3:] == [9, 9, 9]


def test_a_run_with_an_environment_has_its_own_charts(tmp_path: Path) -> None:
    made = sections([read_run(write_episodes(tmp_path / "run"))])
    drawn = {section["id"]: [chart["title"] for chart in section["charts"]] for section in made}
    assert drawn["episodes"] == [
        "Turns", "Success", "Calls of tools", "Tokens of the environment", "Episodes cut short",
        "Waiting for the environment",
    ]  # fmt: skip
    assert not any("environment" in title for title in drawn.get("more", ())), "each is drawn once"
    assert "episodes" not in {section["id"] for section in sections([read_run(write_run(tmp_path / "other"))])}
