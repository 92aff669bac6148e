"""What a person sees while a run goes on, and what is kept of it: metrics, sample completions, the summary.

On a terminal a table of the figures stays below the notices and samples, in a notebook a line and a plot above them;
elsewhere (a pipe, a file, `--verbose`) each step is one line. Completions are text by an untrusted model: markup in
them is not interpreted, and control characters are shown as escapes, never sent to the terminal. Curves and HTML are
made by `grpo.report`, which is updated at each step.
"""

from __future__ import annotations

import base64
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from grpo.config.schema import Config, config_toml
from grpo.images import preview_name
from grpo.monitor.log import is_sampled
from grpo.monitor.notebook import NotebookDisplay, Progress
from grpo.monitor.trackers import Trackers
from grpo.printable import printable
from grpo.report.alarms import Alarm, AlarmWatch, replayed
from grpo.report.page import LiveReport
from grpo.run.checkpoint import CONFIG, write_atomically
from grpo.run.records import (
    ALARMS,
    EVALUATIONS,
    HELD_OUT,
    IMAGES,
    METRICS,
    REPORT,
    SUMMARY,
    TRAINING,
    completions_file,
    completions_files,
    json_line,
    plain,
    read_entries,
)
from grpo.run.samples import Sample, SampleGroup
from grpo.run.versions import hardware, versions

ENDS = 5  # steps that "first" and "last" are means over
SHOWN_CHARACTERS = 700

# Rows of the live table after rewards and evaluation: key in the metrics, label, format.
ROWS = (
    ("completion_length", "completion length", "{:.0f} tokens"),
    ("clipped_ratio", "cut at the limit", "{:.0%}"),
    ("frac_reward_zero_std", "groups without spread", "{:.0%}"),
    ("entropy", "entropy", "{:.3f}"),
    ("kl", "kl", "{:.5f}"),
    ("mismatch_kl", "mismatch kl", "{:.5f}"),
    ("grad_norm", "gradient norm", "{:.3g}"),
    ("tokens_per_second", "rollout", "{:,.0f} tokens/s"),
    ("rollout_seconds", "sampling", "{:.1f} s"),
    ("idle_seconds", "waiting for ranks", "{:.1f} s"),
    ("train_seconds", "training", "{:.1f} s"),
    ("peak_memory_gib", "peak memory", "{:.1f} GiB"),
)


