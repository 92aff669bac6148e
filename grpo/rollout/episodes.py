"""Episodes: the policy talks to an environment in turns, and every sampled token is kept as it was sampled.

`EpisodePlayer` lets requests join vLLM's batch as environments answer. By its deterministic schedule an answer is taken
up `latency_steps` engine steps after it was asked for, and the engine waits for a slower one: what is in a batch, and
so every token and logprob, does not depend on how long tools take. Where the first step of a turn costs the others
much, answers are gathered for it (`worth_a_join`). Groups of scored episodes are made of them in `episode_sampler.py`;
environments themselves are `grpo/environments/`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from grpo.config.schema import Environment
from grpo.data import Prompt
from grpo.environments.continuation import Continuer, Unprovable
from grpo.environments.link import as_text
from grpo.environments.pictures import Unreadable, parts_of, read_messages, sent_row, shown_prompt
from grpo.environments.pool import Asked, Ended, EnvironmentPool, Lost, Said, Scored
from grpo.environments.tool_calls import assistant_message
from grpo.errors import UserError
from grpo.images import MAX_PIXELS, Image, preview_name, read_image
from grpo.messages import content_text, content_texts, image_places, shown_text
from grpo.rollout.sampler import sample_seed
from grpo.rollout.types import Completion, Request, SamplingSettings

if TYPE_CHECKING:
    from grpo.rollout.engine import Engine

Message = dict[str, Any]
CHECK_SECONDS = 0.2
JOIN_STEPS, GRAPH_JOIN_STEPS = 12, 2
"""Decoding steps that a first step of turns costs, however many, without and with a CUDA graph: SmolLM2-135M, H200."""
CUT = "\n[cut: {} more characters]"


@dataclass
class Transcript:
    """Tokens of an episode that follow one another: a prompt, sampled turns, and what the environment said between."""

    prompt_ids: list[int]
    tokens: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """Of the sampled ones."""
    turns: list[int] = field(default_factory=list)
    """The episode's turn, from 0, that each of those belongs to."""
    routes: Any = None
    """Of all tokens that were fed until the last turn, as in `Completion`."""
    images: list[Image] = field(default_factory=list)
    """Of the prompt and of what the environment showed, in the order of their placeholders."""

    def draw(self, completion: Completion, turn: int) -> None:
        """Add a sampled turn."""
        self.turns += [turn] * len(completion.token_ids)
        self.tokens += completion.token_ids
        self.sampled += [True] * len(completion.token_ids)
        self.logprobs += completion.logprobs
        self.routes = completion.routes

    def observe(self, ids: Sequence[int], images: Sequence[Image] = ()) -> None:
        """Add what the environment said and showed; a sampled turn must follow."""
        self.tokens += ids
        self.sampled += [False] * len(ids)
        self.images += images

    @property
    def ids(self) -> list[int]:
        """All tokens."""
        return self.prompt_ids + self.tokens


@dataclass
class Thread:
    """A conversation as an episode's program has it, and its tokens."""

    messages: list[Message]
    transcript: Transcript
    request: int | None = None
    """The last one that was made for it."""


@dataclass
class Episode:
    """One episode as it goes on."""

    number: int
    seed: int
    threads: list[Thread] = field(default_factory=list)
    """One, unless its history was rewritten or it holds several conversations."""
    thread: Thread | None = None
    """The one that spoke last."""
    tools: list[Message] | None = None
    """Those that the policy was offered last."""
    prompt_messages: int = 0
    """So many opened the conversation."""
    turns: int = 0
    cut_observations: int = 0
    malformed: list[str] = field(default_factory=list)
    finish_reason: str = "stop"
    over: str = ""
    """Why no further turn fitted, if so."""
    result: Ended | Lost | None = None
    judged: bool = True
    """Whether its environment gives rewards."""
    images: dict[str, Image] = field(default_factory=dict)
    """Those that it has shown, by how its process calls them."""

    @property
    def transcripts(self) -> list[Transcript]:
        """The tokens of each conversation."""
        return [thread.transcript for thread in self.threads]

    @property
    def messages(self) -> list[Message]:
        """The conversation that was spoken in last."""
        return [] if self.thread is None else self.thread.messages

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """What was said after the prompt, as the sample log keeps it."""
        rewards = self.result.turn_rewards if isinstance(self.result, Ended) else None
        return logged_turns(self.messages[self.prompt_messages :], rewards or ())

    @property
    def text(self) -> str:
        """What the policy said last."""
        spoken = [message for message in self.messages if message["role"] == "assistant"]
        return content_text(spoken[-1]["content"]) if spoken else ""

    @property
    def success(self) -> bool | None:
        """What its environment says of it; None where that gives no rewards."""
        if isinstance(self.result, Ended):
            return self.result.success if self.judged else None
        return False

    @property
    def tokens(self) -> int:
        """Tokens after the prompts, whoever wrote them."""
        return sum(len(one.tokens) for one in self.transcripts)

    @property
    def truncated(self) -> bool:
        return bool(self.over) or self.finish_reason == "length"


