"""Held-out accuracy: of an adapter during training, and on the command line of a finished run or of any model.

    python -m grpo.evaluate runs/gsm8k --base              # the trained adapter, beside the model without it
    python -m grpo.evaluate Qwen/Qwen2.5-0.5B-Instruct --task gsm8k --set eval.limit=none

Every completion is checked twice: strictly (right, in the format asked for) and flexibly (right, wherever the answer
stands), so that learning the format and learning to answer can be distinguished. Rewards play no part here.

For the exit codes see `grpo.command`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from grpo.command import command
from grpo.config.schema import Config, parse_config
from grpo.config.toml import apply_override, read_toml
from grpo.data import load_data
from grpo.errors import UserError
from grpo.model.adapter_config import read_adapter_config
from grpo.model.vocabulary import check_tokens
from grpo.report.page import write_report
from grpo.run.checkpoint import CONFIG, write_atomically
from grpo.run.library_logs import quiet_libraries
from grpo.run.model_reference import (
    ADAPTER,
    BASE,
    folder_of_adapter,
    folder_of_model,
    is_trained_whole,
    of_whole_run,
)
from grpo.run.records import EVALUATIONS, METRICS, REPORT, json_line
from grpo.training.evaluation import EvalResult, evaluate

# The command line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (those of the process by default) and return its exit code."""
    parsed = parser().parse_args(arguments)
    return command("grpo.evaluate", lambda: run(parsed))


def run(parsed: argparse.Namespace) -> None:
    """Evaluate, keep the results where they are asked for, and print them. Raises UserError."""
    folder = Path(parsed.model) if (Path(parsed.model) / CONFIG).is_file() else None
    config = configuration(parsed, folder)
    adapter = adapter_folder(parsed, folder)
    quiet_libraries(parsed.verbose)
    results = evaluate_model(config, adapter, with_base=parsed.base)
    entries = [entry(config, folder, adapter, label, result) for label, result in results.items()]
    keep(results, entries, folder, parsed.output, parsed.samples)
    show({label: result.metrics for label, result in results.items()})
    print(json_line(entries[0]), end="")


def parser() -> argparse.ArgumentParser:
    """The options of `python -m grpo.evaluate`."""
    result = argparse.ArgumentParser(
        prog="python -m grpo.evaluate",
        description="Accuracy on held-out questions, as [eval] of the configuration says.",
        allow_abbrev=False,
    )
    result.add_argument("model", metavar="RUN|MODEL", help="a run folder; or a model: folder, .gguf file or hub id")
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
        if is_trained_whole(run):
            values = of_whole_run(run, folder_of_model(run), None).tables
        if values.pop("sft", None) is not None and not parsed.task:
            raise UserError(f"{parsed.model}: a supervised run has no task of its own; say what to ask with --task")
    elif parsed.task is not None:
        values, text, source = {"model": {"name": parsed.model}}, "", "the command line"
    else:
        raise UserError(
            f"{parsed.model}: there is no {CONFIG} in it, so it is not a run; for a model, say what to ask with --task"
        )
    if parsed.task is not None:
        values["task"] = {"name": parsed.task}
    if parsed.adapter is not None:
        values["lora"] = read_adapter_config(parsed.adapter).table
    for override in parsed.set:
        apply_override(values, override)
    return parse_config(values, source, text, parsed.set)


def adapter_folder(parsed: argparse.Namespace, run: Path | None) -> Path | None:
    """The adapter to load: `--adapter`, or the run's. Raises UserError where there is none."""
    whole = run is not None and is_trained_whole(run)
    if whole and parsed.base:
        raise UserError(
            f"{parsed.model}: this run trained all weights, so there is no model without an adapter; evaluate the one "
            "that it began with by its own name, with --task"
        )
    if parsed.adapter is None:
        return None if run is None or whole else folder_of_adapter(run)
    return parsed.adapter


def evaluate_model(config: Config, adapter: Path | None, *, with_base: bool) -> dict[str, EvalResult]:
    """Results by label: with the adapter if there is one, and without it if there is none or it is asked for."""
    from grpo.session import open_session, read_model
    from grpo.training.environment import check_conversation, held_out_player, load_tasks, start_environment

    files = read_model(config)
    check_conversation(config, files.tokenizer, files.stop_token_ids, files.image_tokens)
    with contextlib.ExitStack() as ending:
        environment = ending.enter_context(start_environment(config))
        data = load_data(
            config, files.tokenizer, train=False, tasks=load_tasks(config, environment), image_tokens=files.image_tokens
        )
        check_tokens(data.texts(), files.tokenizer, files.source.config)
        if data.eval_dropped:
            print(f"{data.eval_dropped} questions longer than rollout.max_prompt_length left out", file=sys.stderr)
        session = ending.enter_context(open_session(config, adapter=adapter, files=files))
        kinds = ([ADAPTER] if adapter else []) + ([BASE] if with_base or not adapter else [])
        player = held_out_player(session, environment)
        return {
            kind: evaluate(session, data.eval, data.tasks, config.eval, adapter=kind == ADAPTER, player=player)
            for kind in kinds
        }


def entry(config: Config, run: Path | None, adapter: Path | None, label: str, result: EvalResult) -> dict[str, Any]:
    """One line of eval.jsonl: the figures of `result`, and what they are of."""
    return {
        "step": last_step(run) if run and (label != BASE or is_trained_whole(run)) else 0,
        "model": config.model.name,
        "adapter": None if label == BASE else str(adapter),
        "tasks": [task.name for task in config.task],
        **result.metrics,
    }


def keep(
    results: Mapping[str, EvalResult],
    entries: Sequence[Mapping[str, Any]],
    run: Path | None,
    output: Path | None,
    samples: Path | None,
) -> None:
    """Append `entries` to `output`, or to those of `run`, whose report is written anew; completions go to `samples`."""
    output = output or (run / EVALUATIONS if run else None)
    if output is not None:
        append_lines(output, entries)
    if run is not None and output == run / EVALUATIONS:
        refresh_report(run)
    if samples is not None:
        rows = [{"model": label, **s.entry()} for label, result in results.items() for s in result.samples]
        write_atomically(samples, "".join(map(json_line, rows)).encode())


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
    """Write the report of `run` anew, if it has one. A failure is printed and takes nothing from the evaluation."""
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
