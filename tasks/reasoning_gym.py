"""Any data set of reasoning-gym by its name, generated and scored by that package (pip install reasoning-gym).

An example row (data set "chain_sum"):

    prompt: [{"role": "system", "content": SYSTEM_PROMPT},
             {"role": "user", "content": "State the final answer to the following arithmetic problem: 4 - 1 - 7 ="}]
    answer: "-4"
    entry:  {"question": ..., "answer": "-4", "metadata": {"source_dataset": "chain_sum", ...}}

The score is the data set's own, from 0 to 1, often with partial credit; an answer counts as right at 1.
"""

from __future__ import annotations

import difflib
import functools
import json
from typing import Any

from grpo.errors import UserError
from grpo.rewards.extract import completion_text, xml_answer
from grpo.tasks.common import Row, Task

SYSTEM_PROMPT = """\
Think about the question first. Then give the final answer, and nothing else, between answer tags: \
<answer>final answer</answer>"""


def load(
    dataset: str,
    rows: int = 2000,
    held_out: int = 200,
    seed: int = 0,
    system_prompt: str = SYSTEM_PROMPT,
    config: dict[str, Any] | None = None,
) -> Task:
    """`rows` training questions of the data set `dataset` and at most `held_out` others.

    `config` goes to the data set, for example `{ min_terms = 2, max_terms = 3 }`.
    """
    if rows < 1 or held_out < 0:
        raise UserError("task reasoning_gym: rows must be at least 1 and held_out at least 0")
    options = json.dumps(config or {}, sort_keys=True)
    # Entry i of the generator is seeded with seed + i, so a second generator with another seed would repeat entries.
    source = generator(dataset, options, rows + held_out, seed)
    entries = [source[index] for index in range(rows + held_out)]
    train = entries[:rows]
    seen = {entry["question"] for entry in train}
    held = [entry for entry in entries[rows:] if entry["question"] not in seen]
    check = functools.partial(right, dataset=dataset, options=options)
    return Task(
        dataset,
        [row(entry, system_prompt) for entry in train],
        [row(entry, system_prompt) for entry in held],
        rewards=[
            {"function": "grpo.tasks.reasoning_gym:score", "options": {"dataset": dataset, "config": config or {}}}
        ],
        strict=functools.partial(check, tagged=True),
        flexible=functools.partial(check, tagged=False),
    )


@functools.cache
def generator(dataset: str, options: str, size: int, seed: int) -> Any:
    """reasoning-gym's data set; `options` are its configuration as JSON. Raises UserError for what it refuses."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise UserError(
            f"task reasoning_gym needs the package reasoning-gym ({error}); pip install reasoning-gym"
        ) from None
    if dataset not in DATASETS:
        near = difflib.get_close_matches(dataset, DATASETS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of its {len(DATASETS)}"
        raise UserError(f"reasoning-gym has no data set {dataset!r}; {hint}")
    try:
        return reasoning_gym.create_dataset(dataset, size=size, seed=seed, **json.loads(options))
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"reasoning-gym's {dataset} refuses config {options} ({error}); correct task.options") from None


def row(entry: dict[str, Any], system_prompt: str) -> Row:
    """A reasoning-gym entry as a task row."""
    messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return {
        "prompt": [*messages, {"role": "user", "content": entry["question"]}],
        "answer": entry["answer"],
        "entry": entry,
    }


def points(answer: str, entry: dict[str, Any], dataset: str, options: str) -> float:
    """The data set's score for `answer`."""
    return float(generator(dataset, options, 1, 0).score_answer(answer=answer, entry=entry))


def right(text: str, row: Row, *, dataset: str, options: str, tagged: bool) -> bool:
    """Full score for the tagged answer or, unless `tagged`, for the last line of a completion without tags."""
    if "<answer>" in text:
        answer = xml_answer(text)
    elif tagged or not text.strip():
        return False
    else:
        answer = text.strip().splitlines()[-1]
    return points(answer, row["entry"], dataset, options) >= 1


def score(
    completions: list, entry: list, dataset: str = "", config: dict[str, Any] | None = None, **_: Any
) -> list[float | None]:
    """The data set's score of each tagged answer (0 without tags); None for rows of other tasks."""
    options = json.dumps(config or {}, sort_keys=True)
    texts = [completion_text(completion) for completion in completions]
    return [
        None if one is None else points(xml_answer(text), one, dataset, options) if "<answer>" in text else 0.0
        for text, one in zip(texts, entry, strict=True)
    ]
