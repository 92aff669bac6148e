"""From conversations to token ids and labels: chat templates, the end token, the mask.

The labels are made here, before TRL sees the data, so that they do not depend on markers that few chat templates have:
an assistant's turn is what the template adds for it after the opening of an answer. Where a template does have the
markers, they decide, as in TRL. Every answer that is trained on ends with a token that ends generation; where the
template writes none, one is appended and said so.

A template may render an earlier answer otherwise once others follow, as those do that leave old thoughts out. Then each
answer is trained on in a sequence that shows it as generation does, and a conversation becomes several of them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from grpo.environments.continuation import clean, shows
from grpo.errors import UserError
from grpo.images import Image
from grpo.messages import content_texts, image_places, in_parts
from grpo.model.image_tokens import ImageTokens
from grpo.references import described
from grpo.sft.config import Sft
from grpo.sft.forms import Chat, Messages
from grpo.special_tokens import leading_tokens, start_with
from grpo.tokenizing import refuse_images

IGNORED = -100
"""The label of a token that is not trained on."""
MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""What a chat template encloses answers in that says itself what is trained on."""
Span = tuple[int, int]


@dataclass(frozen=True)
class Example:
    """A sequence to train on. `labels` is `input_ids` where a token is trained on, else -100."""

    input_ids: list[int]
    labels: list[int]
    images: tuple[Image, ...] = ()
    """In the order of their places; each is in `input_ids` with all of its tokens."""


