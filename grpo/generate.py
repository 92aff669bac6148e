"""Ask a trained model: one prompt, or a chat, streamed to the terminal.

    python -m grpo.generate runs/gsm8k "A jar holds 4 figs. How many are in 3 jars?"
    python -m grpo.generate runs/gsm8k --compare-base            # a chat, the model without its adapter beside it
    python -m grpo.generate runs/shapes --image photo.jpg "How many circles are there?"
    echo "Once upon a time" | python -m grpo.generate Qwen/Qwen2.5-0.5B --raw

Completions are text by an untrusted model: characters that a terminal would act upon are shown as escapes.

For the exit codes see `grpo.command`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from grpo.api.episodes import environment_of, episodes_of
from grpo.command import command
from grpo.config.toml import apply_override
from grpo.errors import UserError
from grpo.images import read_image
from grpo.messages import shown_text
from grpo.printable import printable
from grpo.run.model_reference import ADAPTER, BASE

if TYPE_CHECKING:
    from grpo.api.loaded_policy import LoadedPolicy
    from grpo.tokenizing import Messages

LONGEST = 8192
"""Tokens that a chat may have, where the model takes so many."""
START_OVER = "/new"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (those of the process by default) and return its exit code."""
    parsed = parser().parse_intermixed_args(arguments)  # options may stand between model and prompt
    return command("grpo.generate", lambda: run(parsed))


def run(parsed: argparse.Namespace) -> None:
    """Answer one prompt, or chat. Raises UserError."""
    check_options(parsed)
    with opened(parsed) as policy, episodes(policy, parsed) as play:
        Talk(policy, parsed, play).run()


def parser() -> argparse.ArgumentParser:
    """The options of `python -m grpo.generate`."""
    result = argparse.ArgumentParser(
        prog="python -m grpo.generate",
        description="Ask a model, with the adapter that was trained on it. Without a prompt: a chat.",
        epilog=f"In a chat, {START_OVER} forgets what was said, Ctrl-C ends an answer, and Ctrl-D the chat.",
        allow_abbrev=False,
    )
    result.add_argument(
        "model", metavar="RUN|ADAPTER|MODEL", help="a run folder; the folder of an adapter; or whatever model.name is"
    )
    result.add_argument("prompt", nargs="?", help="what to ask; without it, read from a pipe, or asked for")
    result.add_argument("--system", metavar="TEXT", help="a system prompt")
    result.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="show it before the first question; several times"
    )
    result.add_argument("--raw", action="store_true", help="continue the prompt as it stands, without chat template")
    result.add_argument("--compare-base", action="store_true", help="answer without the adapter, too, side by side")
    result.add_argument("--environment", action="store_true", help="answer in the run's [environment], tools and all")
    result.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default): likeliest tokens")
    result.add_argument("--max-tokens", type=int, default=512, metavar="N", help="cut an answer there (default 512)")
    result.add_argument("--seed", type=int, metavar="N", help="for the same answer again, above temperature 0")
    result.add_argument("--base", metavar="PATH", help="where the base is now, if it is not where the adapter says")
    result.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one key; several times"
    )
    result.add_argument("--verbose", action="store_true", help="let vLLM and transformers write their logs")
    return result


def check_options(parsed: argparse.Namespace) -> None:
    """Raise UserError for options that exclude one another or are out of range, before anything is loaded."""
    from grpo.api.arguments import check_sampling

    if parsed.raw and parsed.system is not None:
        raise UserError("--system and --raw: a raw prompt has no system prompt; keep one of them")
    if parsed.image and parsed.raw:
        raise UserError("--image and --raw: an image needs a chat; keep one of them")
    for file in parsed.image:
        read_image(file, "--image")
    if parsed.environment and (parsed.raw or parsed.compare_base):
        other = "--raw" if parsed.raw else "--compare-base"
        raise UserError(f"--environment and {other}: an episode is a chat with the adapter; keep one of them")
    if parsed.environment:
        environment_of(parsed.model, parsed.base)
    check_sampling(parsed.temperature, parsed.max_tokens, 1.0, 1, None)


def opened(parsed: argparse.Namespace) -> LoadedPolicy:
    """The model that the command line names, with a sentence at a time on standard error. Raises UserError."""
    from grpo.api.loaded_policy import open_policy
    from grpo.run.model_reference import resolve_model

    if parsed.compare_base and resolve_model(parsed.model, parsed.base).adapter is None:
        raise UserError(f"--compare-base: {parsed.model} has no adapter, so there is nothing to compare")
    tables: dict[str, Any] = {"rollout": {"max_num_seqs": 1}}
    for override in parsed.set:
        apply_override(tables, override)
    policy = open_policy(
        parsed.model,
        tables,
        base=parsed.base,
        verbose=parsed.verbose,
        status=lambda text: print(text, file=sys.stderr),
        at_most=LONGEST,
        source="the command line",
        overrides=parsed.set,
    )
    if not parsed.raw and policy.tokenizer.chat_template is None:
        policy.close()
        raise UserError(
            f"{parsed.model}: the model has no chat template; add --raw to continue the prompt as it stands, or name "
            "a Jinja file with --set model.chat_template=FILE"
        )
    policy.start()
    return policy


