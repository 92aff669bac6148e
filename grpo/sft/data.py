"""From rows to token ids and labels for supervised training: conversations, templates, the end token, the mask.

The labels are made here, before TRL sees the data, so that they do not depend on markers that few chat templates have:
an assistant's turn is what the template adds for it after the opening of an answer. Every answer that is trained on
ends with a token that ends generation; where the template writes none, one is appended and said so.

Not here: packing and batches, which are TRL's.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from grpo.errors import UserError
from grpo.references import described
from grpo.sft.config import Sft, SftConfig
from grpo.special_tokens import leading_tokens, start_with
from grpo.tasks.cells import filled, reach
from grpo.tasks.common import Row, read_hub, read_splits

IGNORED = -100
"""The label of a token that is not trained on."""
ALPACA = ("{instruction}[[\n\n{input}]]", "{output}")
SHARE_GPT = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}
"""Roles in data with "conversations" of {"from", "value"}."""
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Example:
    """A sequence to train on. `labels` is `input_ids` where a token is trained on, else -100."""

    input_ids: list[int]
    labels: list[int]


@dataclass
class SftData:
    """All sequences, and what is to be said about them."""

    examples: list[Example] = field(default_factory=list)
    held_out: list[Example] = field(default_factory=list)
    """Not trained on."""
    notices: list[str] = field(default_factory=list)


def load_data(config: SftConfig, tokenizer: Any, stop_token_ids: Sequence[int]) -> SftData:
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
    data = load_examples(settings, rows, tokenizer, stop_token_ids, seed)
    if held_out:
        data.held_out = load_examples(settings, held_out, tokenizer, stop_token_ids, seed, "held-out ").examples
    data.notices = held_out_notices + data.notices
    return data


def load_examples(
    settings: Sft, rows: Sequence[Row], tokenizer: Any, stop_token_ids: Sequence[int], seed: int, kind: str = ""
) -> SftData:
    """`rows` as sequences. `stop_token_ids`: the tokens that end generation; `kind`: what errors call the rows.

    Raises UserError for a row that is no conversation, a chat template that is missing or renders a turn otherwise
    once others follow, and where no row is short enough.
    """
    chats = [conversation(row, settings, f"{kind}row {number}") for number, row in enumerate(rows, 1)]
    if settings.turns_per_conversation > 1:
        chats = joined(chats, settings.turns_per_conversation, seed)
    if settings.system_prompt is not None:
        chats = [c if c[0]["role"] == "system" else [message("system", settings.system_prompt), *c] for c in chats]
    encoder = Encoder(tokenizer, settings, tuple(stop_token_ids))
    data = SftData()
    lengths = []
    for number, chat in enumerate(chats, 1):
        example = encoder.encode(chat, f"{kind}conversation {number}")
        lengths.append(len(example.input_ids))
        if lengths[-1] <= settings.max_length:
            data.examples.append(example)
        elif settings.overlong == "error":
            raise UserError(
                f"{kind}conversation {number} has {lengths[-1]} tokens, more than sft.max_length = "
                f'{settings.max_length}; raise it, or set sft.overlong = "drop"'
            )
    if not data.examples:
        raise UserError(
            f"all {len(lengths)} {kind}sequences are longer than sft.max_length = {settings.max_length}; the shortest "
            f"has {min(lengths)} tokens, so raise it"
        )
    if dropped := len(lengths) - len(data.examples):
        data.notices.append(f"{dropped} of {len(lengths)} sequences longer than sft.max_length were dropped")
    data.notices += encoder.notices()
    return data


def read_rows(settings: Sft, split: str) -> list[Row]:
    """The rows of one split of the file, folder or hub data set."""
    if settings.path is not None:
        if settings.path.is_file() and split == settings.eval_split:
            raise UserError(f"sft.eval_split: {settings.path} is one file; give a folder with a file for each split")
        return read_splits(settings.path, [], split, None)[0]
    assert settings.hub is not None
    return read_hub(settings.hub, settings.subset, [], split, None)[0]


# Conversations


def message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def conversation(row: Row, settings: Sft, where: str) -> Messages:
    """The row as messages that end with an assistant's."""
    if settings.prompt is not None and settings.completion is not None:
        question, answer = fill(settings.prompt, row, where), fill(settings.completion, row, where)
        messages = [message("user", question), message("assistant", answer)]
    else:
        messages = recognised(row, where)
    checked = all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages
    )
    if not messages or not checked:
        raise UserError(f'{where}: its messages must have a "role" and a text as "content" each; correct it')
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
        raise UserError(f"{where}: it does not end with an answer of the assistant; give it one, or leave it out")
    return messages


def recognised(row: Row, where: str) -> Messages:
    """The messages of a row in one of the usual forms."""
    match row:
        case {"messages": list(messages)}:
            return messages
        case {"conversations": list(turns)}:
            return [turn if "role" in turn else share_gpt(turn, where) for turn in turns]
        case {"prompt": list(prompt), "completion": list(completion)}:
            return [*prompt, *completion]
        case {"prompt": str(prompt), "completion": str(completion)}:
            return [message("user", prompt), message("assistant", completion)]
        case {"instruction": str(), "output": str()}:
            question, answer = (fill(template, row, where) for template in ALPACA)
            return [message("user", question), message("assistant", answer)]
    raise UserError(
        f"{where}: none of the known forms (messages; conversations; prompt and completion; instruction, input and "
        f"output); the columns are {', '.join(map(str, row))}, so set sft.prompt and sft.completion"
    )