class EpisodePlayer:
    """Plays episodes of one environment on one engine."""

    def __init__(
        self,
        engine: Engine,
        pool: EnvironmentPool,
        settings: Environment,
        continuer: Continuer,
        decode: Callable[[Sequence[list[int]]], list[str]],
        *,
        episode_tokens: int,
        max_seq_length: int,
        max_pixels: int = MAX_PIXELS,
        check: Callable[[], None] = lambda: None,
    ):
        """`episode_tokens`: after the prompt, for all turns and answers; larger images than of `max_pixels` are scaled
        down; `check` is called while it waits."""
        self.engine, self.pool, self.settings = engine, pool, settings
        self.continuer, self.decode, self.check = continuer, decode, check
        self.episode_tokens, self.max_seq_length, self.max_pixels = episode_tokens, max_seq_length, max_pixels
        graphs = GRAPH_JOIN_STEPS if engine.graph_tokens else JOIN_STEPS
        self.join_steps = (graphs if engine.has_graphs else 0) if settings.join_steps is None else settings.join_steps
        self.waited = 0.0

    def play(
        self,
        starts: Sequence[tuple[int, Mapping[str, Any], int]],
        sampling: SamplingSettings,
        *,
        adapter: bool = True,
        members: int = 1,
    ) -> Iterator[Episode]:
        """Episodes from `starts`, (number, row, seed) each, as they finish: in an order of the schedule's.

        So many `members` of adjacent numbers are a group; those that are scored together come last.
        """
        self.engine.begin(sampling, starts[0][2] if starts else 0, adapter=adapter, continued=True)
        self.steps, self.requests = 0, 0
        self.due = {number: 0 for number, _, _ in starts}  # whose program is to speak, and when it is taken up
        self.seen: dict[int, int] = {}  # whose program has spoken, and when; "eager" alone
        self.open = {one: Episode(one, seed, judged=bool(self.pool.facts["rewards"])) for one, _, seed in starts}
        self.asking: dict[int, Episode] = {}
        self.unscored: list[Episode] = []
        try:
            for number, row, seed in starts:
                sent, self.open[number].images = sent_row(row)
                self.pool.start(number, sent, seed)
            with self.engine.ending():
                while self.open:
                    for number in self.ready():
                        del self.due[number]
                        yield from self.admit(self.open[number], self.pool.inbox.pop(number))
                    if self.engine.running:
                        self.steps += 1
                        done = sorted(self.engine.step(), key=lambda one: one.request_id)
                        for completion, text in zip(done, self.decode([one.token_ids for one in done]), strict=True):
                            self.take(completion, text)
            yield from self.scored_together(members)
        finally:
            self.pool.sweep()
            self.pool.prepare(len(starts))

    @staticmethod
    def row(prompt: Prompt) -> dict[str, Any]:
        """What a program gets of `prompt`: its columns, and the conversation that it opens, images in their parts."""
        asked = prompt.prompt
        messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
        return {**prompt.columns, "prompt": shown_prompt(messages, prompt.images)}

    def ready(self) -> Iterator[int]:
        """The episodes whose word is taken up now, each after waiting for it where the schedule says so.

        Those before one that is waited for are taken up meanwhile, which the tokens do not depend on.
        """
        if not self.due:  # every program waits for its turn
            return
        self.pool.collect(0)
        idle = not self.engine.running
        if self.settings.schedule == "eager":
            while idle and self.due.keys().isdisjoint(self.pool.inbox):
                self.wait()
            spoken = self.due.keys() & self.pool.inbox.keys()  # without those lost while their turn is sampled
            self.seen = {number: self.seen.get(number, self.steps) for number in spoken}
            yield from sorted(self.seen) if self.worth_a_join(self.seen.values()) else ()
            return
        if idle and self.due:
            self.steps = max(self.steps, min(self.due.values()))
        due = sorted((when, number) for number, when in self.due.items() if when <= self.steps)
        if not self.worth_a_join(when for when, _ in due):
            return
        for _, number in due:
            while number not in self.pool.inbox:
                self.wait()
            yield number

    def worth_a_join(self, due: Iterable[int]) -> bool:
        """Whether answers that are due since these steps begin their turns now.

        A join holds every running turn up for `join_steps`, and the answers lose a step each by every step that they
        wait: they join when what they have lost is what the others would. That is at most twice what the best
        moments would cost, known in advance, and depends on nothing but tokens.
        """
        return sum(self.steps - when for when in due) >= self.join_steps * self.engine.running

    def wait(self) -> None:
        started = time.perf_counter()
        self.check()
        self.pool.collect(CHECK_SECONDS)
        self.waited += time.perf_counter() - started

    def admit(self, episode: Episode, said: Said) -> Iterator[Episode]:
        """Take up what an episode's program said; yields the episode if that was its end."""
        if isinstance(said, Asked):
            try:
                self.ask(episode, said)
                return
            except Unusable as problem:
                said = Lost(str(problem))
        assert isinstance(said, Ended | Lost)
        episode.result = said
        if isinstance(said, Ended):
            episode.over = episode.over or said.over
            if said.turn_rewards is not None and len(said.turn_rewards) != episode.turns:
                count = len(said.turn_rewards)
                episode.result = Lost(f"returned {count} turn_rewards for {episode.turns} turns; return one for each")
        del self.open[episode.number]
        if isinstance(said, Ended) and said.state is not None:
            self.unscored.append(episode)
        else:
            yield episode

    def scored_together(self, members: int) -> Iterator[Episode]:
        """The episodes that wait for their group, with its scores."""
        groups: dict[int, list[Episode]] = {}
        for episode in sorted(self.unscored, key=lambda one: one.number):
            groups.setdefault(episode.number // members, []).append(episode)
        for group in groups.values():
            number = -1 - group[0].number  # no episode's
            self.pool.score(number, [one.result.state for one in group])  # type: ignore[misc, union-attr]
            while number not in self.pool.inbox:
                self.wait()
            said = self.pool.inbox.pop(number)
            if isinstance(said, Scored) and len(said.results) != len(group):
                said = Lost(f"scored {len(said.results)} episodes of a group of {len(group)}")
            for index, episode in enumerate(group):
                episode.result = said.results[index] if isinstance(said, Scored) else Lost(getattr(said, "problem", ""))
                yield episode

    def ask(self, episode: Episode, asked: Asked) -> None:
        """Begin the policy's next turn, or tell the program that none fits. Raises Unusable for what cannot be."""
        if episode.turns >= self.settings.max_turns:
            return self.refuse(episode, f"all {self.settings.max_turns} turns are taken")
        try:
            messages, images = read_messages(asked.messages, episode.images, self.read_image)
            asked = replace(asked, messages=messages)
            thread, observed, shown = self.context(episode, asked, images)
        except Unreadable as problem:
            raise Unusable(str(problem)) from None
        except Unprovable as problem:
            raise Unusable(f"has a conversation that the chat template cannot continue: {problem}") from None
        except UserError as problem:
            raise Unusable(f"has a conversation that the model cannot be shown: {problem}") from None
        transcript = thread.transcript
        room = self.room(episode, transcript, len(observed))
        if room < 1:
            if not episode.turns:
                raise Unusable(f"opens with {len(transcript.prompt_ids)} tokens, which leaves no room for a turn")
            return self.refuse(episode, "there is no room for another turn")
        episode.tools = asked.tools
        episode.prompt_messages = episode.prompt_messages or len(asked.messages)
        if all(thread is not known for known in episode.threads):
            episode.threads.append(thread)
        episode.thread = thread
        transcript.observe(observed, shown)
        thread.messages = list(asked.messages)
        seed = episode.seed if episode.turns == 0 else sample_seed(episode.seed, episode.turns)
        limit = min(room, self.settings.max_turn_tokens, max(asked.max_tokens or room, 1))
        self.engine.add(Request(self.requests, transcript.ids, seed, limit, tuple(transcript.images), thread.request))
        thread.request = self.requests
        self.asking[self.requests] = episode
        self.requests += 1

    def refuse(self, episode: Episode, why: str) -> None:
        episode.over = why
        self.hand_over(episode, {"over": why})

    def hand_over(self, episode: Episode, message: dict[str, Any]) -> None:
        """Let the program go on with `message`; its next word is due later."""
        self.due[episode.number] = self.steps + self.settings.latency_steps
        self.pool.tell(episode.number, message)

    def room(self, episode: Episode, transcript: Transcript, observed: int) -> int:
        """Tokens that the next turn may have."""
        left = self.episode_tokens - episode.tokens - observed
        return min(left, self.max_seq_length - len(transcript.ids) - observed)

    def read_image(self, value: Any) -> Image:
        """An image that an episode shows. Raises UserError."""
        return read_image(value, "a message", max_pixels=self.max_pixels)

    def context(
        self, episode: Episode, asked: Asked, images: Sequence[Image]
    ) -> tuple[Thread, list[int], Sequence[Image]]:
        """The conversation that the next turn belongs to, what the environment said in it before, and what it showed.

        `images`: of the whole conversation. Raises Unusable, Unprovable, and UserError for images that do not go.
        """
        if asked.prompt_ids is not None:
            return *self.context_of_tokens(episode, asked.prompt_ids), ()
        for thread in sorted(episode.threads, key=lambda one: len(one.messages), reverse=True):
            known = thread.messages
            new = asked.messages[len(known) :]
            own = any(message["role"] == "assistant" for message in new)
            if known and new and not own and all(map(same, known, asked.messages)):
                shown = images[len(images) - image_places(new) :]
                return thread, self.observation(thread, new, asked.tools, episode, shown), shown
        return Thread([], Transcript(self.opening(asked, images), images=list(images))), [], ()

    def context_of_tokens(self, episode: Episode, ids: list[int]) -> tuple[Thread, list[int]]:
        """The same for a program that says itself which tokens it wants continued."""
        if max(ids) >= self.engine.base.config.vocab_size:
            raise Unusable(f"asks for token {max(ids)}, which the model does not have")
        media = set(() if self.engine.images is None else self.engine.images.vision.never)
        for thread in reversed(episode.threads):
            known = thread.transcript.ids
            if len(ids) > len(known) and ids[: len(known)] == known and media.isdisjoint(ids[len(known) :]):
                return thread, ids[len(known) :]
        if not media.isdisjoint(ids):
            raise Unusable("asks for a token that stands for an image, of which it gives none; send messages")
        return Thread([], Transcript(ids)), []

    def opening(self, asked: Asked, images: Sequence[Image]) -> list[int]:
        if asked.tools and (why := self.continuer.doubt_of_tools()):
            raise Unusable(f"offers tools, with which the model's chat template cannot continue a conversation: {why}")
        try:
            return self.continuer.opening(asked.messages, asked.tools, images)
        except UserError:
            raise
        except Exception as error:  # a template is a program, and not ours
            raise Unprovable(f"{type(error).__name__}: {error}") from None

    def observation(
        self, thread: Thread, new: list[Message], tools: Any, episode: Episode, images: Sequence[Image] = ()
    ) -> list[int]:
        """The tokens of `new` messages, which show `images`; texts that are too long are cut, the longest first."""
        most, last_token = self.settings.max_observation_tokens, thread.transcript.tokens[-1]
        kept = [len(content_text(message.get("content"))) for message in new]
        if max(kept) > most * self.continuer.longest_token:  # too long for sure, and long to tokenise
            kept = [min(count, most * self.continuer.longest_token) for count in kept]
            episode.cut_observations += 1
        while True:
            try:
                ids = self.continuer.continuation(thread.messages, shortened(new, kept), tools, last_token, images)
            except (Unprovable, UserError):
                raise
            except Exception as error:
                raise Unprovable(f"{type(error).__name__}: {error}") from None
            if len(ids) <= most:
                return ids
            longest = max(range(len(kept)), key=lambda index: kept[index])
            if kept[longest] == 0:
                smaller = " or lower model.max_pixels" if images else ""
                raise Unusable(
                    f"says more than environment.max_observation_tokens = {most} tokens in a turn; raise it{smaller}"
                )
            kept[longest] = int(kept[longest] * 0.9 * most / len(ids))
            episode.cut_observations += 1

    def take(self, completion: Completion, text: str) -> None:
        """A finished turn, whose tokens are `text`: keep its tokens and hand it to the program."""
        episode = self.asking.pop(completion.request_id)
        assert episode.thread is not None
        transcript = episode.thread.transcript
        prompt_ids, episode.finish_reason = transcript.ids, completion.finish_reason
        transcript.draw(completion, episode.turns)
        episode.turns += 1
        message, malformed = self.message(text, prompt_ids, episode.tools)
        episode.malformed += malformed
        for index, call in enumerate(message.get("tool_calls", ())):
            call["id"] = f"call{episode.turns:03d}{index:02d}"
        episode.thread.messages = [*episode.thread.messages, message]
        last = episode.turns >= self.settings.max_turns or self.room(episode, transcript, 0) < 1
        said = {
            "message": message,
            "text": text,
            "finish_reason": completion.finish_reason,
            "last": last,
            "malformed": malformed,
            "prompt_ids": as_text("prompt_ids", prompt_ids),
            "completion_ids": as_text("completion_ids", completion.token_ids),
            "logprobs": as_text("logprobs", completion.logprobs),
        }
        self.hand_over(episode, {"said": said})

    def message(self, text: str, prompt_ids: Sequence[int], tools: Any) -> tuple[Message, list[str]]:
        """What was said as a message, with the calls in it where `tools` were offered; and why others are none."""
        if not tools:
            return {"role": "assistant", "content": text}, []
        thinks = self.continuer.opens_thought(prompt_ids)
        return assistant_message(text, self.continuer.form, tools, thinks=thinks, most=self.continuer.most_calls)


class Unusable(Exception):
    """Why an episode cannot go on, in a clause."""


def logged_turns(messages: Sequence[Message], rewards: Sequence[float]) -> list[dict[str, Any]]:
    """`messages` as the sample log keeps them, with the `rewards` of the policy's turns, if there are any."""
    turns, left = [], list(rewards)
    for message in messages:
        sampled = message["role"] == "assistant"
        turn = {"role": message["role"], "text": shown_text(message.get("content")), "sampled": sampled}
        turn["calls"] = [call.get("function", call) for call in message.get("tool_calls") or ()]
        if seen := [part["digest"] for part in parts_of(message) if "digest" in part]:
            turn["images"] = list(map(preview_name, seen))
        if sampled and left:
            turn["reward"] = left.pop(0)
        turns.append(turn)
    return turns


def same(one: Message, other: Message) -> bool:
    """Whether two messages say the same, however their calls are written."""
    return one["role"] == other["role"] and (one.get("content") or "") == (other.get("content") or "")


def shortened(messages: list[Message], kept: Sequence[int]) -> list[Message]:
    """`messages` with only the first `kept` characters of each one's text, and a word on what is missing."""
    return [cut(message, count) for message, count in zip(messages, kept, strict=True)]


def cut(message: Message, count: int) -> Message:
    """`message` with the first `count` characters of its texts, and all its images."""
    content = message.get("content")
    texts = content_texts(content)
    more = sum(map(len, texts)) - count
    if more <= 0:
        return message
    if not isinstance(content, list):
        return {**message, "content": texts[0][:count] + CUT.format(more)}
    parts: list[Message] = []
    for part in content:
        text = content_text([part])
        if image_places([{"content": [part]}]):
            parts.append(part)
        elif count > 0:
            parts.append({"type": "text", "text": text[:count]})
            count -= len(text)
    return {**message, "content": [*parts, {"type": "text", "text": CUT.format(more)}]}
