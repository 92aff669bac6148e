"""From `[task]` sections to tokenised prompts, and the stream that training takes them from.

Nothing here generates or scores. The order of the stream is a function of the seed and of how many prompts were
taken, so that its state is a few integers and resuming is exact. For measuring how often a question is
solved, for `pass_rate`, see `grpo/training/evaluation.py`; choosing by that rate is here.
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from grpo.config import schema as sections
from grpo.errors import UserError
from grpo.images import Image, ReadImage, read_image
from grpo.messages import column_images, with_places
from grpo.rewards.extract import is_no_answer
from grpo.rewards.runtime.contract import RewardSpec
from grpo.tasks.cells import GIVE_OR_LEAVE_OUT, check_question, checked_prompt
from grpo.tasks.common import Row, Task, load_task
from grpo.tokenizing import ImageTokens, Messages, tokenize

GOLD_COLUMNS = ("answer", "ground_truth")
"""The columns that rewards, the built-in ones and verl's, read as the gold answer."""


@dataclass(frozen=True)
class Prompt:
    """One question as the model reads it."""

    index: int
    """Its row number over all tasks, training and held-out rows counted apart; dropping others leaves it."""
    task: str
    prompt: str | Messages
    """Of a row that has token numbers, their text. Messages have places for images, and not the images."""
    columns: dict[str, Any]
    """The row without "prompt". With several tasks, columns that only the others have are None. Where rows have images,
    "images" is each row's tuple of them, and a column "image" its one."""
    token_ids: list[int]
    """With each image's tokens, as many as it takes."""
    images: tuple[Image, ...] = ()
    """In the order of their places."""

    @property
    def row(self) -> Row:
        """The whole row, as the task's checks take it."""
        return {**self.columns, "prompt": self.prompt}


@dataclass
class Data:
    """What a run trains and evaluates on."""

    train: list[Prompt] = field(default_factory=list)
    eval: list[Prompt] = field(default_factory=list)
    tasks: dict[str, Task] = field(default_factory=dict)
    settings: dict[str, sections.Task] = field(default_factory=dict)
    """Each task's section of the configuration."""
    rewards: list[RewardSpec] = field(default_factory=list)
    dropped: int = 0
    """Training prompts longer than `max_prompt_length`."""
    eval_dropped: int = 0
    """Held-out ones."""

    def texts(self) -> Iterator[tuple[str, list[int]]]:
        """Every prompt by what messages call it, with its token ids."""
        for split, prompts in (("training", self.train), ("held-out", self.eval)):
            yield from ((f"task {each.task!r}, {split} prompt {each.index + 1}", each.token_ids) for each in prompts)


def load_data(
    config: sections.Config,
    tokenizer: Any,
    *,
    train: bool = True,
    tasks: Sequence[Task] | None = None,
    image_tokens: ImageTokens | None = None,
) -> Data:
    """The prompts of all `[task]` sections, and the rewards to train with.

    `tokenizer` is transformers'. `tasks`: those of the sections, if they need not be loaded by name. `train = False`
    leaves the training rows and the rewards out; held-out rows are left out if `eval.every` is not set, unless they
    are all that is asked for. `eval.limit` counts for each task. `image_tokens`: None for a model of text alone. Raises
    UserError for an unknown task, a row without a usable prompt, no rows, nothing but overlong prompts, chat prompts
    without a chat template, images that cannot be used, and rewards neither given nor agreed on by the tasks.
    """
    data = Data()
    loaded = tasks or [load_task(section.name, section.options) for section in config.task]
    for section, task in zip(config.task, loaded, strict=True):
        name = unused_name(task.name, data.tasks)
        data.tasks[name], data.settings[name] = task, section
    if train:
        rows = {name: task.train[: data.settings[name].limit] for name, task in data.tasks.items()}
        data.train, data.dropped = make_prompts(rows, "training", data.settings, config, tokenizer, image_tokens)
        data.rewards = [RewardSpec.of(reward) for reward in config.rewards]
        if not data.rewards and (config.environment is None or config.environment.kind == "tools"):
            data.rewards = default_rewards(data.tasks)
    if config.eval.every is not None or not train:
        rows = {name: task.eval[: config.eval.limit] for name, task in data.tasks.items()}
        data.eval, data.eval_dropped = make_prompts(rows, "held-out", data.settings, config, tokenizer, image_tokens)
        if not data.eval:
            names = ", ".join(data.tasks)
            raise UserError(f"task {names}: no held-out rows to evaluate on; give the task some, or unset eval.every")
    return data


