"""Held-out accuracy: of an adapter during training, and on the command line of a finished run or of any model.

    python -m grpo.evaluate runs/gsm8k --base              # the trained adapter, beside the model without it
    python -m grpo.evaluate Qwen/Qwen2.5-0.5B-Instruct --task gsm8k --set eval.limit=none

Every completion is checked twice: strictly (right, in the format asked for) and flexibly (right, wherever the answer
stands), so that learning the format and learning to answer are told apart. Rewards play no part here.

Exit codes: 0, done; 2, bad input, told in one sentence.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from grpo.checkpoint import CONFIG, write_atomically
from grpo.config import Config, Eval, parse_config
from grpo.data import Prompt, load_data
from grpo.errors import UserError, fail
from grpo.log import Sample as LoggedSample
from grpo.log import SampleGroup, quiet_libraries
from grpo.records import EVALUATIONS, METRICS, REPORT, json_line
from grpo.report import write_report
from grpo.rewards.extract import extracted_answer
from grpo.rewards.resolve import described
from grpo.target import ADAPTER_CONFIG, folder_of_adapter
from grpo.tasks.common import Task, Verifier
from grpo.toml import apply_override, read_toml
from grpo.vocabulary import check_tokens

if TYPE_CHECKING:
    from grpo.ranks import Ranks
    from grpo.session import Session

Z95 = 1.959963984540054
"""97.5th percentile of the normal distribution: a 95 % interval."""

EVALUATION, DIFFICULTY = -1, -2
"""In place of the step in the seeds of samples, which training counts from 1."""


# Statistics


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Probability that at least one of `k` samples is right, estimated without bias from `samples` >= k of them.

    1 - C(n - c, k) / C(n, k): equation 1 of Chen et al. 2021, arXiv:2107.03374. Raises ValueError for k > samples.
    """
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise ValueError(f"pass@{k} of {correct} right among {samples} samples is not defined")
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def wilson_interval(mean: float, trials: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval (JASA 22, 1927) of a share `mean` over `trials`, 95 % by default.

    For values between 0 and 1, such as a question's share of right samples, it is wider than needed: no such
    variable varies more than a yes-or-no one of the same mean. Raises ValueError for no trials.
    """
    if trials < 1 or not 0 <= mean <= 1:
        raise ValueError(f"no interval for a mean of {mean} over {trials} trials")
    scale = 1 + z * z / trials
    centre = mean + z * z / (2 * trials)
    spread = z * math.sqrt(mean * (1 - mean) / trials + (z / (2 * trials)) ** 2)
    # At the ends rounding would leave 1e-17 where the interval reaches 0 or 1 exactly.
    return (centre - spread) / scale if mean > 0 else 0.0, (centre + spread) / scale if mean < 1 else 1.0


def with_interval(name: str, values: Sequence[float]) -> dict[str, float]:
    """The mean of one value per question, each from 0 to 1, as `name`, with its interval as `name`/low and /high."""
    mean = math.fsum(values) / len(values)
    low, high = wilson_interval(min(mean, 1.0), len(values))
    return {name: mean, f"{name}/low": low, f"{name}/high": high}


# Evaluating


@dataclass(frozen=True)
class Sample:
    """One checked completion."""

    prompt: Prompt
    member: int
    """Its number among the question's completions, from 0."""
    text: str
    tokens: int
    truncated: bool
    strict: bool
    flexible: bool

    def entry(self) -> dict[str, Any]:
        """The sample as a row for a JSON lines file."""
        return {
            "task": self.prompt.task,
            "index": self.prompt.index,
            "member": self.member,
            "prompt": self.prompt.prompt,
            **self.prompt.columns,
            "completion": self.text,
            "strict": self.strict,
            "flexible": self.flexible,
            "tokens": self.tokens,
            "finish_reason": "length" if self.truncated else "stop",
        }

    def logged(self) -> LoggedSample:
        """The sample as the run log keeps it."""
        verdicts = {"strict": float(self.strict), "flexible": float(self.flexible)}
        return LoggedSample(
            text=self.text,
            reward=verdicts["strict"],
            rewards=verdicts,
            extracted=extracted_answer(self.text),
            tokens=self.tokens,
            finish_reason="length" if self.truncated else "stop",
        )


@dataclass(frozen=True)
class EvalResult:
    """What an evaluation found."""

    metrics: dict[str, float]
    """For `eval.jsonl`: see `summarise`."""
    samples: list[Sample]
    """Question after question, in the order of the prompts."""

    def groups(self, limit: int) -> list[SampleGroup]:
        """The first `limit` questions with their answers, as the run log keeps them; the strict check is the reward."""
        by_question = [list(group) for _, group in itertools.groupby(self.samples, lambda sample: sample.prompt.index)]
        return [
            SampleGroup(
                own[0].prompt.prompt,
                own[0].prompt.columns.get("answer"),
                [sample.logged() for sample in own],
                own[0].prompt.task,
            )
            for own in by_question[:limit]
        ]


def evaluate(
    session: Session,
    prompts: Sequence[Prompt],
    tasks: Mapping[str, Task],
    settings: Eval,
    *,
    adapter: bool = True,
    stream: int = EVALUATION,
    ranks: Ranks | None = None,
) -> EvalResult:
    """Sample `settings.num_generations` completions of each prompt and check them.

    `adapter = False` asks the model without its adapter. Seeds are the run's seed, `stream`, the prompt and the
    sample's number: every evaluation of a run draws the same random numbers. Of several `ranks` each takes a share of
    the prompts, and all know the whole result. Raises UserError when there are no prompts, or when a task's check
    fails.
    """
    if not prompts:
        raise UserError("there are no held-out questions to evaluate on; give the task some, or unset eval.every")
    started = time.perf_counter()
    own = prompts if ranks is None else prompts[ranks.rank :: ranks.size]
    samples = sample_and_check(session, own, tasks, settings, adapter=adapter, stream=stream)
    if ranks is not None:
        samples = of_all_ranks(samples, prompts, settings.num_generations, ranks)
    seconds, tokens = time.perf_counter() - started, sum(sample.tokens for sample in samples)
    timing = {"eval_seconds": seconds, "eval_tokens_per_second": tokens / seconds}
    return EvalResult(summarise(samples, settings) | timing, samples)


def of_all_ranks(own: Sequence[Sample], prompts: Sequence[Prompt], count: int, ranks: Ranks) -> list[Sample]:
    """The samples of all `prompts`, `count` of each, of which this rank has those of every so many-th prompt."""
    checked = [[one.text, one.tokens, one.truncated, one.strict, one.flexible] for one in own]
    groups = [checked[start : start + count] for start in range(0, len(checked), count)]
    answers = ranks.merged(dict(zip(range(ranks.rank, len(prompts), ranks.size), groups, strict=True)), len(prompts))
    return [
        Sample(prompt, member, *values)
        for prompt, answered in zip(prompts, answers, strict=True)
        for member, values in enumerate(answered)
    ]


def sample_and_check(
    session: Session,
    prompts: Sequence[Prompt],
    tasks: Mapping[str, Task],
    settings: Eval,
    *,
    adapter: bool,
    stream: int,
) -> list[Sample]:
    """`settings.num_generations` checked completions of each prompt."""
    # vLLM takes seconds to import; the statistics above and --help do without.
    from grpo.engine import Request
    from grpo.sampler import sample_seed

    count = settings.num_generations
    length = settings.max_completion_length or session.config.rollout.max_completion_length
    sampling = session.sampling(settings.temperature, length, settings.top_p)
    requests = [
        Request(
            number * count + member,
            prompt.token_ids,
            sample_seed(session.config.train.seed, stream, prompt.index, member),
        )
        for number, prompt in enumerate(prompts)
        for member in range(count)
    ]
    samples: list[Sample | None] = [None] * len(requests)
    for completion in session.engine.generate(requests, sampling, adapter=adapter):
        number, member = divmod(completion.request_id, count)
        prompt, text = prompts[number], session.decode(completion.token_ids)
        task = tasks[prompt.task]
        samples[completion.request_id] = Sample(
            prompt=prompt,
            member=member,
            text=text,
            tokens=len(completion.token_ids),
            truncated=completion.finish_reason == "length",
            strict=verdict(task.strict, text, prompt),
            flexible=verdict(task.flexible, text, prompt),
        )
    done = [sample for sample in samples if sample is not None]
    if len(done) != len(requests):
        raise RuntimeError(f"the engine returned {len(done)} of {len(requests)} completions")
    return done


def verdict(check: Verifier, text: str, prompt: Prompt) -> bool:
    """What a task's check says of a completion. Raises UserError naming the row when it fails."""
    try:
        return bool(check(text, prompt.row))
    except Exception as error:
        raise UserError(
            f"task {prompt.task!r}: its check failed on row {prompt.index + 1} ({described(error)}); mend the task"
        ) from error


def summarise(samples: Sequence[Sample], settings: Eval) -> dict[str, float]:
    """Metrics of checked completions, those of a question adjacent: `settings.num_generations` each.

    `eval/strict_accuracy` and `eval/flexible_accuracy` are shares of right completions (mean@k), `eval/pass@k` and
    `eval/flexible_pass@k` unbiased estimates, each with a 95 % interval over questions as /low and /high. Several
    tasks also have their own, as `eval/TASK/strict_accuracy` and so on.
    """
    by_task: dict[str, list[Sample]] = {}
    for sample in samples:
        by_task.setdefault(sample.prompt.task, []).append(sample)
    metrics = accuracies(samples, settings, "eval/")
    if len(by_task) > 1:
        for task, own in by_task.items():
            metrics |= accuracies(own, settings, f"eval/{task}/")
    metrics["eval/completion_length"] = statistics.fmean(sample.tokens for sample in samples)
    metrics["eval/clipped_ratio"] = statistics.fmean(sample.truncated for sample in samples)
    metrics["eval_prompts"] = len(samples) // settings.num_generations
    return metrics


def accuracies(samples: Sequence[Sample], settings: Eval, prefix: str) -> dict[str, float]:
    """Accuracy and pass@k, strict and flexible, of whole groups of samples."""
    count = settings.num_generations
    metrics: dict[str, float] = {}
    for kind, right in (("strict", [s.strict for s in samples]), ("flexible", [s.flexible for s in samples])):
        correct = [sum(right[start : start + count]) for start in range(0, len(right), count)]
        metrics |= with_interval(f"{prefix}{kind}_accuracy", [each / count for each in correct])
        for k in settings.pass_at:
            name = f"pass@{k}" if kind == "strict" else f"flexible_pass@{k}"
            metrics |= with_interval(f"{prefix}{name}", [pass_at_k(count, each, k) for each in correct])
    return metrics


def measure_pass_rates(
    session: Session, prompts: Sequence[Prompt], tasks: Mapping[str, Task], samples: int, ranks: Ranks | None = None
) -> list[float]:
    """Share of right answers to each prompt among `samples` of the model without its adapter.

    Sampled as in training. Right is meant flexibly: a question is not difficult because the format is new.
    """
    settings = Eval(num_generations=samples, temperature=session.config.rollout.temperature)
    result = evaluate(session, prompts, tasks, settings, adapter=False, stream=DIFFICULTY, ranks=ranks)
    right = [sample.flexible for sample in result.samples]
    return [sum(right[start : start + samples]) / samples for start in range(0, len(right), samples)]


# The command line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (those of the process by default) and return its exit code."""
    parsed = parser().parse_args(arguments)
    try:
        run = Path(parsed.target) if (Path(parsed.target) / CONFIG).is_file() else None
        config = configuration(parsed, run)
        adapter = adapter_folder(parsed, run)
        quiet_libraries(parsed.verbose)
        results = evaluate_target(config, adapter, with_base=parsed.base)
        output = parsed.output or (run / EVALUATIONS if run else None)
        entries = [
            {
                "step": last_step(run) if run and label != BASE else 0,
                "model": config.model.name,
                "adapter": None if label == BASE else str(adapter),
                "tasks": [task.name for task in config.task],
                **result.metrics,
            }
            for label, result in results.items()
        ]
        if output is not None:
            append_lines(output, entries)
        if run is not None and output == run / EVALUATIONS:
            refresh_report(run)
        if parsed.samples is not None:
            rows = [{"model": label, **s.entry()} for label, result in results.items() for s in result.samples]
            write_atomically(parsed.samples, "".join(map(json_line, rows)).encode())
    except UserError as error:
        return fail("grpo.evaluate", error)
    show({label: result.metrics for label, result in results.items()})
    print(json_line(entries[0]), end="")
    return 0


ADAPTER, BASE = "with adapter", "model alone"


def parser() -> argparse.ArgumentParser:
    """The options of `python -m grpo.evaluate`."""
    result = argparse.ArgumentParser(
        prog="python -m grpo.evaluate",
        description="Accuracy on held-out questions, as [eval] of the configuration says.",
        allow_abbrev=False,
    )
    result.add_argument("target", metavar="RUN|MODEL", help="a run folder; or a model: folder, .gguf file or hub id")
    result.add_argument("--task", metavar="NAME", help="ask this task's questions (for a run, instead of its own)")
    result.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one key; several times"
    )
    result.add_argument("--adapter", type=Path, metavar="DIR", help="this adapter, instead of the run's final one")
    result.add_argument("--base", action="store_true", help="evaluate the model without the adapter, too")
    result.add_argument("--output", type=Path, metavar="FILE", help="append results here (a run's: its eval.jsonl)")
    result.add_argument("--samples", type=Path, metavar="FILE", help="write every completion and verdict here")
    result.add_argument("--verbose", action="store_true", help="let vLLM and transformers write their logs")
    return result