class RunLog:
    """The record of one run in `run_folder`, and its display on `console` (standard output by default).

    Nothing is written before the first step or evaluation. `max_steps` may be set later, when the data are known.
    A context manager: leaving it ends the live display.
    """

    def __init__(
        self,
        run_folder: Path,
        config: Config,
        *,
        max_steps: int,
        verbose: bool = False,
        console: Console | None = None,
        configuration: str | None = None,
    ):
        """`configuration`: what the run's file says once a resumed run goes on; None: `config`."""
        self.run_folder = run_folder
        self.max_steps = max_steps
        self._configuration = config_toml(config) if configuration is None else configuration
        self._config = config
        self._trackers = Trackers(config, run_folder)
        self._report = LiveReport(run_folder, self.notice) if config.log.report else None
        self._alarms = AlarmWatch(config.alarms)
        self._last: dict[str, Any] = {"step": 0}
        self._series: dict[str, list[float]] = {}
        self._console = console or Console(highlight=False)
        self._started = time.perf_counter()
        self._stepped = False
        self._status = ""
        self._live: Live | NotebookDisplay | None = None
        # With --verbose other libraries write too, and would tear a display that redraws itself.
        if not verbose and self._console.is_jupyter:
            self._live = NotebookDisplay(self._progress)
        elif not verbose and self._console.is_interactive:
            self._live = Live(console=self._console, get_renderable=self._display, refresh_per_second=4)
        if self._live is not None:
            self._live.start()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the live display, leaving its last state on the screen, and the trackers; the report is made current."""
        self._status = ""
        if self._report is not None:
            self._report.flush()
        self._trackers.close()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def resume(self, step: int) -> None:
        """Go on after `step`, as the configuration now says: what was recorded of later steps, or only in part, is
        dropped."""
        write_atomically(self.run_folder / CONFIG, self._configuration.encode())
        self._last, self._series = {"step": step}, {}
        before = {name: self._cut(name, step) for name in (METRICS, EVALUATIONS, ALARMS)}
        for entry in (*before[METRICS], *before[EVALUATIONS]):
            self._remember(entry)
        self._alarms = replayed(self._config.alarms, before[METRICS], before[EVALUATIONS])
        for kind in (TRAINING, HELD_OUT):
            for sampled, path in completions_files(self.run_folder, kind).items():
                if sampled > step:
                    path.unlink()

    def _cut(self, name: str, step: int) -> list[dict[str, Any]]:
        """The lines of a file of the run up to `step`; what it has of later ones is taken out of it."""
        path = self.run_folder / name
        if not path.exists():
            return []
        selected = [entry for entry in read_entries(path) if entry["step"] <= step]
        write_atomically(path, "".join(map(json_line, selected)).encode())
        return selected

    def status(self, text: str) -> None:
        """Say what is being done now, such as "starting vLLM"; replaced by the next status or step.

        Without a live display only what comes before the first step is shown.
        """
        self._status = printable(text)
        if self._live is not None:
            self._live.refresh()
        elif text and not self._stepped:
            self._print(Text(self._status))

    def notice(self, text: str) -> None:
        """One sentence that stays on the screen."""
        self._print(Text(printable(text), style="yellow"))

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Record the metrics of one step, of which "step" (from 1) is required, and show them."""
        self._last = self._record(METRICS, metrics)
        self._stepped = True
        self._status = ""
        if self._live is None:
            self._print(Text(self._line()))
        else:
            self._live.refresh()
        self._raise(self._alarms.step(self._last))
        self._reported()

    def evaluation(self, step: int, result: Mapping[str, Any], groups: Sequence[SampleGroup] = ()) -> None:
        """Record held-out figures after `step` (0: before the first) in `eval.jsonl`, and show "eval/NAME" ones.

        `groups`, the answers to some of the questions, are kept in `completions/eval-N.jsonl`.
        """
        if groups:
            self._keep(HELD_OUT, step, groups)
        entry = self._record(EVALUATIONS, {"step": step, **result})  # last: what is recorded is not evaluated again
        figures = [_held_out(key, entry) for key in self._scores("eval") if key in entry and _is_news(key)]
        self._print(Text(f"held out after step {step}: {', '.join(figures)}"))
        self._raise(self._alarms.evaluation(entry))
        self._reported()

    def _raise(self, alarms: Sequence[Alarm]) -> None:
        """Show alarms that begin, and keep them in `alarms.jsonl`."""
        for alarm in alarms:
            with (self.run_folder / ALARMS).open("a", encoding="utf-8") as file:
                file.write(json_line(alarm.entry()))
            self._print(Text(f"alarm, step {alarm.step}: {printable(alarm.said)}", style="bold red"))

    def _reported(self) -> None:
        """Tell the report that there is something new; it begins with the first step."""
        if self._report is not None and self._last["step"]:
            self._report.update(self.max_steps)

    def _record(self, name: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
        entry = plain(metrics)
        with (self.run_folder / name).open("a", encoding="utf-8") as file:
            file.write(json_line(entry))
        self._remember(entry)
        self._trackers.step(entry)
        return entry

    def _remember(self, entry: Mapping[str, Any]) -> None:
        for key, value in entry.items():
            if isinstance(value, int | float):
                self._series.setdefault(key, []).append(value)

    def wants_samples(self, step: int) -> bool:
        """Whether completions of this step are to be kept: the first, the last, and every `samples_every`."""
        return is_sampled(step, self._config, self.max_steps)

    def samples(self, step: int, groups: Sequence[SampleGroup]) -> None:
        """Keep the completions of `groups` in `completions/step-N.jsonl`, one group a line, and show the first."""
        self._keep(TRAINING, step, groups)
        if groups and groups[0].samples:
            self._print(self._sample(step, groups[0]))

    def _keep(self, kind: str, step: int, groups: Sequence[SampleGroup]) -> None:
        path = completions_file(self.run_folder, kind, step)
        path.parent.mkdir(exist_ok=True)
        keep_previews(path.parent / IMAGES, groups)
        lines = (json_line({"step": step, **group.entry()}) for group in groups)
        write_atomically(path, "".join(lines).encode())

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write `summary.json` (`summary`, first and last rewards, versions, hardware, seconds) and show the result.

        `summary["adapter"]`, or "trained_model" of one trained whole, is a path, and the screen says where that is.
        """
        first, last = self._ends()
        record = {
            "steps": self._last["step"],
            "seconds": math.fsum(self._series.get("step_seconds", ())),
            "first": first,
            "last": last,
            **summary,
            "alarms": [alarm.entry() for alarm in self._alarms.raised],
            "versions": versions(),
            "hardware": hardware(),
        }
        text = json.dumps(plain(record), indent=2, allow_nan=False)
        write_atomically(self.run_folder / SUMMARY, text.encode())
        self._reported()
        self.close()
        self._print(self._result(record))

    def _scores(self, prefix: str) -> list[str]:
        """Keys of the form PREFIX/NAME, in the order in which they came; PREFIX/NAME/std and such are left out."""
        return [key for key in self._series if key.startswith(f"{prefix}/") and key.count("/") == 1]

    @property
    def _main(self) -> str:
        """The figure that a run is about."""
        return "reward" if "reward" in self._series else "loss"

    @property
    def _span(self) -> int:
        """Steps that are the first and steps that are the last: ENDS, or of a shorter run each half, so that no step is
        both."""
        return min(ENDS, max(1, len(self._series.get(self._main, ())) // 2))

    def _ends(self) -> tuple[dict[str, float], dict[str, float]]:
        """Rewards (without any, the loss), as means over the first and over the last steps; evaluations, the first and
        the last."""
        spans = {key: self._span for key in (self._main, *self._scores("rewards"))}
        spans |= dict.fromkeys(self._scores("eval"), 1)
        series = {key: (self._series[key], span) for key, span in spans.items() if key in self._series}
        first = {key: _mean(values[:span]) for key, (values, span) in series.items()}
        return first, {key: _mean(values[-span:]) for key, (values, span) in series.items()}

    def _seconds_left(self) -> float | None:
        recent = self._series.get("step_seconds", [])[-20:]
        return _mean(recent) * (self.max_steps - self._last["step"]) if recent else None

    def _print(self, shown: RenderableType) -> None:
        self._console.print(shown, highlight=False, soft_wrap=isinstance(shown, Text))

    def _line(self) -> str:
        """The last step as one line, for a log file."""
        entry = self._last
        figure = self._main
        parts = [f"step {entry['step']}/{self.max_steps}", f"{figure} {_shown(entry.get(figure), '{:.3f}')}"]
        functions = [f"{_label(key)} {_shown(entry.get(key), '{:.3f}')}" for key in self._scores("rewards")]
        if functions:
            parts[-1] += f" ({', '.join(functions)})"
        forms = {
            "completion_length": "length {:.0f}",
            "tokens_per_second": "{:,.0f} tokens/s",
            "kl": "kl {:.5f}",
            "mismatch_kl": "mismatch {:.5f}",
            "step_seconds": "{:.1f} s",
        }
        parts += [form.format(entry[key]) for key, form in forms.items() if entry.get(key) is not None]
        left = self._seconds_left()
        return "  ".join(parts if left is None else [*parts, f"left {_duration(left)}"])

    def _progress(self) -> Progress:
        """The same, for a notebook."""
        parts = [self._line() if self._stepped else "", self._status]
        return Progress("   ".join(part for part in parts if part) or "starting", self._series)

    def _display(self) -> RenderableType:
        """What is live: a bar, then every figure of the last step, of the last few and of the first few."""
        done, left = self._last["step"], self._seconds_left()
        if not self._stepped:
            return Text(self._status or "starting", style="dim")
        head = Table.grid(padding=(0, 2))
        head.add_row(
            Text(f"step {done}/{self.max_steps}", style="bold"),
            ProgressBar(total=self.max_steps, completed=done, width=32),
            Text(f"{_duration(time.perf_counter() - self._started)} gone"),
            Text("" if left is None else f"{_duration(left)} left"),
            Text(self._status, style="dim"),
        )
        if names := [on.alarm.title.lower() for on in self._alarms.standing.values()]:
            return Group(head, Text(f"alarm: {', '.join(names)}", style="bold red"), self._table())
        return Group(head, self._table())

    def _table(self) -> Table:
        (first, recent), span = self._ends(), self._span
        table = Table(box=None, padding=(0, 2), header_style="dim")
        table.add_column("")
        for title in ("now", f"last {span}", f"first {span}"):
            table.add_column(title, justify="right")
        for key in filter(_is_news, first):
            figures = (self._series[key][-1], recent[key], first[key])
            style = "bold" if key == "reward" else ""
            table.add_row(Text(_label(key)), *(f"{figure:.3f}" for figure in figures), style=style)
        for key, label, form in ROWS:
            if known := self._series.get(key):
                ends = (known[-1], _mean(known[-span:]), _mean(known[:span]))
                table.add_row(label, *(form.format(figure) for figure in ends))
        return table

    def _sample(self, step: int, group: SampleGroup) -> RenderableType:
        """A question with the best and the worst of its completions."""
        ranked = sorted(group.samples, key=lambda sample: -math.inf if sample.reward is None else sample.reward)
        chosen = {"best": ranked[-1], "worst": ranked[0]} if len(ranked) > 1 else {"only": ranked[0]}
        parts: list[RenderableType] = [Text(f"Sample of step {step}", style="bold")]
        parts.append(_entry("question", group.question))
        if group.answer is not None:
            parts.append(_entry("answer", str(group.answer)))
        for which, sample in chosen.items():
            parts.append(_entry(f"{which} of {len(ranked)}", *_said(sample)))
            if sample.extracted is not None:
                parts.append(_entry("extracted", sample.extracted))
            scores = [f"{_label(name)} {_shown(score, '{:g}')}" for name, score in sample.rewards.items()]
            parts.append(_entry("reward", f"{_shown(sample.reward, '{:g}')}  ({', '.join(scores)})"))
        return Padding(Group(*parts), (1, 0))

    def _result(self, record: Mapping[str, Any]) -> RenderableType:
        table = Table(box=None, padding=(0, 2), header_style="dim")
        table.add_column("")
        steps = f"{self._span} steps" if self._span > 1 else "step"
        for title in (f"first {steps}", f"last {steps}", "change"):
            table.add_column(title, justify="right")
        for key, before in record["first"].items():
            after = record["last"][key]
            if not _is_news(key):
                continue
            table.add_row(Text(_label(key)), f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}")
        parts: list[RenderableType] = [
            Text(f"Done: {record['steps']} steps in {_duration(record['seconds'])}.", style="bold")
        ]
        if record["first"]:
            parts.append(table)
        if names := dict.fromkeys(alarm.title.lower() for alarm in self._alarms.raised):
            parts.append(Text(f"Alarms: {', '.join(names)}; docs/alarms.md says what to look at", style="bold red"))
        if record.get("adapter") is not None:
            parts.append(Text(f"The adapter is in {printable(str(record['adapter']))}"))
        if record.get("trained_model") is not None:
            parts.append(Text(f"The trained model is in {printable(str(record['trained_model']))}"))
        parts.append(Text(f"Metrics, samples and summary.json are in {printable(str(self.run_folder))}"))
        if self._report is not None:
            parts.append(Text(f"Curves and samples to look at: {printable(str(self.run_folder / REPORT))}"))
        return Padding(Group(*parts), (1, 0, 0, 0))


def keep_previews(folder: Path, groups: Sequence[SampleGroup]) -> None:
    """Write what shows the images of `groups` into `folder`, where it is not there yet."""
    making = {preview_name(image.digest): image.preview for group in groups for image in group.images}
    made = {name: data for group in groups for sample in group.samples for name, data in sample.previews.items()}
    for name in [*making, *(name for name in made if name not in making)]:
        if not (folder / name).exists():
            folder.mkdir(exist_ok=True)
            write_atomically(folder / name, making[name]() if name in making else base64.b64decode(made[name]))


def _label(key: str) -> str:
    return printable(key.removeprefix("rewards/").replace("eval/", "held-out ", 1))


def _is_news(key: str) -> bool:
    """pass@1 is the accuracy under another name, kept in the files alone."""
    return not key.endswith("pass@1")


def _held_out(key: str, entry: Mapping[str, Any]) -> str:
    """One held-out figure with its interval, for a line that says that it is one."""
    text = f"{printable(key.removeprefix('eval/')).replace('_', ' ')} {_shown(entry[key], '{:.3f}')}"
    low, high = entry.get(f"{key}/low"), entry.get(f"{key}/high")
    return text if low is None or high is None else f"{text} [{low:.3f}, {high:.3f}]"


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _entry(label: str, *texts: str) -> RenderableType:
    """`texts` below one another, each cut to its share of what is shown."""
    share = max(SHOWN_CHARACTERS // max(len(texts), 1), SHOWN_CHARACTERS // 8)
    cut = [text if len(text) <= share else f"{text[:share]} ... ({len(text)} characters)" for text in texts]
    grid = Table.grid(padding=(0, 2))
    grid.add_column(width=12, style="dim")
    grid.add_column()
    grid.add_row(Text(label), Text("\n".join(printable(text.strip("\n")) for text in cut)))
    return grid


def _said(sample: Sample) -> list[str]:
    """The completion; of an episode what each said in turn, calls included."""
    if sample.turns is None:
        return [sample.text]
    said = []
    for turn in sample.turns:
        calls = [json.dumps(call, ensure_ascii=False) for call in turn.get("calls", ())]
        said.append(f"{turn['role']}: {' '.join([turn['text'], *calls]).strip()}")
    return said


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
