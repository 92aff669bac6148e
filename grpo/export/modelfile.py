"""A Modelfile for Ollama: the GGUF file, the chat template in Ollama's language, system prompt and stop words.

Ollama does not run Jinja. Templates of known families are not guessed from a marker: each is tried, and one is taken
only where it writes whole conversations, character for character, as the model's own does. Where none does, TEMPLATE
is left out and that is said; Ollama then looks for a template that it knows in the GGUF file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, str]


@dataclass(frozen=True)
class Chat:
    """What a conversation with the exported model needs."""

    name: str
    """What to call the model."""
    tokenizer: Any = None
    """transformers'; None where the base has none."""
    template: str | None = None
    """The Jinja template."""
    system: str | None = None
    """The system prompt that the model was trained with."""
    starts_with_bos: bool = False
    """Whether llama.cpp puts the beginning-of-sequence token before a text by itself."""


@dataclass(frozen=True)
class Turns:
    """How a family of templates writes a conversation: what stands before and after each text."""

    family: str
    user: tuple[str, str]
    assistant: tuple[str, str]
    system: tuple[str, str] | None = None
    """None: the system prompt stands in the first user turn."""
    joint: str = "\n\n"
    """Between a system prompt and a question in one turn."""
    answer_starts: str = ""
    """What the model itself writes before an answer, and the Jinja template repeats in earlier ones."""

    def render(self, messages: Sequence[Message], system: str | None) -> str:
        """`messages` of user and assistant after `system`, and the beginning of an answer."""
        text, waiting = "", ""
        if system and self.system is not None:
            text = self.system[0] + system + self.system[1]
        elif system:
            waiting = system + self.joint
        for message in messages:
            if message["role"] == "user":
                text += self.user[0] + waiting + message["content"] + self.user[1]
                waiting = ""
            else:
                text += self.assistant[0] + self.answer_starts + message["content"] + self.assistant[1]
        return text + self.assistant[0]

    def ollama(self) -> str:
        """The same as a template of Ollama, which applies it to every question and answer in turn."""
        if self.system is None:
            before, within = "", "{{ if .System }}{{ .System }}" + self.joint + "{{ end }}"
        else:
            before, within = "{{ if .System }}" + "{{ .System }}".join(self.system) + "{{ end }}", ""
        question = "{{ if .Prompt }}" + self.user[0] + within + "{{ .Prompt }}" + self.user[1] + "{{ end }}"
        return before + question + self.assistant[0] + "{{ .Response }}" + self.assistant[1]


def headers(family: str, pattern: str, end: str) -> Turns:
    """A family whose turns start with the role in `pattern` and end in `end`."""
    user, assistant, system = ((pattern.format(role), end) for role in ("user", "assistant", "system"))
    return Turns(family, user, assistant, system)


KNOWN = (
    headers("ChatML", "<|im_start|>{}\n", "<|im_end|>\n"),
    headers("Phi-4", "<|im_start|>{}<|im_sep|>", "<|im_end|>"),
    headers("Llama 3", "<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>"),
    headers("Phi-3", "<|{}|>\n", "<|end|>\n"),
    headers("Phi-4-mini", "<|{}|>", "<|end|>"),
    headers("Zephyr", "<|{}|>\n", "</s>\n"),
    Turns("Gemma", ("<start_of_turn>user\n", "<end_of_turn>\n"), ("<start_of_turn>model\n", "<end_of_turn>\n")),
    Turns("Mistral", ("[INST] ", " [/INST]"), ("", "</s>"), answer_starts=" "),
    Turns("Mistral v3", ("[INST] ", "[/INST]"), ("", "</s>"), answer_starts=" "),
    Turns("Mistral Nemo", ("[INST]", "[/INST]"), ("", "</s>")),
    Turns("Mistral v7", ("[INST]", "[/INST]"), ("", "</s>"), ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")),
)
QUESTION: list[Message] = [{"role": "user", "content": "What is 2 + 2?"}]
CONVERSATION: list[Message] = [
    *QUESTION,
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "And 3 + 3?"},
]


def modelfile(file: str, chat: Chat, notice: Callable[[str], None]) -> str:
    """The Modelfile for the GGUF file `file` beside it; says what it leaves out."""
    lines = [f"# ollama create {chat.name} -f Modelfile", f"FROM ./{file}"]
    translation = translated(chat)
    if translation is None:
        notice(why_left_out(chat))
        system, stops = chat.system, end_tokens(chat)
    else:
        turns, system = translation
        lines.append(f'TEMPLATE """{turns.ollama()}"""')
        stops = [*end_tokens(chat), turns.assistant[1].strip()]
    lines += [f'PARAMETER stop "{stop}"' for stop in dict.fromkeys(stops) if stop]
    if system and '"""' not in system:
        lines.append(f'SYSTEM """{system}"""')
    elif system:
        notice('SYSTEM left out of the Modelfile: the system prompt holds """, which ends a text there')
    return "\n".join(lines) + "\n"


def why_left_out(chat: Chat) -> str:
    """Why there is no TEMPLATE."""
    if chat.template is None:
        return "the base has no chat template, so the Modelfile has no TEMPLATE: Ollama will take prompts as they are"
    families = ", ".join(turns.family for turns in KNOWN)
    return (
        f"TEMPLATE left out of the Modelfile: the chat template writes conversations like none of {families}; Ollama "
        "will look for one that it knows, write your own if it does not"
    )


def end_tokens(chat: Chat) -> list[str]:
    """Texts that end an answer, by the tokenizer."""
    token = getattr(chat.tokenizer, "eos_token", None)
    return [token] if token else []


def translated(chat: Chat) -> tuple[Turns, str | None] | None:
    """The family that writes as `chat`'s template does, and the system text that the template makes of the prompt."""
    if chat.template is None or chat.tokenizer is None:
        return None
    start = [{"role": "system", "content": chat.system}] if chat.system else []
    try:
        short, long = (rendered(chat, start + messages) for messages in (QUESTION, CONVERSATION))
    except Exception:
        # Whatever a template raises: it does not take these messages.
        return None
    for turns in KNOWN:
        system = system_text(turns, short, chat.system)
        if short == turns.render(QUESTION, system) and long == turns.render(CONVERSATION, system):
            return turns, system
    return None


def rendered(chat: Chat, messages: list[Message]) -> str:
    """What the Jinja template writes, without the token that llama.cpp puts first by itself."""
    text = chat.tokenizer.apply_chat_template(
        messages, chat_template=chat.template, tokenize=False, add_generation_prompt=True
    )
    return text.removeprefix(chat.tokenizer.bos_token or "") if chat.starts_with_bos else text


def system_text(turns: Turns, text: str, asked: str | None) -> str | None:
    """The text in the system turn that `text` starts with: what was asked for, a default, or more than that."""
    if turns.system is None:
        return asked
    before, after = turns.system
    end = text.find(after + turns.user[0])
    return text[len(before) : end] if text.startswith(before) and end >= 0 else None