def share_gpt(turn: Any, where: str) -> dict[str, Any]:
    """A turn {"from", "value"} as a message."""
    role = SHARE_GPT.get(str(turn.get("from"))) if isinstance(turn, dict) else None
    if role is None:
        raise UserError(f'{where}: a turn must be {{"from": "human" or "gpt", "value": "..."}}; correct it')
    return message(role, turn.get("value"))


def fill(template: str, row: Row, where: str) -> str:
    """`template` with the row's columns; a part in [[ ]] only where none of its columns is empty."""

    def optional(part: re.Match[str]) -> str:
        return part[1] if all(is_there(row, name) for name in re.findall(r"\{([\w.]+)\}", part[1])) else ""

    return filled(re.sub(r"\[\[(.*?)\]\]", optional, template, flags=re.DOTALL), row, where, "the template")


def is_there(row: Row, name: str) -> bool:
    """Whether the row has something in the column `name`: not null, NaN or empty text."""
    try:
        value = reach(row, name)
    except KeyError:
        return False
    return value != "" and not (value is None or value != value)


def joined(chats: Sequence[Messages], turns: int, seed: int) -> list[Messages]:
    """Conversations of `turns` rows each, drawn without replacement; a system prompt only where it comes first.

    The last one has fewer where the number of rows is not a multiple.
    """
    # Sorting by random() and not shuffle(): only the former's values are promised for later Pythons.
    generator = random.Random(f"{seed} turns")
    order = sorted(range(len(chats)), key=lambda _: generator.random())
    conversations = []
    for start in range(0, len(order), turns):
        first, *others = (chats[index] for index in order[start : start + turns])
        conversations.append([*first, *(m for chat in others for m in chat if m["role"] != "system")])
    return conversations


# Tokens


class Encoder:
    """Messages to tokens and labels, counting what the template leaves out."""

    def __init__(self, tokenizer: Any, settings: Sft, stop_token_ids: tuple[int, ...]):
        if settings.chat and getattr(tokenizer, "chat_template", None) is None:
            raise UserError(
                "the model's tokenizer has no chat template; set model.chat_template to a Jinja file, or sft.chat = "
                "false for plain text"
            )
        if not getattr(tokenizer, "is_fast", False):
            raise UserError("the tokenizer has no tokenizer.json, which is needed to find turns in the text; add it")
        self.tokenizer, self.settings, self.stops = tokenizer, settings, stop_token_ids
        eos = tokenizer.eos_token_id
        self.eos: int = eos if eos in stop_token_ids else stop_token_ids[0]
        self.front = leading_tokens(tokenizer)
        self.unended = self.unended_inside = 0

    def encode(self, messages: Messages, where: str) -> Example:
        """One sequence. Every answer in it is trained on up to its end token."""
        text, answers = self.rendered(messages, where) if self.settings.chat else plain(messages)
        add = not self.settings.chat and not start_with([text], self.front, self.tokenizer)[0]
        encoded = self.tokenizer(text, add_special_tokens=add, return_offsets_mapping=True, verbose=False)
        ids = list(encoded["input_ids"])
        chosen = [False] * len(ids)
        ended = True
        for begin, end in answers:
            inside = [index for index, (_, last) in enumerate(encoded["offset_mapping"]) if begin < last <= end]
            stop = next((index for index in inside if ids[index] in self.stops), None)
            ended = stop is not None
            self.unended_inside += not ended and (begin, end) != answers[-1]
            for index in inside:
                # What a template writes after the end token is never sampled.
                chosen[index] = stop is None or index <= stop
        if not ended:
            last = max(index for index, trained in enumerate(chosen) if trained)
            ids, chosen = [*ids[: last + 1], self.eos], [*chosen[: last + 1], True]
            self.unended += 1
        if not self.settings.completion_only_loss:
            chosen = [True] * len(ids)
        return Example(ids, [token if trained else IGNORED for token, trained in zip(ids, chosen, strict=True)])

    def rendered(self, messages: Messages, where: str) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as text, and where in it each answer is, what ends the turn included."""
        text = self.template(messages, where)
        answers = []
        for index, turn in enumerate(messages):
            if turn["role"] != "assistant":
                continue
            before = self.template(messages[:index], where, add_generation_prompt=True) if index else ""
            through = self.template(messages[: index + 1], where)
            if not (text.startswith(through) and through.startswith(before)):
                raise UserError(
                    f"{where}: the chat template renders an earlier answer otherwise once others follow, so that "
                    "training would not see what generation does; use one answer a conversation, or another "
                    "model.chat_template"
                )
            answers.append((len(before), len(through)))
        return text, answers

    def template(self, messages: Messages, where: str, **ending: Any) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, **ending, **self.settings.chat_template_kwargs
            )
        except Exception as error:  # a template is a program, and not ours
            raise UserError(
                f"{where}: the chat template refuses it ({described(error)}); correct the row, or set "
                "model.chat_template"
            ) from None

    def notices(self) -> list[str]:
        """What a person should know about the end of answers."""
        sentences = []
        name = self.tokenizer.convert_ids_to_tokens(self.eos)
        if self.unended and self.settings.chat:
            sentences.append(
                f"the chat template ends {self.unended} answers without an end token, from which the model would never "
                f"learn to stop; {name} is appended to them, and model.chat_template with it after each answer is the "
                "lasting remedy"
            )
        if self.unended_inside:
            sentences.append(
                f"{self.unended_inside} answers inside conversations have no end token either, and none can be added "
                "there; use one answer a conversation, or such a template"
            )
        return sentences


def plain(messages: Messages) -> tuple[str, list[tuple[int, int]]]:
    """Turns one after another, as they are, and where the answers are."""
    text, answers = "", []
    for turn in messages:
        if turn["role"] == "assistant":
            answers.append((len(text), len(text) + len(turn["content"])))
        text += turn["content"]
    return text, answers
