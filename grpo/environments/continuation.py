"""The tokens between two of the policy's turns, out of the model's chat template; what was sampled is never tokenised.

The conversation is rendered with a sentinel as the assistant's text, and what follows it is the continuation: the end
of the turn, the environment's messages and the opening of the next turn. At start this is proven for the template on
small conversations whose true rendering is known; a template for which it does not hold is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol

from grpo.environments.tool_calls import FORMS, HERMES, Form, read_calls
from grpo.errors import UserError
from grpo.images import Image
from grpo.messages import content_texts, image_places, in_parts
from grpo.references import described

Message = dict[str, Any]
SENTINEL = "\u2063said\u2063"
KEPT_TEXTS = 256
"""Texts whose tokens are kept: a group's members open alike, and short answers come again."""
WITH_IMAGE = " with an image"
REPLIES = ("yes", "Two lines:\n2 + 3 = 5", "<think>\nhm\n</think>\n\nyes")
"""What an assistant may have said, in the proofs."""
QUESTION, OBSERVED, OBSERVED_TOO = "What is it, and why?", "Seen 42.", "Seen 43."
ASKED: Message = {"role": "user", "content": QUESTION}
CALL: Message = {"type": "function", "id": "c12345678", "function": {"name": "look", "arguments": {"at": 1}}}
OTHER_CALL: Message = {"type": "function", "id": "c12345679", "function": {"name": "look", "arguments": {"at": 2}}}
TOOL: Message = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look.",
        "parameters": {"type": "object", "properties": {"at": {"type": "integer"}}, "required": ["at"]},
    },
}


class Unprovable(Exception):
    """Why a template's continuation is not known."""


class ImageTokens(Protocol):
    """How a model that sees images has them in its tokens; see `grpo/model/image_tokens.py`."""

    def expand(self, token_ids: Sequence[int], images: Sequence[Image]) -> list[int]:
        """`token_ids`, in which each of `images` has one placeholder, with as many as each takes. Raises UserError
        where placeholders and images differ in number."""

    def placeholders(self, token_ids: Sequence[int]) -> int:
        """How many of `token_ids` stand for an image."""


