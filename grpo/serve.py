"""Serve a trained adapter to programs that know OpenAI's interface, on this machine.

    python -m grpo.serve runs/mine --port 8000
    OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=... python my_agent.py

Chat completions (streamed or not, with tools) and vLLM's /inference/v1/generate, by the same code that environments of
the kind `command` talk to in training. It listens on 127.0.0.1 alone; the key is printed, or taken from
GRPO_SERVE_KEY. It is no server for many users: requests that are sampled alike are computed together, others in turn.

For the exit codes see `grpo.command`.
"""

from __future__ import annotations

import argparse
import bisect
import dataclasses
import os
import queue
import random
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from grpo.command import command
from grpo.config.toml import apply_override
from grpo.environments.continuation import Continuer
from grpo.environments.endpoint import Asked, Endpoint, Refused
from grpo.environments.program import Turn
from grpo.environments.tool_calls import assistant_message
from grpo.errors import UserError
from grpo.images import Image, read_image
from grpo.messages import with_places
from grpo.references import described

if TYPE_CHECKING:
    from grpo.api.loaded_policy import LoadedPolicy
    from grpo.rollout.types import Completion

LONGEST = 8192
"""Tokens that a conversation may have, where the model takes so many."""
AT_ONCE = 16
KEY = "GRPO_SERVE_KEY"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (those of the process by default) and return its exit code."""
    parsed = parser().parse_intermixed_args(arguments)
    return command("grpo.serve", lambda: run(parsed), interrupted=lambda: None)


def parser() -> argparse.ArgumentParser:
    """The options of `python -m grpo.serve`."""
    result = argparse.ArgumentParser(
        prog="python -m grpo.serve",
        description="An OpenAI-compatible endpoint on this machine for a model and its trained adapter.",
        allow_abbrev=False,
    )
    result.add_argument(
        "model", metavar="RUN|ADAPTER|MODEL", help="a run folder; the folder of an adapter; or whatever model.name is"
    )
    result.add_argument("--port", type=int, default=8000, metavar="N", help="default 8000; 0 takes a free one")
    result.add_argument("--base", metavar="PATH", help="where the base is now, if it is not where the adapter says")
    result.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one key; several times"
    )
    result.add_argument("--verbose", action="store_true", help="let vLLM and transformers write their logs")
    return result


def run(parsed: argparse.Namespace) -> None:
    """Serve until Ctrl-C. Raises UserError."""
    from grpo.api.loaded_policy import open_policy

    if not 0 <= parsed.port < 1 << 16:
        raise UserError(f"--port {parsed.port}: a port is a number from 0 to 65535")
    tables: dict[str, Any] = {"rollout": {"max_num_seqs": AT_ONCE}}
    for override in parsed.set:
        apply_override(tables, override)
    with open_policy(
        parsed.model,
        tables,
        base=parsed.base,
        verbose=parsed.verbose,
        status=lambda text: print(text, file=sys.stderr),
        at_most=LONGEST,
        source="the command line",
        overrides=parsed.set,
    ) as policy:
        if policy.tokenizer.chat_template is None:
            raise UserError(f"{parsed.model}: the model has no chat template; set model.chat_template")
        policy.start()
        service = Service(policy)
        try:
            endpoint = Endpoint(service.answer, port=parsed.port, key=os.environ.get(KEY)).start()
        except OSError as error:
            raise UserError(f"--port {parsed.port}: {error.strerror}; take another, or 0 for a free one") from None
        print(f"OPENAI_BASE_URL={endpoint.address}/v1")
        print(f"OPENAI_API_KEY={endpoint.key}" if KEY not in os.environ else f"the key is that of {KEY}", flush=True)
        try:
            service.serve()
        finally:
            endpoint.close()


@dataclass
class Waiting:
    """A request on its way: `done` is set once there is a turn, or a reason why not."""

    asked: Asked
    done: threading.Event = field(default_factory=threading.Event)
    turn: Turn | None = None
    problem: Exception | None = None
    prompt_ids: list[int] = field(default_factory=list)
    images: list[Image] = field(default_factory=list)

    def settings(self) -> tuple[float, float]:
        """What has to be the same for requests that are computed together."""
        temperature, top_p = self.asked.temperature, self.asked.top_p
        return 1.0 if temperature is None else float(temperature), 1.0 if top_p is None else float(top_p)


class Service:
    """Answers requests with an open policy: `answer` waits in a thread of its own, `serve` computes in the main one."""

    def __init__(self, policy: LoadedPolicy):
        self.policy, self.session = policy, policy.session
        self.continuer = Continuer(
            policy.tokenizer,
            self.session.stop_token_ids,
            self.session.config.rollout.chat_template_kwargs,
            image_tokens=self.session.image_tokens,
        )
        self.max_pixels = self.session.config.model.max_pixels
        vision = self.session.base.vision
        self.media = frozenset(() if vision is None else vision.never)
        self.longest = self.session.engine.settings.max_seq_length
        self.arriving: queue.Queue[Waiting] = queue.Queue()
        self.kept: list[Waiting] = []
        self.ending = threading.Event()

    def answer(self, asked: Asked) -> Turn:
        """The turn for a request. Raises Refused where there is none."""
        waiting = Waiting(asked)
        self.arriving.put(waiting)
        while not waiting.done.wait(1.0):
            if self.ending.is_set():
                raise Refused("the server is ending", 503, "ended")
        if waiting.problem is not None:
            raise waiting.problem
        assert waiting.turn is not None
        return waiting.turn

    def serve(self) -> None:
        """Answer until `ending` is set, or Ctrl-C."""
        try:
            while not self.ending.is_set():
                self.collect(block=not self.kept)
                if self.kept:
                    self.batch(self.kept[0].settings())
        finally:
            self.ending.set()

    def collect(self, *, block: bool) -> None:
        """Take up what has arrived, with its prompt as tokens; what cannot be asked is refused."""
        try:
            while True:
                waiting = self.arriving.get(timeout=0.5) if block else self.arriving.get_nowait()
                block = False
                try:
                    waiting.prompt_ids, waiting.images = self.prompt(waiting.asked)
                    self.kept.append(waiting)
                except Refused as refusal:
                    self.end(waiting, problem=refusal)
        except queue.Empty:
            return

    def prompt(self, asked: Asked) -> tuple[list[int], list[Image]]:
        """The tokens of a request and its images. Raises Refused where the model cannot be asked that."""
        if asked.tools and (why := self.continuer.doubt_of_tools()):
            raise Refused(f"the model's chat template does not go with tools: {why}")
        images: list[Image] = []
        try:
            if asked.prompt_ids is None:
                messages, found = with_places(asked.messages or [], (), "the request")
                images = [read_image(value, "the request", max_pixels=self.max_pixels) for value in found]
                ids = self.continuer.opening(messages, asked.tools, images)
            else:
                ids = asked.prompt_ids
        except UserError as error:
            raise Refused(str(error)) from None
        except Exception as error:  # a template is a program, and not ours
            raise Refused(f"the model's chat template refuses the conversation: {described(error)}") from None
        if not ids:
            raise Refused("the model's chat template makes nothing of the conversation")
        if max(ids) >= self.session.base.config.vocab_size:
            raise Refused(f"token {max(ids)} is not the model's")
        if not images and not self.media.isdisjoint(ids):
            raise Refused("the request has a token that stands for an image, and no image; send messages that show it")
        if len(ids) >= self.longest:
            message = f"{len(ids)} tokens leave no room for an answer: a conversation may have {self.longest}"
            raise Refused(message, 400, "context_length_exceeded")
        return ids, images

    def batch(self, settings: tuple[float, float]) -> None:
        """Sample what waits with equal `settings`, and what arrives meanwhile with the same."""
        engine, number = self.session.engine, 0
        running: dict[int, Waiting] = {}
        engine.begin(self.session.sampling(settings[0], self.longest, settings[1]), random.getrandbits(62))
        with engine.ending():
            while True:
                self.collect(block=False)
                # Whoever waits longest comes first: behind one with other settings nobody is let in.
                while self.kept and self.kept[0].settings() == settings and len(running) < AT_ONCE:
                    waiting, number = self.kept.pop(0), number + 1
                    try:
                        engine.add(self.request(number, waiting))
                        running[number] = waiting
                    except Exception as error:  # one request's mistake ends none of the others
                        self.end(waiting, problem=Refused(f"the engine does not take it: {described(error)}"))
                if not running:
                    return
                for completion in engine.step():
                    waiting = running.pop(completion.request_id)
                    self.end(waiting, turn=self.turn(waiting, completion))

    def request(self, number: int, waiting: Waiting) -> Any:
        from grpo.rollout.types import Request

        asked, room = waiting.asked, self.longest - len(waiting.prompt_ids)
        seed = random.getrandbits(62) if asked.seed is None else abs(asked.seed)
        return Request(number, waiting.prompt_ids, seed, min(room, asked.max_tokens or room), waiting.images)

    def turn(self, waiting: Waiting, completion: Completion) -> Turn:
        """A finished completion as a turn, with the calls in it where tools were offered."""
        completion, text = self.cut(completion, waiting.asked.stop)
        message: dict[str, Any] = {"role": "assistant", "content": text}
        malformed: list[str] = []
        if tools := waiting.asked.tools:
            thinks = self.continuer.opens_thought(waiting.prompt_ids)
            message, malformed = assistant_message(
                text, self.continuer.form, tools, thinks=thinks, most=self.continuer.most_calls
            )
            for index, call in enumerate(message.get("tool_calls", ())):
                call["id"] = f"call{random.getrandbits(48):012x}{index:02d}"
        ids, logprobs = completion.token_ids, completion.logprobs
        return Turn(message, text, completion.finish_reason, False, malformed, waiting.prompt_ids, ids, logprobs)

    def cut(self, completion: Completion, stop: Sequence[str]) -> tuple[Completion, str]:
        """`completion` up to the token with which the first of `stop` is there, and its text before that."""
        text = self.session.decode(completion.token_ids)
        if not any(one in text for one in stop):
            return completion, text
        count = bisect.bisect_left(
            range(len(completion.token_ids)), True, key=lambda n: self.stopped(completion, n, stop)
        )
        ids, logprobs = completion.token_ids[:count], completion.logprobs[:count]
        text = text[: min(place for one in stop if (place := text.find(one)) >= 0)]
        return dataclasses.replace(completion, token_ids=ids, logprobs=logprobs, finish_reason="stop"), text

    def stopped(self, completion: Completion, count: int, stop: Sequence[str]) -> bool:
        """Whether the first `count` tokens have one of `stop` in their text."""
        text = self.session.decode(completion.token_ids[:count])
        return any(one in text for one in stop)

    @staticmethod
    def end(waiting: Waiting, turn: Turn | None = None, problem: Exception | None = None) -> None:
        waiting.turn, waiting.problem = turn, problem
        waiting.done.set()


if __name__ == "__main__":
    sys.exit(main())
