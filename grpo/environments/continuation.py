"""The tokens between two of the policy's turns, out of the model's chat template; what was sampled is never tokenised.

The conversation is rendered with a sentinel as the assistant's text, and what follows it is the continuation: the end
of the turn, the environment's messages and the opening of the next turn. At start this is proven for the template on
small conversations whose true rendering is known; a template for which it does not hold is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from grpo.environments.tool_calls import read_calls
from grpo.errors import UserError
from grpo.references import described

Message = dict[str, Any]
SENTINEL = "\u2063said\u2063"
REPLIES = ("yes", "Two lines:\n2 + 3 = 5", "<think>\nhm\n</think>\n\nyes")
"""What an assistant may have said, in the proofs."""
QUESTION, OBSERVED = "What is it, and why?", "Seen 42."
CALL: Message = {"type": "function", "id": "c12345678", "function": {"name": "look", "arguments": {"at": 1}}}
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


class Continuer:
    """Openings and continuations of conversations, as tokens."""

    def __init__(self, tokenizer: Any, end_tokens: Sequence[int], template_kwargs: Mapping[str, Any]):
        self.tokenizer, self.end_tokens, self.kwargs = tokenizer, frozenset(end_tokens), dict(template_kwargs)

    def render(self, messages: Sequence[Message], tools: Any, *, opens: bool) -> str:
        """The conversation as text; with `opens` also the opening of the policy's turn. Raises as the template does."""
        text = self.tokenizer.apply_chat_template(
            list(messages), tools=tools, tokenize=False, add_generation_prompt=opens, **self.kwargs
        )
        return str(text)

    def tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def opening(self, messages: Sequence[Message], tools: Any) -> list[int]:
        """Tokens of a whole conversation up to where the policy speaks."""
        return self.tokens(self.render(messages, tools, opens=True))

    def continuation(
        self, history: Sequence[Message], new: Sequence[Message], tools: Any, last_token: int
    ) -> list[int]:
        """Tokens from the last sampled one to the policy's next turn. `history` ends with the assistant's message."""
        ids = self.tokens(self.text_after(history, new, tools))
        # The end of the turn stands once: the policy has sampled it, or was cut before it.
        return self.without_end(ids) if last_token in self.end_tokens else ids

    def without_end(self, ids: list[int]) -> list[int]:
        """`ids` after their first end token, where nothing but white space is before it."""
        for place, token in enumerate(ids):
            if token in self.end_tokens:
                blank = not self.tokenizer.decode(ids[:place]).strip()
                return ids[place + 1 :] if blank else ids
        return ids

    def text_after(self, history: Sequence[Message], new: Sequence[Message], tools: Any) -> str:
        """What the template writes after the assistant's last message. Raises Unprovable where that is not clear."""
        last = {key: value for key, value in history[-1].items() if key in ("role", "tool_calls")}
        said = {**last, "content": SENTINEL}
        rest = self.after_sentinel([*history[:-1], said, *new], tools, opens=True)
        if "tool_calls" in said:
            # The calls come after the text, and were sampled: they are dropped, the turn's end is kept.
            with_calls = self.after_sentinel([*history[:-1], said], tools, opens=False)
            end = self.after_sentinel([*history[:-1], {**said, "tool_calls": None}], tools, opens=False)
            calls = with_calls[: len(with_calls) - len(end)]
            if not with_calls.endswith(end) or not rest.startswith(calls):
                raise Unprovable("where a turn with tool calls ends is not clear")
            rest = rest[len(calls) :]
        return rest

    def after_sentinel(self, messages: Sequence[Message], tools: Any, *, opens: bool) -> str:
        text = self.render([clean(message) for message in messages], tools, opens=opens)
        before, found, rest = text.partition(SENTINEL)
        if not found or SENTINEL in rest:
            raise Unprovable("it does not show the assistant's text exactly once")
        return rest

    def prove(self, *, tools: bool) -> None:
        """Raise UserError unless continuations hold for this template: after users' and, with `tools`, tools' turns."""
        wanted: list[tuple[str, list[Message]]] = [("user", [{"role": "user", "content": "And now?"}])]
        if tools:
            wanted.append(("tool", [{"role": "tool", "name": "look", "tool_call_id": CALL["id"], "content": OBSERVED}]))
        for kind, new in wanted:
            for reply in REPLIES:
                try:
                    self.prove_one(kind, new, reply)
                except Unprovable as problem:
                    why = str(problem)
                except Exception as error:  # a template is a program, and not ours
                    why = described(error)
                else:
                    continue
                raise UserError(
                    f"the model's chat template cannot continue a conversation after a {kind}'s message: {why}; set "
                    "model.chat_template to one that can, such as TRL's training templates"
                )

    def prove_one(self, kind: str, new: list[Message], reply: str) -> None:
        """Raise Unprovable where a continuation is not what the whole conversation shows."""
        schemas = [TOOL] if kind == "tool" else None
        said: Message = {"role": "assistant", "content": reply}
        if kind == "tool":
            said["tool_calls"] = [CALL]
        history = [{"role": "user", "content": QUESTION}, said]
        rest = self.text_after(history, new, schemas)
        whole = self.render([*history, *new], schemas, opens=True)
        if not rest or not whole.endswith(rest):
            raise Unprovable("what follows a turn depends on what was said in it")
        if new[0]["content"] not in rest:
            raise Unprovable(f"it does not show a {kind}'s message")
        if kind == "tool":
            self.prove_calls(history, schemas)
        if self.tokenizer.decode(self.tokens(rest), skip_special_tokens=False) != rest:
            raise Unprovable("its tokens are not its text")

    def prove_calls(self, history: list[Message], schemas: Any) -> None:
        """Raise Unprovable where the template shows no tools, or calls in a form that is not read."""
        if CALL["function"]["name"] not in self.render(history[:1], schemas, opens=True):
            raise Unprovable("it does not show which tools there are")
        shown = self.render(history, schemas, opens=False).rpartition(QUESTION)[2]
        if read_calls(shown)[0] != [CALL["function"]]:
            raise Unprovable("it writes calls in another form than JSON between <tool_call> and </tool_call>")


def clean(message: Message) -> Message:
    """`message` without what is None."""
    return {key: value for key, value in message.items() if value is not None}