class Continuer:
    """Openings and continuations of conversations, as tokens."""

    def __init__(
        self,
        tokenizer: Any,
        end_tokens: Sequence[int],
        template_kwargs: Mapping[str, Any],
        tool_parser: str = "auto",
        image_tokens: ImageTokens | None = None,
    ):
        """`tool_parser`: the name of a form of calls, or "auto" for the one that the template writes. `image_tokens`:
        None for a model of text alone."""
        self.image_tokens = image_tokens
        self.tokenizer, self.end_tokens, self.kwargs = tokenizer, frozenset(end_tokens), dict(template_kwargs)
        self.tool_parser, self.form = tool_parser, HERMES
        self.most_calls: int | None = None
        """Calls of one turn that the template can show; None: any number."""
        self._tokens = lru_cache(maxsize=KEPT_TEXTS)(self._tokenise)
        self._doubts: dict[str, str] = {}
        self._longest_token: int | None = None

    def render(self, messages: Sequence[Message], tools: Any, *, opens: bool) -> str:
        """The conversation as text; with `opens` also the opening of the policy's turn. Raises as the template does."""
        shown = [clean(message) for message in with_parts(messages)]
        options = {"tools": tools, "tokenize": False, "add_generation_prompt": opens, **self.kwargs}
        try:
            return str(self.tokenizer.apply_chat_template(shown, **options))
        except TypeError:  # some templates want a call's arguments as the JSON text that OpenAI's are
            return str(self.tokenizer.apply_chat_template([with_text(message) for message in shown], **options))

    def tokens(self, text: str) -> list[int]:
        return list(self._tokens(text))

    def _tokenise(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    @property
    def longest_token(self) -> int:
        """Characters of the vocabulary's longest entry: a text of more than n times as many has more than n tokens."""
        if self._longest_token is None:
            self._longest_token = max(map(len, self.tokenizer.get_vocab()))
        return self._longest_token

    def opens_thought(self, prompt_ids: Sequence[int]) -> bool:
        """Whether a prompt ends within a thought, as the generation prompts of some templates do."""
        return bool(self.tokenizer.decode(prompt_ids[-8:]).rstrip().endswith("<think>"))

    def opening(self, messages: Sequence[Message], tools: Any, images: Sequence[Image] = ()) -> list[int]:
        """Tokens of a whole conversation up to where the policy speaks. `images`: of its parts, in their order.

        Raises UserError where the template does not show just these.
        """
        self.check_sees(images)
        return self.seen(self.tokens(self.render(messages, tools, opens=True)), images)

    def check_sees(self, images: Sequence[Image]) -> None:
        """Raise UserError for images that a model of text is shown."""
        if images and self.image_tokens is None:
            raise UserError("the model is read as one of text alone; set model.images = true if it sees images")

    def seen(self, ids: list[int], images: Sequence[Image]) -> list[int]:
        """`ids` with `images` in them, each as many tokens as it takes. Raises UserError."""
        return ids if self.image_tokens is None else self.image_tokens.expand(ids, images)

    def continuation(
        self,
        history: Sequence[Message],
        new: Sequence[Message],
        tools: Any,
        last_token: int,
        images: Sequence[Image] = (),
    ) -> list[int]:
        """Tokens from the last sampled one to the policy's next turn. `history` ends with the assistant's message.

        `images`: those of `new`. Raises Unprovable where the tokens are not clear, or would leave out what a message
        says or shows, and UserError where images cannot be told from what it says.
        """
        self.check_sees(images)
        for role in dict.fromkeys(message["role"] for message in new if image_places([message])):
            if why := self.doubt_of(f"{role} with an image"):
                raise Unprovable(f"a {role}'s message with an image cannot follow: {why}")
        try:
            text = self.text_after(history, new, tools)
        except Unprovable:
            raise
        except Exception:  # some templates refuse to show again what their models say, as gpt-oss's channels
            text = self.text_after(list(map(placeholder, history)), new, tools)
        for message in new:
            if not shows(text, message.get("content")):
                raise Unprovable(f"it does not show a {message['role']}'s message")
        ids = self.tokens(text)
        # The end of the turn stands once: the policy has sampled it, or was cut before it.
        if last_token in self.end_tokens:
            ids = self.without_end(ids, history, tools, last_token)
        return self.seen(ids, images)

    def without_end(self, ids: list[int], history: Sequence[Message], tools: Any, sampled: int) -> list[int]:
        """`ids` after the end of the turn, where they begin with that or with the end token that was `sampled`.

        Another end token there opens what follows, as GLM's names of roles do, and stays.
        """
        place = self.leading_end(ids)
        if place is None:
            return ids
        if ids[place] != sampled:
            alone = self.tokens(self.after_sentinel([*history[:-1], said(history[-1])], tools, opens=False))
            own = self.leading_end(alone)
            if own is None or alone[own] != ids[place]:
                return ids
        return ids[place + 1 :]

    def leading_end(self, ids: list[int]) -> int | None:
        """The place of the first end token in `ids`, where nothing but white space is before it."""
        place = next((place for place, token in enumerate(ids) if token in self.end_tokens), None)
        return place if place is not None and not self.tokenizer.decode(ids[:place]).strip() else None

    def text_after(self, history: Sequence[Message], new: Sequence[Message], tools: Any) -> str:
        """What the template writes after the assistant's last message. Raises Unprovable where that is not clear."""
        before, last = list(history[:-1]), history[-1]
        if not last.get("tool_calls"):
            return self.after_sentinel([*before, said(last), *new], tools, opens=True)
        calls = {"tool_calls": last["tool_calls"]}
        try:
            return self.after_text_and_calls(before, {**said(last), **calls}, new, tools)
        except Unprovable:
            return self.after_calls(before, without_text(last), new, tools)

    def after_text_and_calls(self, before: list[Message], called: Message, new: Sequence[Message], tools: Any) -> str:
        """What follows where calls come after the text, and both were sampled: they are dropped, the end is kept."""
        rest = self.after_sentinel([*before, called, *new], tools, opens=True)
        shown = self.after_sentinel([*before, called], tools, opens=False)
        end = self.after_sentinel([*before, said(called)], tools, opens=False)
        own = shown[: len(shown) - len(end)]
        if not shown.endswith(end) or not rest.startswith(own):
            raise Unprovable("where a turn with tool calls ends is not clear")
        return rest[len(own) :]

    def after_calls(self, before: list[Message], called: Message, new: Sequence[Message], tools: Any) -> str:
        """What follows where calls stand alone or before the text, or end a turn in a way of their own."""
        form = self.form_of_calls()
        shown = self.render([*before, called], tools, opens=False)
        whole = self.render([*before, called, *new], tools, opens=True)
        own, close, _ = shown.rpartition(form.close)
        own += close
        opening = self.render(before, tools, opens=True)
        if shown.startswith(opening):
            count = len(read_calls(own[len(opening) :], form, tools)[0])
        else:
            earlier = self.render(before, tools, opens=False)
            count = len(form.block.findall(own)) - len(form.block.findall(earlier))
        if not close or not whole.startswith(own) or count != len(called["tool_calls"]):
            raise Unprovable("where a turn with tool calls ends is not clear")
        return whole[len(own) :]

    def after_sentinel(self, messages: Sequence[Message], tools: Any, *, opens: bool) -> str:
        text = self.render(messages, tools, opens=opens)
        before, found, rest = text.partition(SENTINEL)
        if not found or SENTINEL in rest:
            raise Unprovable("it does not show the assistant's text exactly once")
        return rest

    def prove(self, *, tools: bool) -> None:
        """Raise UserError unless continuations hold for this template: after users' and, with `tools`, tools' turns.

        With `tools` it becomes known in which form the template writes calls.
        """
        for kind in ("user", "tool") if tools else ("user",):
            if why := self.doubt_of_tools() if kind == "tool" else self.doubt(kind):
                raise UserError(
                    f"the model's chat template cannot continue a conversation after a {kind}'s message: {why}; set "
                    "model.chat_template to one that can, such as TRL's training templates"
                )

    def doubt_of_tools(self) -> str:
        """Why a conversation with tools cannot be continued; "" where it can. Tried once."""
        return self.doubt_of("tool")

    def doubt_of(self, kind: str) -> str:
        """The same of turns of `kind`: a role, "tool", or a role "with an image"."""
        if kind not in self._doubts:
            self._doubts[kind] = self.doubt(kind)
        return self._doubts[kind]

    def doubt(self, kind: str) -> str:
        """Why continuations after turns of `kind` are not proven; "" where they are."""
        schemas = [TOOL] if kind.startswith("tool") else None
        if kind == "tool with an image" and (why := self.doubt_of("tool")):
            return why
        try:
            for history, new in conversations(kind):
                try:
                    self.prove_one(history, new, schemas)
                except Exception:  # what a template raises is its own
                    if len(history[-1].get("tool_calls") or ()) < 2:
                        raise
                    self.most_calls = 1
            if kind == "tool":
                self.form = self.form_of_calls()
        except Unprovable as problem:
            return str(problem)
        except Exception as error:  # a template is a program, and not ours
            return described(error)
        return ""

    def prove_one(self, history: list[Message], new: list[Message], schemas: Any) -> None:
        """Raise Unprovable where a continuation is not what the whole conversation shows."""
        rest = self.text_after(history, new, schemas)
        # Text may be shown elsewhere than before the calls, although it was said there.
        versions = [history, [*history[:-1], without_text(history[-1])]] if history[-1].get("tool_calls") else [history]
        if not rest or not any(self.render([*one, *new], schemas, opens=True).endswith(rest) for one in versions):
            raise Unprovable("what follows a turn depends on what was said in it")
        for message in new:
            if not shows(rest, message["content"]):
                raise Unprovable(f"it does not show a {message['role']}'s message")
        ids = self.tokens(rest)
        if self.tokenizer.decode(ids, skip_special_tokens=False) != rest:
            raise Unprovable("its tokens are not its text")
        if self.image_tokens is not None and self.image_tokens.placeholders(ids) != image_places(new):
            raise Unprovable(f"it does not show the image of a {new[-1]['role']}'s message just once")

    def form_of_calls(self) -> Form:
        """The form that the template writes calls in. Raises Unprovable where it shows no tools, or calls otherwise."""
        opening = self.render([ASKED], [TOOL], opens=True)
        if CALL["function"]["name"] not in opening:
            raise Unprovable("it does not show which tools there are")
        called = self.render([ASKED, {**reply("yes"), "tool_calls": [CALL]}], [TOOL], opens=False)
        texts = [called.rpartition(QUESTION)[2], *([called[len(opening) :]] if called.startswith(opening) else [])]
        for name, form in FORMS.items():
            for text in texts if self.tool_parser in ("auto", name) else ():
                if read_calls(text, form, [TOOL]) == ([CALL["function"]], []):
                    return form
        wanted = "none that is known" if self.tool_parser == "auto" else f"not {self.tool_parser}'s"
        raise Unprovable(f"the form in which it writes calls is {wanted}; known are {', '.join(FORMS)}")


def reply(text: str) -> Message:
    return {"role": "assistant", "content": text}


def said(message: Message) -> Message:
    """An assistant's `message` with the sentinel as its text, and without its calls."""
    return {"role": message["role"], "content": SENTINEL}


def placeholder(message: Message) -> Message:
    """`message` with another text, if it is an assistant's."""
    return {**message, "content": "So."} if message["role"] == "assistant" else message


def without_text(message: Message) -> Message:
    """An assistant's `message` with its calls alone."""
    return {"role": message["role"], "content": "", "tool_calls": message["tool_calls"]}


def conversations(kind: str) -> Iterator[tuple[list[Message], list[Message]]]:
    """(history that ends with the assistant, new messages) that continuations are proven on."""
    user: Message = {"role": "user", "content": "And now?"}
    if kind.endswith(WITH_IMAGE):
        yield from conversations_with_images(kind.removesuffix(WITH_IMAGE))
        return
    seen: Message = {"role": "tool", "name": "look", "tool_call_id": CALL["id"], "content": OBSERVED}
    more: Message = {**seen, "tool_call_id": OTHER_CALL["id"], "content": OBSERVED_TOO}
    for text in REPLIES:
        if kind == "user":
            yield [ASKED, reply(text)], [user]
            yield [ASKED, reply("Earlier."), user, reply(text)], [{**user, "content": "And then?"}]
            continue
        called = {**reply(text), "tool_calls": [CALL]}
        yield [ASKED, called], [seen]
        yield [ASKED, {**called, "tool_calls": [CALL, OTHER_CALL]}], [seen, more]
        yield [ASKED, called, seen, {**called, "tool_calls": [OTHER_CALL]}], [more]
        yield [ASKED, called, seen, reply(text)], [user]


def conversations_with_images(role: str) -> Iterator[tuple[list[Message], list[Message]]]:
    """The same where the new message shows an image: behind its text, before it, and alone."""
    image, text = {"type": "image"}, {"type": "text", "text": OBSERVED}
    for content in ([image, text], [text, image], [image]):
        for said_before in REPLIES:
            if role == "tool":
                called = {**reply(said_before), "tool_calls": [CALL]}
                yield [ASKED, called], [{"role": role, "name": "look", "tool_call_id": CALL["id"], "content": content}]
            else:
                yield [ASKED, reply(said_before)], [{"role": role, "content": content}]


def with_parts(messages: Sequence[Message]) -> Sequence[Message]:
    """The messages of a conversation that shows images, with those that ask it in parts, as some templates want."""
    if not image_places(messages):
        return messages
    asked = ("system", "user")  # tools' words stay texts: where a template expects one, it would write a list's
    return [in_parts([each])[0] if each["role"] in asked else each for each in messages]


def shows(text: str, content: Any) -> bool:
    """Whether a template's `text` has what a message says: as it is, or as a JSON string."""
    if isinstance(content, list):
        return all(shows(text, each) for each in content_texts(content))
    if not isinstance(content, str):
        return True
    bare = content.strip()
    escaped = (json.dumps(bare, ensure_ascii=ascii)[1:-1] for ascii in (True, False))
    return bare in text or any(form in text for form in escaped)


def clean(message: Message) -> Message:
    """`message` as templates take it: without what is None, and with arguments of calls as objects."""
    kept = {key: value for key, value in message.items() if value is not None}
    if isinstance(content := kept.get("content"), list):  # a template is not told which image it is
        kept["content"] = [{"type": "image"} if part.get("type") == "image" else part for part in content]
    if isinstance(calls := kept.get("tool_calls"), list):
        kept["tool_calls"] = [with_object(call) for call in calls]
    return kept


def with_text(message: Message) -> Message:
    """`message` with the arguments of its calls as JSON text."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    functions = [{**call["function"], "arguments": json.dumps(call["function"]["arguments"])} for call in calls]
    return {**message, "tool_calls": [{**call, "function": one} for call, one in zip(calls, functions, strict=True)]}


def with_object(call: Any) -> Any:
    """A call whose arguments are an object, where they are one as JSON text, as OpenAI's are."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call
