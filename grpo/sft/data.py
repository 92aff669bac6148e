"""The sequences of a supervised run: rows read, made conversations, encoded, and left out where they are too long.

A row is a conversation in one of the forms of `forms.py`, whose tokens and labels `encoding.py` makes, or has tokens
and labels already (`token_rows.py`). Not here: packing and batches, which are TRL's.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from grpo.errors import UserError
from grpo.images import Image, ReadImage, read_image
from grpo.model.image_tokens import ImageTokens
from grpo.sft.config import Sft, SftConfig
from grpo.sft.encoding import IGNORED, Encoder, Example
from grpo.sft.forms import chat_of, check_optional_columns, conversation, joined, message
from grpo.sft.token_rows import TOKEN_COLUMNS, has_tokens, token_example, unended_notice
from grpo.tasks.common import Row, read_hub, read_splits
from grpo.tasks.image_paths import with_image_paths

__all__ = ["IGNORED", "Example", "SftData", "conversation", "load_data", "load_examples", "read_rows"]


@dataclass
class SftData:
    """All sequences, and what is to be said about them."""

    examples: list[Example] = field(default_factory=list)
    held_out: list[Example] = field(default_factory=list)
    """Not trained on."""
    notices: list[str] = field(default_factory=list)

    @property
    def images(self) -> list[Image]:
        """Those of all sequences."""
        return [image for example in (*self.examples, *self.held_out) for image in example.images]


class PlacedRow(dict[str, Any]):
    """A row that knows where it was read, as "file:line"."""

    where = ""


def load_data(
    config: SftConfig, tokenizer: Any, stop_token_ids: Sequence[int], image_tokens: ImageTokens | None = None
) -> SftData:
    """The sequences to train on and, where `[eval] every` is set, those to measure. Raises UserError."""
    settings, seed = config.sft, config.train.seed
    rows = read_rows(settings, settings.split)[: settings.limit]
    held_out: list[Row] = []
    held_out_notices = []
    if config.eval.every is not None and settings.eval_split is not None:
        held_out = read_rows(settings, settings.eval_split)[: config.eval.limit]
    elif held_out_count := config.rows_held_out:
        if held_out_count >= len(rows):
            raise UserError(
                f"eval.limit = {held_out_count} would hold out all {len(rows)} rows; lower it, or set sft.eval_split"
            )
        rows, held_out = rows[:-held_out_count], rows[-held_out_count:]
        held_out_notices = [
            f"the last {held_out_count} rows are held out and not trained on; sft.eval_split names a split instead"
        ]
    image = functools.partial(read_image, max_pixels=config.model.max_pixels, urls=config.model.image_urls)
    load = functools.partial(load_examples, image_tokens=image_tokens, image=image)
    data = load(settings, rows, tokenizer, stop_token_ids, seed)
    if held_out:
        data.held_out = load(settings, held_out, tokenizer, stop_token_ids, seed, "held-out ").examples
    data.notices = held_out_notices + data.notices
    return data


def load_examples(
    settings: Sft,
    rows: Sequence[Row],
    tokenizer: Any,
    stop_token_ids: Sequence[int],
    seed: int,
    kind: str = "",
    *,
    image_tokens: ImageTokens | None = None,
    image: ReadImage = read_image,
) -> SftData:
    """`rows` as sequences. `stop_token_ids`: the tokens that end generation; `kind`: what errors call the rows.

    Raises UserError for a row that is no conversation, a chat template that is missing or opens an answer otherwise
    than generation does, and where no row is short enough.
    """
    if rows and has_tokens(rows[0]):
        placed, notices = token_examples(settings, rows, tokenizer, stop_token_ids, kind)
    else:
        encoder = Encoder(tokenizer, settings, tuple(stop_token_ids), image_tokens)
        placed, notices = chat_examples(settings, rows, encoder, seed, kind, image)
    data = SftData()
    for where, example in placed:
        length = len(example.input_ids)
        if length <= settings.max_length:
            data.examples.append(example)
        elif settings.overlong == "error":
            raise UserError(
                f"{where} has {length} tokens, more than sft.max_length = {settings.max_length}; raise it, or set "
                'sft.overlong = "drop"'
            )
    if not data.examples:
        shortest = min(len(example.input_ids) for _, example in placed)
        raise UserError(
            f"all {len(placed)} {kind}sequences are longer than sft.max_length = {settings.max_length}; the shortest "
            f"has {shortest} tokens, so raise it"
        )
    if dropped := len(placed) - len(data.examples):
        data.notices.append(f"{dropped} of {len(placed)} sequences longer than sft.max_length were dropped")
    data.notices += notices
    return data


Placed = list[tuple[str, Example]]
"""Sequences, each with what to call it."""


def chat_examples(
    settings: Sft, rows: Sequence[Row], encoder: Encoder, seed: int, kind: str, image: ReadImage
) -> tuple[Placed, list[str]]:
    """Rows of conversations as sequences, and what is to be said about them."""
    check_optional_columns(settings, rows, kind)
    chats = [chat_of(row, settings, place(row, kind, number), image) for number, row in enumerate(rows, 1)]
    unused = unused_notice(rows, [chat.used for chat in chats])
    if settings.conversation_extension > 1:
        chats = joined(chats, settings.conversation_extension, seed)
    else:
        chats = [
            replace(chat, where=f"{kind}conversation {number}, {chat.where}") for number, chat in enumerate(chats, 1)
        ]
    if settings.system_prompt is not None:
        system = message("system", settings.system_prompt)
        chats = [c if c.messages[0]["role"] == "system" else replace(c, messages=[system, *c.messages]) for c in chats]
    placed = [(chat.where, example) for chat in chats for example in encoder.encode(chat)]
    return placed, [*encoder.notices(), *unused]


def token_examples(
    settings: Sft, rows: Sequence[Row], tokenizer: Any, stop_token_ids: Sequence[int], kind: str
) -> tuple[Placed, list[str]]:
    """Rows of tokens as sequences, and what is to be said about them."""
    if conflict := settings.of_text:
        raise UserError(f"the data have {TOKEN_COLUMNS[0]}, of which sft.{conflict} makes nothing; leave it out")
    placed = []
    for number, row in enumerate(rows, 1):
        where = place(row, kind, number)
        placed.append((where, token_example(row, where, whole=not settings.completion_only_loss)))
    notices = unended_notice([example for _, example in placed], tokenizer, stop_token_ids)
    return placed, notices + unused_notice(rows, [TOKEN_COLUMNS] * len(rows))


def place(row: Row, kind: str, number: int) -> str:
    """What to call a row in an error."""
    where = getattr(row, "where", "")
    return f"{kind}row {number}" + (f" ({where})" if where else "")


def unused_notice(rows: Sequence[Row], used: Iterable[Sequence[str]]) -> list[str]:
    """A sentence that names the columns that no sequence was made of."""
    left: Counter[str] = Counter()
    for row, names in zip(rows, used, strict=True):
        tops = {name.split(".")[0].split("[")[0] for name in names} | set(names)
        left.update(str(name) for name, value in row.items() if name not in tops and value is not None)
    return [f"columns that nothing was made of: {', '.join(left)}"] if left else []


def read_rows(settings: Sft, split: str) -> list[Row]:
    """The rows of one split of the file, folder or hub data set."""
    if settings.path is not None:
        if settings.path.is_file() and split == settings.eval_split:
            raise UserError(f"sft.eval_split: {settings.path} is one file; give a folder with a file for each split")
        return read_splits(settings.path, [], split, None, functools.partial(placed_row, path=settings.path))[0]
    assert settings.hub is not None
    return read_hub(settings.hub, settings.subset, [], split, None, placed_row)[0]


def placed_row(row: Row, where: str, path: Path | None = None) -> Row:
    """The row with its place, and with its images' paths from where the data are."""
    found = PlacedRow(with_image_paths(row, where, path))
    found.where = where
    return found