def unused_name(name: str, taken: Mapping[str, Any]) -> str:
    """`name`, or with a number when another task is called the same."""
    number, free = 2, name
    while free in taken:
        free, number = f"{name}-{number}", number + 1
    return free


def default_rewards(tasks: Mapping[str, Task]) -> list[RewardSpec]:
    """The rewards that the tasks suggest; several tasks must suggest the same."""
    (first, task), *others = tasks.items()
    for name, other in others:
        if other.rewards != task.rewards:
            raise UserError(
                f"tasks {first!r} and {name!r} suggest different rewards; list those to train with as [[rewards]]"
            )
    if not task.rewards:
        raise UserError(f"task {first!r} suggests no rewards; add a [[rewards]] section")
    return [RewardSpec.of(table) for table in task.rewards]


# From rows to prompts


@dataclass(frozen=True)
class ReadRow:
    """A row whose prompt and images are known to be usable."""

    where: str
    row: Row
    prompt: str | Messages
    images: tuple[Image, ...]
    given: list[int] | None
    """Its tokens, where it has those."""


def make_prompts(
    rows: Mapping[str, Sequence[Row]],
    split: str,
    settings: Mapping[str, sections.Task],
    config: sections.Config,
    tokenizer: Any,
    image_tokens: ImageTokens | None = None,
) -> tuple[list[Prompt], int]:
    """Every task's rows as prompts no longer than `max_prompt_length`, and how many were longer."""
    image = functools.partial(read_image, max_pixels=config.model.max_pixels, urls=config.model.image_urls)
    read = {task: read_rows(task, given, split, settings[task], tokenizer, image) for task, given in rows.items()}
    if config.environment is not None:
        refuse_in_environment(one for each in read.values() for one in each)
    columns = list(dict.fromkeys(name for each in read.values() for one in each for name in one.row))
    prompts: list[Prompt] = []
    index = dropped = 0
    for task, each in read.items():
        if not each and split == "training":
            raise UserError(f"task {task!r} has no training rows; check its options")
        ids = tokenize(
            [one.prompt for one in each],
            tokenizer,
            config.rollout.chat_template_kwargs,
            f"task {task!r}",
            [one.given for one in each],
            images=[one.images for one in each],
            where=[one.where for one in each],
            image_tokens=image_tokens,
        )
        smaller = " or lower model.max_pixels" if any(one.images for one in each) else ""
        check_shortest(task, split, [len(one) for one in ids], config.rollout.max_prompt_length, smaller)
        for one, token_ids in zip(each, ids, strict=True):
            if fits(one, token_ids, settings[task], config):
                prompts.append(Prompt(index, task, one.prompt, columns_of(one, columns), token_ids, one.images))
            else:
                dropped += 1
            index += 1
    return prompts, dropped


def read_rows(
    task: str, rows: Sequence[Row], split: str, settings: sections.Task, tokenizer: Any, image: ReadImage
) -> list[ReadRow]:
    """The rows of a task with their images read. Raises UserError naming the first that cannot be used."""
    return [
        read_row(row, f"task {task!r}, {split} row {number}", settings.system_prompt, tokenizer, image)
        for number, row in enumerate(rows, 1)
    ]


def read_row(row: Any, where: str, system: str | None, tokenizer: Any, image: ReadImage) -> ReadRow:
    given = given_tokens(row, where)
    if given is not None:
        row = {**row, "prompt": tokenizer.decode(given).strip() or f"tokens {given}"}
    row, images = images_apart(row, where, image)
    if images and given is not None:
        raise UserError(f"{where}: its prompt is token numbers, which have no place for images; make it messages")
    prompt = checked_row(row, where)
    if system is not None:
        prompt = with_system_prompt(prompt, system, where)
    return ReadRow(where, row, prompt, images, given)