def configuration(parsed: argparse.Namespace, run: Path | None) -> Config:
    """The run's configuration, or the defaults for a model; with `--task` and `--set` applied. Raises UserError."""
    if run is not None:
        values, text = read_toml(run / CONFIG)
        source = str(run / CONFIG)
        if values.pop("sft", None) is not None and not parsed.task:
            raise UserError(f"{parsed.target}: a supervised run has no task of its own; say what to ask with --task")
    elif parsed.task is not None:
        values, text, source = {"model": {"name": parsed.target}}, "", "the command line"
    else:
        raise UserError(
            f"{parsed.target}: there is no {CONFIG} in it, so it is not a run; for a model, say what to ask with --task"
        )
    if parsed.task is not None:
        values["task"] = {"name": parsed.task}
    for override in parsed.set:
        apply_override(values, override)
    return parse_config(values, source, text, parsed.set)


def adapter_folder(parsed: argparse.Namespace, run: Path | None) -> Path | None:
    """The adapter to load: `--adapter`, or the run's. Raises UserError where there is none."""
    if parsed.adapter is None:
        return None if run is None else folder_of_adapter(run)
    if not (parsed.adapter / ADAPTER_CONFIG).is_file():
        raise UserError(f"--adapter {parsed.adapter}: no {ADAPTER_CONFIG}; pass the folder of a peft adapter")
    return parsed.adapter


