"""Rows that have tokens already: `input_ids` and `labels`, as a speech codec or a pipeline of one's own makes them.

No chat template and no tokenizer is asked. Whether the model has an embedding for each token is checked where the model
is read (`grpo.model.vocabulary`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from grpo.errors import UserError
from grpo.sft.encoding import IGNORED, Example
from grpo.tasks.cells import columns_of, parsed

TOKEN_COLUMNS = ("input_ids", "labels", "attention_mask")


def has_tokens(row: Mapping[str, Any]) -> bool:
    return row.get("input_ids") is not None


def token_example(row: Mapping[str, Any], where: str, *, whole: bool = False) -> Example:
    """The row as a sequence. Without `labels`, or where `whole`, every token is trained on.

    Tokens that `attention_mask` hides are padding and left out. Raises UserError for columns that do not fit.
    """
    ids = integers(row, "input_ids", where)
    if not ids:
        raise UserError(f"{where}: input_ids is empty; give it tokens, or leave the row out")
    labels = list(ids) if whole or row.get("labels") is None else integers(row, "labels", where)
    seen = [1] * len(ids) if row.get("attention_mask") is None else integers(row, "attention_mask", where)
    for column, values in (("labels", labels), ("attention_mask", seen)):
        if len(values) != len(ids):
            raise UserError(
                f"{where}: {column} has {len(values)} entries and input_ids {len(ids)}; make them one for each token"
            )
    if set(seen) - {0, 1}:
        raise UserError(f"{where}: attention_mask has other values than 0 and 1; correct it")
    kept = [index for index, one in enumerate(seen) if one]
    ids, labels = [ids[index] for index in kept], [labels[index] for index in kept]
    if (low := min(ids, default=0)) < 0:
        raise UserError(f"{where}: input_ids has {low}, which is no token; correct it")
    if any(label < 0 and label != IGNORED for label in labels):
        wrong = next(label for label in labels if label < 0 and label != IGNORED)
        raise UserError(f"{where}: labels has {wrong}; a label is a token, or {IGNORED} where none is trained on")
    if all(label == IGNORED for label in labels[1:]):
        raise UserError(f"{where}: no label after the first token is trained on; correct labels, or leave the row out")
    return Example(ids, labels)


def integers(row: Mapping[str, Any], column: str, where: str) -> list[int]:
    """The column as integers; from a cell of a CSV file, where it is JSON text."""
    if row.get(column) is None:
        raise UserError(f"{where}: there is no {column}, which earlier rows have; the columns are {columns_of(row)}")
    values = parsed(row[column])
    if not isinstance(values, list):
        raise UserError(f"{where}: {column} must be a list of token numbers; it is a {type(values).__name__}")
    if wrong := [value for value in values if not isinstance(value, int) or isinstance(value, bool)]:
        nested = ", several codebooks at once are not supported" if isinstance(wrong[0], list) else ""
        raise UserError(f"{where}: {column} has {str(wrong[0])[:40]!r}, which is no token number{nested}; correct it")
    return values


def unended_notice(examples: Sequence[Example], tokenizer: Any, stop_token_ids: Sequence[int]) -> list[str]:
    """A sentence about sequences that teach the model no end: without an end token where the training ends."""
    stops = set(stop_token_ids)
    trained = ([label for label in example.labels if label != IGNORED] for example in examples)
    if not (count := sum(labels[-1] not in stops for labels in trained)):
        return []
    names = ", ".join(f"{tokenizer.convert_ids_to_tokens(token)} ({token})" for token in sorted(stops))
    return [
        f"{count} of {len(examples)} sequences do not end with a token that ends generation ({names}), so that the "
        "model would not learn to stop; end them with one, or name theirs as eos_token_id in the model's "
        "generation_config.json"
    ]