def images_apart(row: Any, where: str, image: ReadImage) -> tuple[Any, tuple[Image, ...]]:
    """The row with places for its images in the prompt, and in its columns the images as read; and the images.

    A prompt that is a text has the model's own marks in their places, as a rendered chat has. Raises UserError for what
    is no image, for messages whose places do not match, and for images beside token numbers.
    """
    if not isinstance(row, dict) or not row.get("prompt"):
        return row, ()
    found, prompt = column_images(row, where), row["prompt"]
    if isinstance(prompt, list):
        prompt, found = with_places(prompt, found, where)
    places = [where] if len(found) == 1 else [f"{where}, image {number}" for number in range(1, len(found) + 1)]
    images = tuple(image(value, one) for value, one in zip(found, places, strict=True))
    read: Row = {"images": images} if images else {}
    if row.get("image") is not None:
        read["image"] = images[0]
    return {**row, "prompt": prompt, **read}, images


def refuse_in_environment(rows: Iterable[ReadRow]) -> None:
    """Raise UserError for the first text with images: its places are marks that no conversation has."""
    for one in rows:
        if one.images and isinstance(one.prompt, str):
            raise UserError(
                f"{one.where}: it has images in a prompt that is a text, and an [environment] begins with messages; "
                "make the prompt messages"
            )


def columns_of(read: ReadRow, columns: Sequence[str]) -> dict[str, Any]:
    """The values of `columns`, the prompt's left out; None for those that the row lacks, no images for "images"."""
    values = {name: read.row.get(name) for name in columns if name != "prompt"}
    return values | {"images": read.images} if "images" in values else values


def check_shortest(task: str, split: str, lengths: Sequence[int], limit: int, smaller: str) -> None:
    """Raise UserError where no prompt of a task is short enough. `smaller`: what else makes them so."""
    if lengths and min(lengths) > limit:
        raise UserError(
            f"task {task!r}: all {len(lengths)} {split} prompts are longer than rollout.max_prompt_length = "
            f"{limit}; the shortest has {min(lengths)} tokens, so raise it{smaller}"
        )


def fits(read: ReadRow, token_ids: Sequence[int], settings: sections.Task, config: sections.Config) -> bool:
    """Whether a prompt is short enough. Raises UserError where it is not and no row may be dropped."""
    limit = config.rollout.max_prompt_length
    if len(token_ids) > limit and settings.overlong == "error":
        smaller = " lower model.max_pixels," if read.images else ""
        raise UserError(
            f"{read.where}: {len(token_ids)} tokens exceed rollout.max_prompt_length = {limit}; raise it,{smaller} or "
            'set overlong = "drop"'
        )
    return len(token_ids) <= limit


def given_tokens(row: Any, where: str) -> list[int] | None:
    """The prompt of a row that has it as token numbers, such as a codec's; None where it is text or messages."""
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(prompt, list) or not prompt or not all(type(token) is int for token in prompt):
        return None
    if min(prompt) < 0:
        raise UserError(f"{where}: its prompt has {min(prompt)}, which is no token; correct it")
    return prompt


def checked_row(row: Any, where: str) -> str | Messages:
    """The row's prompt. Raises UserError where it is none or asks nothing, for a column without a name, and for an
    empty gold answer, which an empty answer would equal; null stands for a row to which no gold answer applies."""
    prompt = checked_prompt(row.get("prompt") if isinstance(row, dict) else None, where)
    check_question(prompt, where)
    if unnamed := [name for name in row if not isinstance(name, str)]:
        raise UserError(
            f"{where}: a column is called {unnamed[0]!r}; columns reach rewards by name, so name it with text"
        )
    for column in GOLD_COLUMNS:
        if row.get(column) is not None and is_no_answer(row[column]):
            state = "is empty" if isinstance(row[column], str) else "is NaN"
            raise UserError(f"{where}: column {column!r} {state}; {GIVE_OR_LEAVE_OUT}")
    return prompt