def evaluate_target(config: Config, adapter: Path | None, *, with_base: bool) -> dict[str, EvalResult]:
    """Results by label: with the adapter if there is one, and without it if there is none or it is asked for."""
    from grpo.session import open_session, read_model

    files = read_model(config)
    data = load_data(config, files.tokenizer, train=False)
    check_tokens(data.texts(), files.tokenizer, files.source.config)
    if data.eval_dropped:
        print(f"{data.eval_dropped} questions longer than rollout.max_prompt_length left out", file=sys.stderr)
    with open_session(config, adapter=adapter, files=files) as session:
        kinds = ([ADAPTER] if adapter else []) + ([BASE] if with_base or not adapter else [])
        return {kind: evaluate(session, data.eval, data.tasks, config.eval, adapter=kind == ADAPTER) for kind in kinds}


def last_step(run: Path) -> int:
    """The step that a run has reached, by its metrics."""
    try:
        lines = (run / METRICS).read_text(encoding="utf-8").splitlines()
        return int(json.loads(lines[-1])["step"])
    except (OSError, ValueError, LookupError):
        return 0


def append_lines(path: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Append JSON lines to `path`. Raises UserError where that cannot be done."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(map(json_line, entries)))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another --output") from None


def refresh_report(run: Path) -> None:
    """Write the report of `run` anew, if it has one. A failure is told and takes nothing from the evaluation."""
    if not (run / REPORT).is_file():
        return
    try:
        write_report([run], run / REPORT)
    except Exception as error:
        print(f"{run / REPORT} is as it was: it cannot be written ({type(error).__name__}: {error})", file=sys.stderr)


def show(results: Mapping[str, Mapping[str, float]]) -> None:
    """Print the metrics as a table, one column a label, intervals in brackets."""
    table = Table("", *results)
    for name in next(iter(results.values())):
        if name.startswith("eval/") and not name.endswith(("/low", "/high")):
            cells = []
            for metrics in results.values():
                low, high = metrics.get(f"{name}/low"), metrics.get(f"{name}/high")
                interval = "" if low is None else f" [{low:.3f}, {high:.3f}]"
                cells.append(Text(f"{metrics[name]:.3f}{interval}"))
            table.add_row(name.removeprefix("eval/"), *cells)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
