"""The window of pass rates, which are measured once a run; and both logs have one interface."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st

from grpo.config.schema import Config, Task, parse_config
from grpo.data import Data, Prompt
from grpo.distributed.ranks import Ranks
from grpo.monitor.log import NullLog, TrainingLog
from grpo.monitor.run_log import RunLog
from grpo.session import Session
from grpo.training import prompts as module
from grpo.training.prompts import filter_prompts

WINDOW = (0.25, 0.75)


def config() -> Config:
    tables = {"model": {"name": "none"}, "task": {"name": "arithmetic"}, "train": {"max_steps": 1}}
    return parse_config(tables | {"checkpoint": {"output_dir": "runs/none"}})


@given(
    tasks=st.lists(st.sampled_from("abc"), min_size=1, max_size=12),
    windowed=st.sets(st.sampled_from("abc")),
    data=st.data(),
)
def test_what_is_outside_its_tasks_window_is_left_out_and_nothing_is_measured_twice(
    tasks: list[str], windowed: set[str], data: st.DataObject
) -> None:
    prompts = [Prompt(index, task, f"question {index}", {}, [1, 2]) for index, task in enumerate(tasks)]
    rates = {index: data.draw(st.sampled_from([0.0, 0.25, 0.5, 1.0])) for index in range(len(prompts))}
    for task in windowed & set(tasks):
        rates[tasks.index(task)] = 0.5  # a window that leaves nothing is an error
    settings = {
        name: Task(name=name, pass_rate=WINDOW if name in windowed else None, pass_rate_samples=4)
        for name in set(tasks)
    }
    loaded = Data(train=prompts, tasks=cast(Any, dict.fromkeys(settings)), settings=settings)
    measured: list[list[int]] = []

    def measure(session: Session, asked: Sequence[Prompt], *others: Any) -> list[float]:
        measured.append([prompt.index for prompt in asked])
        return [rates[prompt.index] for prompt in asked]

    before = module.measure_pass_rates
    module.measure_pass_rates = measure
    try:
        with tempfile.TemporaryDirectory() as folder:
            arguments = cast(Session, None), loaded, Path(folder), NullLog(0, config()), Ranks()
            chosen, again = filter_prompts(*arguments), filter_prompts(*arguments)
    finally:
        module.measure_pass_rates = before
    inside = {i for i, task in enumerate(tasks) if task not in windowed or WINDOW[0] <= rates[i] <= WINDOW[1]}
    assert {prompt.index for prompt in chosen} == inside and chosen == again
    asked = [index for index, task in enumerate(tasks) if task in windowed]
    assert measured == ([asked] if asked else [])


def test_every_log_is_called_alike() -> None:
    members = [name for name, value in vars(TrainingLog).items() if inspect.isfunction(value)]
    wanted = {name for name in members if not name.startswith("_") or name in ("__enter__", "__exit__")}
    assert len(wanted) > 8
    for log in (NullLog, RunLog):
        for name in wanted:
            theirs = inspect.signature(getattr(log, name)).parameters
            assert list(theirs) == list(inspect.signature(getattr(TrainingLog, name)).parameters), (log, name)