def with_system_prompt(prompt: str | Messages, system: str, where: str) -> Messages:
    """The messages with `system` in place of their own system prompt; an empty one removes it."""
    if isinstance(prompt, str):
        raise UserError(f"{where}: a plain-text prompt takes no system_prompt; remove it from [task]")
    rest = prompt[1:] if prompt[0]["role"] == "system" else prompt
    return [{"role": "system", "content": system}, *rest] if system else rest


# Taking


class PromptStream:
    """Endless training prompts: every task's rows once an epoch, tasks mixed in proportion to their weights.

    Which task is next and where its row stands in its epoch's order follow from how many were taken before, and from
    the seed; there is no random state. `shuffle = false` keeps a task's rows in order.
    """

    def __init__(self, prompts: Sequence[Prompt], settings: Mapping[str, sections.Task], seed: int):
        self.rows: dict[str, list[Prompt]] = {}
        for prompt in prompts:
            self.rows.setdefault(prompt.task, []).append(prompt)
        if not self.rows:
            raise UserError("there are no training prompts; check the [task] section")
        self.settings, self.seed = settings, seed
        self.taken = dict.fromkeys(self.rows, 0)
        self._orders: dict[str, tuple[int, list[int]]] = {}

    @property
    def epoch(self) -> float:
        """Prompts taken over the number of prompts."""
        return sum(self.taken.values()) / sum(map(len, self.rows.values()))

    def take(self, count: int) -> list[Prompt]:
        """The next `count` prompts. A new epoch may begin among them, so that a prompt can occur twice."""
        return [self._next() for _ in range(count)]

    def _next(self) -> Prompt:
        # Stride scheduling: the task whose share is least used up, in exact proportion over any stretch.
        task = min(self.taken, key=lambda name: (self.taken[name] + 1) / self.settings[name].weight)
        epoch, index = divmod(self.taken[task], len(self.rows[task]))
        self.taken[task] += 1
        return self.rows[task][self._order(task, epoch)[index]]

    def _order(self, task: str, epoch: int) -> list[int]:
        """Row numbers of `task` in the order of `epoch`."""
        if self._orders.get(task, (None,))[0] != epoch:
            order = list(range(len(self.rows[task])))
            if self.settings[task].shuffle:
                # Sorting by random() and not shuffle(): only the former's values are promised for later Pythons.
                generator = random.Random(f"{self.seed} {task} {epoch}")
                order.sort(key=lambda _: generator.random())
            self._orders[task] = epoch, order
        return self._orders[task][1]

    def fingerprint(self) -> str:
        """A digest of the prompts, by which a checkpoint knows its data again."""
        digest = hashlib.sha256()
        for task, prompts in self.rows.items():
            for prompt in prompts:
                images = "".join(f" {image.digest}" for image in prompt.images)
                digest.update(f"{task} {prompt.index} {prompt.token_ids}{images}\n".encode())
        return digest.hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """The position, as JSON values."""
        return {"taken": dict(self.taken), "seed": self.seed, "fingerprint": self.fingerprint()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken. Raises UserError if the prompts or the seed are others."""
        if state["fingerprint"] != self.fingerprint():
            raise UserError(
                "the training prompts are not those of the checkpoint; resume with the same data, [task], tokenizer "
                "and rollout.max_prompt_length, or start a new run"
            )
        if state["seed"] != self.seed:
            raise UserError(f"train.seed = {self.seed}: the checkpoint's is {state['seed']}; resume with that one")
        self.taken = {task: int(state["taken"][task]) for task in self.rows}


def keep_by_pass_rate(prompts: Sequence[Prompt], rates: Sequence[float], window: tuple[float, float]) -> list[Prompt]:
    """The prompts whose pass rate lies within `window`, both ends included. Raises UserError when none does."""
    low, high = window
    selected = [prompt for prompt, rate in zip(prompts, rates, strict=True) if low <= rate <= high]
    if not selected:
        shown = (
            f"from {min(rates):.2f} to {max(rates):.2f}, on average {sum(rates) / len(rates):.2f}" if rates else "none"
        )
        raise UserError(
            f"no question has a pass rate within task.pass_rate = [{low:g}, {high:g}]; those measured are {shown}, so "
            "widen the window"
        )
    return selected
