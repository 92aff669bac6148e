"""Choosing the training prompts by how often the model solves them: `[task] pass_rate`.

Measured once a run, with the starting model, and kept in the run folder. The window itself is applied in `grpo.data`.
"""

from __future__ import annotations

import json
from pathlib import Path

from grpo.data import Data, Prompt, keep_by_pass_rate
from grpo.distributed.ranks import Ranks
from grpo.monitor.log import TrainingLog
from grpo.run.checkpoint import write_atomically
from grpo.session import Session
from grpo.training.evaluation import measure_pass_rates

PASS_RATES = "pass_rates.json"


def filter_prompts(session: Session, data: Data, folder: Path, log: TrainingLog, ranks: Ranks) -> list[Prompt]:
    """The training prompts without those whose pass rate is outside their task's window; all where none has one.

    Samples the prompts of such tasks, unless the run in `folder` has their rates already. Raises UserError where a
    window leaves nothing.
    """
    windows = {name: section.pass_rate for name, section in data.settings.items() if section.pass_rate}
    if not windows:
        return data.train
    measured = [prompt for prompt in data.train if prompt.task in windows]
    rates = pass_rates(session, data, measured, folder, log, ranks)
    chosen = []
    for task in data.tasks:
        prompts = [prompt for prompt in data.train if prompt.task == task]
        if task in windows:
            prompts = keep_by_pass_rate(prompts, [rates[prompt.index] for prompt in prompts], windows[task])
        chosen += prompts
    log.notice(f"{len(chosen)} of {len(data.train)} prompts have a pass rate within the window")
    return chosen


def pass_rates(
    session: Session, data: Data, prompts: list[Prompt], folder: Path, log: TrainingLog, ranks: Ranks
) -> dict[int, float]:
    """Prompt's index -> share of right answers, as kept in `folder` or measured now and kept there."""
    file = folder / PASS_RATES
    rates = ranks.broadcast(json.loads(file.read_text()) if ranks.first and file.exists() else None)
    if rates is None:
        log.status("measuring pass rates")
        samples = max(data.settings[prompt.task].pass_rate_samples for prompt in prompts)
        rates = measure_pass_rates(session, prompts, data.tasks, samples, ranks)
        if ranks.first:
            write_atomically(file, json.dumps(rates).encode())
    return dict(zip((prompt.index for prompt in prompts), rates, strict=True))