def episodes(policy: LoadedPolicy, parsed: argparse.Namespace) -> contextlib.AbstractContextManager[Any]:
    """What plays an episode from a conversation, where the command line asks for the run's environment; else None."""
    if not parsed.environment:
        return contextlib.nullcontext()
    environment = environment_of(parsed.model, parsed.base)
    return episodes_of(
        policy, environment, temperature=parsed.temperature, max_tokens=parsed.max_tokens, seed=parsed.seed
    )


class Talk:
    """One prompt or a chat with an open model, on standard input and output; `play` answers with whole episodes."""

    def __init__(
        self,
        policy: LoadedPolicy,
        parsed: argparse.Namespace,
        play: Callable[[Messages], Messages] | None = None,
    ):
        self.policy, self.parsed, self.play = policy, parsed, play
        self.console = Console(highlight=False)
        self.said: Messages = []

    def run(self) -> None:
        """Answer the one prompt, or whatever is typed until the end of the input."""
        if self.parsed.prompt is not None:
            self.answer(self.parsed.prompt)
        elif not sys.stdin.isatty():
            self.answer(sys.stdin.read())
        else:
            print("Ctrl-D ends the chat" + ("" if self.parsed.raw else f", {START_OVER} starts over"), file=sys.stderr)
            for line in typed():
                self.turn(line)

    def turn(self, line: str) -> None:
        """One line of a chat. What goes wrong is printed and Ctrl-C ends the answer; both are forgotten then."""
        if line.strip() == START_OVER:
            self.said.clear()
            return
        before = list(self.said)
        try:
            self.answer(line)
        except UserError as error:
            self.said = before
            print(f"{error}; {START_OVER} starts over", file=sys.stderr)
        except KeyboardInterrupt:
            self.said = before
            print(flush=True)

    def answer(self, prompt: str) -> None:
        """Show the answer to `prompt` as it comes, and remember both unless the prompt is raw."""
        if self.parsed.raw:
            self.show(prompt)
            return
        if not self.said and self.parsed.system is not None:
            self.said.append({"role": "system", "content": self.parsed.system})
        first = not any(message["role"] == "user" for message in self.said)
        self.said.append({"role": "user", "content": with_images(prompt, self.parsed.image) if first else prompt})
        if self.play is not None:
            asked, self.said = len(self.said), self.play(self.said)
            for message in self.said[asked:]:
                print(printable(spoken(message)))
            return
        self.said.append({"role": "assistant", "content": self.show(list(self.said))})

    def show(self, asked: str | Messages) -> str:
        """Print the answer, or both answers; return the one that the chat goes on from."""
        if not self.parsed.compare_base:
            return self.printed(asked, adapter=True)
        if self.console.is_terminal:
            return self.side_by_side(asked)
        answers = []
        for label in (ADAPTER, BASE):
            print(f"--- {label}")
            answers.append(self.printed(asked, adapter=label == ADAPTER))
        return answers[0]

    def printed(self, asked: str | Messages, *, adapter: bool) -> str:
        """Print one answer piece by piece, and return it."""
        text = ""
        for piece in self.pieces(asked, adapter=adapter):
            text += piece
            print(printable(piece), end="", flush=True)
        print()
        return text

    def side_by_side(self, asked: str | Messages) -> str:
        """Show the answers with and without the adapter in two columns; return the first."""
        answers = {ADAPTER: "", BASE: ""}
        with Live(columns(answers), console=self.console, refresh_per_second=12) as live:
            for label in answers:
                for piece in self.pieces(asked, adapter=label == ADAPTER):
                    answers[label] += piece
                    live.update(columns(answers))
        return answers[ADAPTER]

    def pieces(self, asked: str | Messages, *, adapter: bool) -> Iterator[str]:
        return self.policy.generate(
            asked,
            temperature=self.parsed.temperature,
            max_tokens=self.parsed.max_tokens,
            seed=self.parsed.seed,
            adapter=adapter,
            stream=True,
        )


def with_images(prompt: str, files: Sequence[str]) -> str | list[dict[str, Any]]:
    """What a message says that shows `files` before `prompt`."""
    if not files:
        return prompt
    return [*({"type": "image", "image": file} for file in files), {"type": "text", "text": prompt}]


def spoken(message: Mapping[str, Any]) -> str:
    """A message of an episode: what the model said as it is, the environment's words after their role."""
    calls = [json.dumps(call.get("function", call), ensure_ascii=False) for call in message.get("tool_calls") or ()]
    text = "\n".join([shown_text(message.get("content")), *calls]).strip()
    return text if message["role"] == "assistant" else f"[{message['role']}] {text}"


def columns(answers: Mapping[str, str]) -> Table:
    """Answers beside one another, each under its label."""
    table = Table(*answers, expand=True)
    for column in table.columns:
        column.ratio = 1
    table.add_row(*(Text(printable(text)) for text in answers.values()))
    return table


def typed() -> Iterator[str]:
    """Lines from the keyboard, blank ones left out, until the end of the input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives `input` a history)
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        if line.strip():
            yield line


if __name__ == "__main__":
    sys.exit(main())