class Encoder:
    """Conversations to tokens and labels, counting what the template leaves out."""

    def __init__(
        self,
        tokenizer: Any,
        settings: Sft,
        stop_token_ids: tuple[int, ...],
        image_tokens: ImageTokens | None = None,
    ):
        template = getattr(tokenizer, "chat_template", None)
        if settings.chat and template is None:
            raise UserError(
                "the model's tokenizer has no chat template; set model.chat_template to a Jinja file, or sft.chat = "
                "false for plain text"
            )
        if not getattr(tokenizer, "is_fast", False):
            raise UserError("the tokenizer has no tokenizer.json, which is needed to find turns in the text; add it")
        self.tokenizer, self.settings, self.stops = tokenizer, settings, stop_token_ids
        self.image_tokens = image_tokens
        eos = tokenizer.eos_token_id
        self.eos: int = eos if eos in stop_token_ids else stop_token_ids[0]
        self.front = leading_tokens(tokenizer)
        self.marked = settings.chat and isinstance(template, str) and MARKERS.search(template) is not None
        self.unended = self.unended_inside = self.split = self.pieces = 0

    def encode(self, chat: Chat) -> list[Example]:
        """One sequence, or several where the template renders an earlier answer otherwise once others follow."""
        if self.image_tokens is None:
            refuse_images([chat.images], [chat.where])
        answers = self.answers(chat)
        if not self.settings.chat:
            text, spans = plain(chat.messages)
            add = not start_with([text], self.front, self.tokenizer)[0]
            return [self.example(text, spans, answers, add_special_tokens=add)]
        sequences = list(self.sequences(chat, answers))
        if len(sequences) > 1:
            self.split, self.pieces = self.split + 1, self.pieces + len(sequences)
        examples = [
            self.example(text, spans, list(spans), marked=self.marks(chat, through) if self.marked else None)
            for through, text, spans in sequences
        ]
        seen = [chat.images[: image_places(chat.messages[:through])] for through, _, _ in sequences]
        return [self.seeing(*pair, chat.where) for pair in zip(examples, seen, strict=True)]

    def seeing(self, example: Example, images: tuple[Image, ...], where: str) -> Example:
        """`example` with the tokens of `images` in their places. Raises UserError where these do not match."""
        if self.image_tokens is None:
            return example
        try:
            ids = self.image_tokens.expand(example.input_ids, images)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        labels, sizes = [], iter([self.image_tokens.tokens(image.width, image.height) for image in images])
        for token, label in zip(example.input_ids, example.labels, strict=True):
            labels += [IGNORED] * next(sizes) if token == self.image_tokens.vision.image_token_id else [label]
        return Example(ids, labels, images)

    def answers(self, chat: Chat) -> list[int]:
        """The assistant's turns to train on. Raises UserError where there is none."""
        turns = [index for index, turn in enumerate(chat.messages) if turn["role"] == "assistant"]
        if self.settings.train_on == "last":
            turns = turns[-1:]
        chosen = [index for index in turns if chat.messages[index].get("weight", 1)]
        if not chosen:
            raise UserError(f"{chat.where}: every answer in it has the weight 0; give one 1, or leave the row out")
        return chosen

    def example(
        self,
        text: str,
        spans: dict[int, Span],
        answers: Sequence[int],
        *,
        marked: list[bool] | None = None,
        add_special_tokens: bool = False,
    ) -> Example:
        """`text` as tokens; trained on are the `spans` of `answers`, up to their end token, or what is `marked`."""
        encoded = self.tokenizer(
            text, add_special_tokens=add_special_tokens, return_offsets_mapping=True, verbose=False
        )
        ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
        chosen = [False] * len(ids)
        ended = True
        for number in answers:
            begin, end = spans[number]
            inside = [index for index, (_, last) in enumerate(offsets) if begin < last <= end]
            if marked is not None:
                inside = [index for index in inside if marked[index]]
                while inside and inside[-1] + 1 < len(ids) and marked[inside[-1] + 1]:
                    inside.append(inside[-1] + 1)
            elif inside and ids[inside[-1] + 1 : inside[-1] + 2] and ids[inside[-1] + 1] in self.stops:
                # GLM's answers end with the name of who speaks next.
                inside.append(inside[-1] + 1)
            stop = next((index for index in inside if ids[index] in self.stops), None)
            ended = stop is not None
            self.unended_inside += not ended and number != answers[-1]
            for index in inside:
                # What a template writes after the end token is never sampled.
                chosen[index] = stop is None or index <= stop or marked is not None
        if not ended and any(chosen):
            last = max(index for index, trained in enumerate(chosen) if trained)
            ids, chosen = [*ids[: last + 1], self.eos], [*chosen[: last + 1], True]
            self.unended += 1
        if not self.settings.completion_only_loss:
            chosen = [True] * len(ids)
        return Example(ids, [token if trained else IGNORED for token, trained in zip(ids, chosen, strict=True)])

    def sequences(self, chat: Chat, answers: Sequence[int]) -> Iterator[tuple[int, str, dict[int, Span]]]:
        """(messages shown, their text, where in it each answer is), for as many texts as it takes to train on all.

        Each text ends with the last answer that no later text shows as generation would leave it.
        """
        remaining, found = list(answers), []
        while remaining:
            last = remaining[-1]
            text = self.template(chat, last + 1)
            self.check_shown(chat, last, text)
            find = self.turn if self.marked else self.answer
            spans = {index: span for index in remaining if (span := find(chat, index, text, index == last))}
            found.append((last + 1, text, spans))
            remaining = [index for index in remaining if index not in spans]
        yield from reversed(found)

    def turn(self, chat: Chat, index: int, text: str, is_last: bool) -> Span:
        """Where `text` has the message `index`, its opening included; which part of it is the answer is marked."""
        begin = len(os.path.commonprefix([self.template(chat, index) if index else "", text]))
        through = text if is_last else self.template(chat, index + 1)
        return begin, len(os.path.commonprefix([text, through]))

    def answer(self, chat: Chat, index: int, text: str, is_last: bool) -> Span | None:
        """Where `text` has the answer `index`, what ends the turn included; None where it is rendered otherwise."""
        before = self.template(chat, index, add_generation_prompt=True) if index else ""
        through = text if is_last else self.template(chat, index + 1)
        if not through.startswith(before):
            raise UserError(f"{chat.where}: {self.other_opening(chat, index, before, through)}")
        # What stands at the end of every conversation, as Phi-3's last token, is no part of an earlier answer.
        end = len(os.path.commonprefix([text, through]))
        shown, alone = text[len(before) : end], through[len(before) :]
        said = answer_text(chat.messages[index])
        if end < len(before) or not text.endswith(through[end:]) or not shows(shown, said):
            if is_last:
                raise UserError(
                    f"{chat.where}: the chat template does not show the assistant's answer {said[:40]!r}; set "
                    "model.chat_template to one that does"
                )
            return None
        # gpt-oss ends an earlier answer with another token than generation does.
        return None if self.has_end(alone) and not self.has_end(shown) else (len(before), end)

    def has_end(self, text: str) -> bool:
        return any(name in text for name in self.tokenizer.convert_ids_to_tokens(list(self.stops)))

    def other_opening(self, chat: Chat, index: int, before: str, through: str) -> str:
        """What is wrong where an answer does not begin as generation opens it, and what to do."""
        place = len(os.path.commonprefix([before, through]))
        opened, shown = before[place : place + 20], through[place : place + 20]
        remedy = "set model.chat_template to one that does not, such as TRL's training templates"
        for name in ("enable_thinking", "thinking"):
            kwargs = {name: False}
            whole = self.template(chat, index + 1, **kwargs)
            if whole.startswith(self.template(chat, index, add_generation_prompt=True, **kwargs)):
                remedy = f"set sft.chat_template_kwargs = {{ {name} = false }}, or write the thoughts into the answers"
                break
        return (
            f"the chat template opens an answer for generation with {opened!r}, where the conversation has {shown!r}, "
            f"so that training would not see what generation does; {remedy}"
        )

    def check_shown(self, chat: Chat, last: int, text: str) -> None:
        """Raise UserError where the template leaves out what others than the assistant said."""
        for turn in chat.messages[:last]:
            hidden = [said for said in content_texts(turn["content"]) if not shows(text, said)]
            if turn["role"] != "assistant" and hidden:
                raise UserError(
                    f"{chat.where}: the chat template does not show the {turn['role']}'s message "
                    f"{hidden[0].strip()[:40]!r}; set model.chat_template to one that does, or leave the row out"
                )

    def marks(self, chat: Chat, count: int) -> list[bool]:
        """Which tokens of the first `count` messages the template's own markers enclose."""
        rendered = self.apply(chat, count, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return [bool(mark) for mark in rendered["assistant_masks"]]

    def template(self, chat: Chat, count: int, **ending: Any) -> str:
        """The first `count` messages as text."""
        return str(self.apply(chat, count, tokenize=False, **ending))

    def apply(self, chat: Chat, count: int, **how: Any) -> Any:
        shown = [{key: value for key, value in clean(turn).items() if key != "weight"} for turn in chat.messages]
        shown = in_parts(shown) if chat.images else shown
        settings = {**self.settings.chat_template_kwargs, **how}
        try:
            return self.tokenizer.apply_chat_template(shown[:count], tools=chat.tools, **settings)
        except Exception as error:  # a template is a program, and not ours
            raise UserError(
                f"{chat.where}: the chat template refuses it ({described(error)}); correct the row, or set "
                "model.chat_template"
            ) from None

    def notices(self) -> list[str]:
        """What a person should know about the end of answers, and about conversations that became several."""
        sentences = []
        name = self.tokenizer.convert_ids_to_tokens(self.eos)
        if self.split:
            sentences.append(
                f"the chat template renders earlier answers otherwise once others follow, so {self.split} "
                f"conversations became {self.pieces} sequences, each showing its answers as generation does"
            )
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


def answer_text(turn: dict[str, Any]) -> str:
    """What of an answer every template shows: the text after a thought, without white space around it."""
    return str(turn["content"]).rpartition("</think>")[2].strip()


def plain(messages: Messages) -> tuple[str, dict[int, Span]]:
    """Turns one after another, as they are, and where the answers are."""
    text, answers = "", {}
    for index, turn in enumerate(messages):
        if turn["role"] == "assistant":
            answers[index] = (len(text), len(text) + len(turn["content"]))
        text += turn["content"]
    return text, answers
