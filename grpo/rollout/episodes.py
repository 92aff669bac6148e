"""Episodes: the policy talks to an environment in turns, and every sampled token is kept as it was sampled.

`EpisodePlayer` lets requests join vLLM's batch as environments answer. By its deterministic schedule an answer is taken
up exactly `latency_steps` engine steps after it was asked for, and the engine waits for a slower one: what is in a
batch, and so every token and logprob, does not depend on how long tools take. `EpisodeSampler` makes groups of scored
episodes for training. Environments themselves are `grpo/environments/`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from grpo.config.schema import Environment
from grpo.data import Prompt
from grpo.environments.continuation import Continuer, Unprovable
from grpo.environments.pool import Asked, Ended, EnvironmentPool, Lost, Said
from grpo.environments.tool_calls import assistant_message
from grpo.errors import UserError
from grpo.rewards.runtime.contract import RewardResult
from grpo.rollout.sampler import Group, Sample, Sampler, sample_seed
from grpo.rollout.types import Completion, Request, SamplingSettings, Segment

if TYPE_CHECKING:
    from grpo.rollout.engine import Engine

Message = dict[str, Any]
CHECK_SECONDS = 0.2
CUT = "\n[cut: {} more characters]"


@dataclass
class Transcript:
    """Tokens of an episode that follow one another: a prompt, sampled turns, and what the environment said between."""

    prompt_ids: list[int]
    tokens: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """Of the sampled ones."""

    def draw(self, completion: Completion) -> None:
        """Add a sampled turn."""
        self.tokens += completion.token_ids
        self.sampled += [True] * len(completion.token_ids)
        self.logprobs += completion.logprobs

    def observe(self, ids: Sequence[int]) -> None:
        """Add what the environment said; a sampled turn must follow."""
        self.tokens += ids
        self.sampled += [False] * len(ids)

    @property
    def ids(self) -> list[int]:
        """All tokens."""
        return self.prompt_ids + self.tokens


@dataclass
class Episode:
    """One episode as it goes on. `messages`: the conversation as its program has it."""

    number: int
    seed: int
    transcripts: list[Transcript] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    turns: int = 0
    cut_observations: int = 0
    malformed: list[str] = field(default_factory=list)
    finish_reason: str = "stop"
    over: str = ""
    """Why no further turn fitted, if so."""
    result: Ended | Lost | None = None
    judged: bool = True
    """Whether its environment gives rewards."""

    @property
    def text(self) -> str:
        """What the policy said last."""
        spoken = [message for message in self.messages if message["role"] == "assistant"]
        return str(spoken[-1]["content"]) if spoken else ""

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


@dataclass
class EpisodeSample(Sample):
    """A finished episode: `token_ids` and `logprobs` are of what was sampled."""

    transcripts: list[Transcript] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    success: bool = False

    def segments(self, prompt_ids: Sequence[int]) -> list[Segment]:
        """What is trained on; the prompt is the conversation's own."""
        return [Segment(one.prompt_ids, one.tokens, one.sampled) for one in self.transcripts]


class EpisodePlayer:
    """Plays episodes of one environment on one engine."""

    def __init__(
        self,
        engine: Engine,
        pool: EnvironmentPool,
        settings: Environment,
        continuer: Continuer,
        decode: Callable[[list[int]], str],
        *,
        episode_tokens: int,
        max_seq_length: int,
        check: Callable[[], None] = lambda: None,
    ):
        """`episode_tokens`: after the prompt, for all turns and answers; `check` is called while it waits."""
        self.engine, self.pool, self.settings = engine, pool, settings
        self.continuer, self.decode, self.check = continuer, decode, check
        self.episode_tokens, self.max_seq_length = episode_tokens, max_seq_length
        self.waited = 0.0

    def play(
        self, starts: Sequence[tuple[int, Mapping[str, Any], int]], sampling: SamplingSettings, *, adapter: bool = True
    ) -> Iterator[Episode]:
        """Episodes from `starts`, (number, row, seed) each, as they finish: in an order of the schedule's."""
        self.engine.begin(sampling, starts[0][2] if starts else 0, adapter=adapter)
        self.steps, self.waited, self.requests = 0, 0.0, 0
        self.due = {number: 0 for number, _, _ in starts}  # whose program is to speak, and when it is taken up
        judged = bool(self.pool.facts["rewards"])
        self.open = {number: Episode(number, seed, judged=judged) for number, _, seed in starts}
        self.asking: dict[int, Episode] = {}
        try:
            for number, row, seed in starts:
                self.pool.start(number, row, seed)
            with self.engine.ending():
                while self.open:
                    for number in self.ready():
                        del self.due[number]
                        yield from self.admit(self.open[number], self.pool.inbox.pop(number))
                    if self.engine.running:
                        self.steps += 1
                        for completion in sorted(self.engine.step(), key=lambda one: one.request_id):
                            self.take(completion)
        finally:
            self.pool.sweep()

    @staticmethod
    def row(prompt: Prompt) -> dict[str, Any]:
        """What a program gets of `prompt`: its columns, and the conversation that it opens."""
        asked = prompt.prompt
        return {
            **prompt.columns,
            "prompt": [{"role": "user", "content": asked}] if isinstance(asked, str) else asked,
        }

    def ready(self) -> list[int]:
        """The episodes whose word is taken up now, after waiting for it where the schedule says so."""
        self.pool.collect(0)
        idle = not self.engine.running
        if self.settings.schedule == "eager":
            while idle and not self.pool.inbox:
                self.wait()
            return sorted(self.pool.inbox)
        if idle and self.due:
            self.steps = max(self.steps, min(self.due.values()))
        wanted = sorted((when, number) for number, when in self.due.items() if when <= self.steps)
        while any(number not in self.pool.inbox for _, number in wanted):
            self.wait()
        return [number for _, number in wanted]

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
        episode.result = said
        if isinstance(said, Ended):
            episode.over = episode.over or said.over
        del self.open[episode.number]
        yield episode

    def ask(self, episode: Episode, asked: Asked) -> None:
        """Begin the policy's next turn, or tell the program that none fits. Raises Unusable for what cannot be."""
        if episode.turns >= self.settings.max_turns:
            return self.refuse(episode, f"all {self.settings.max_turns} turns are taken")
        try:
            transcript, observed = self.context(episode, asked)
        except Unprovable as problem:
            raise Unusable(f"has a conversation that the chat template cannot continue: {problem}") from None
        room = self.room(episode, transcript, len(observed))
        if room < 1:
            if not episode.turns:
                raise Unusable(f"opens with {len(transcript.prompt_ids)} tokens, which leaves no room for a turn")
            return self.refuse(episode, "there is no room for another turn")
        if not episode.transcripts or transcript is not episode.transcripts[-1]:
            episode.transcripts.append(transcript)
        transcript.observe(observed)
        episode.messages = list(asked.messages)
        seed = episode.seed if episode.turns == 0 else sample_seed(episode.seed, episode.turns)
        limit = min(room, self.settings.max_turn_tokens, asked.max_tokens or room)
        self.engine.add(Request(self.requests, transcript.ids, seed, limit))
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

    def context(self, episode: Episode, asked: Asked) -> tuple[Transcript, list[int]]:
        """The transcript that the next turn belongs to, and what the environment said before it."""
        known = episode.messages
        new = asked.messages[len(known) :]
        extends = known and new and all(map(same, known, asked.messages))
        if not extends or any(message["role"] == "assistant" for message in new):
            return Transcript(self.opening(asked)), []
        transcript = episode.transcripts[-1]
        return transcript, self.observation(episode, new, asked.tools, transcript.tokens[-1])

    def opening(self, asked: Asked) -> list[int]:
        try:
            return self.continuer.opening(asked.messages, asked.tools)
        except Exception as error:  # a template is a program, and not ours
            raise Unprovable(f"{type(error).__name__}: {error}") from None

    def observation(self, episode: Episode, new: list[Message], tools: Any, last_token: int) -> list[int]:
        """The tokens of `new` messages; too long ones are cut, the longest first."""
        most = self.settings.max_observation_tokens
        kept = [len(str(message.get("content") or "")) for message in new]
        while True:
            try:
                ids = self.continuer.continuation(episode.messages, shortened(new, kept), tools, last_token)
            except Unprovable:
                raise
            except Exception as error:
                raise Unprovable(f"{type(error).__name__}: {error}") from None
            if len(ids) <= most:
                return ids
            longest = max(range(len(kept)), key=lambda place: kept[place])
            if kept[longest] == 0:
                raise Unusable(f"says more than environment.max_observation_tokens = {most} tokens in a turn")
            kept[longest] = int(kept[longest] * 0.9 * most / len(ids))
            episode.cut_observations += 1

    def take(self, completion: Completion) -> None:
        """A finished turn: keep its tokens and hand it to the program."""
        episode = self.asking.pop(completion.request_id)
        transcript = episode.transcripts[-1]
        prompt_ids = transcript.ids
        transcript.draw(completion)
        episode.turns += 1
        episode.finish_reason = completion.finish_reason
        text = self.decode(completion.token_ids)
        message, malformed = assistant_message(text)
        episode.malformed += malformed
        for place, call in enumerate(message.get("tool_calls", ())):
            call["id"] = f"call{episode.turns:03d}{place:02d}"
        episode.messages = [*episode.messages, message]
        last = episode.turns >= self.settings.max_turns or self.room(episode, transcript, 0) < 1
        said = {
            "message": message,
            "text": text,
            "finish_reason": completion.finish_reason,
            "last": last,
            "malformed": malformed,
            "prompt_ids": prompt_ids,
            "completion_ids": completion.token_ids,
            "logprobs": completion.logprobs,
        }
        self.hand_over(episode, {"said": said})


class Unusable(Exception):
    """Why an episode cannot go on, in a clause."""


def same(one: Message, other: Message) -> bool:
    """Whether two messages say the same, however their calls are written."""
    return one["role"] == other["role"] and (one.get("content") or "") == (other.get("content") or "")


def shortened(messages: list[Message], kept: Sequence[int]) -> list[Message]:
    """`messages` with only the first `kept` characters of each text, and a word on what is missing."""
    texts = [str(message.get("content") or "") for message in messages]
    return [
        message if count >= len(text) else {**message, "content": text[:count] + CUT.format(len(text) - count)}
        for message, text, count in zip(messages, texts, kept, strict=True)
    ]


class EpisodeSampler(Sampler):
    """Draws groups of episodes. The environment's reward comes first, then those of the reward functions."""

    def __init__(self, *arguments: Any, player: EpisodePlayer, notice: Callable[[str], None], **named: Any):
        """`player` plays on the sampler's engine; the other arguments are `Sampler`'s, whose pool may be None."""
        super().__init__(*arguments, **named)
        self.player, self.notice = player, notice
        self.scores = bool(player.pool.facts["rewards"])

    @property
    def column(self) -> str:
        return self.player.settings.column

    def _draw(self, requests: list[Request], prompts: Sequence[Prompt]) -> Iterator[tuple[int, Sample]]:
        rows = [self.player.row(prompt) for prompt in prompts]
        starts = [(one.id, rows[one.id // self.num_generations], one.seed) for one in requests]
        lost: dict[str, int] = {}
        for episode in self.player.play(starts, self.sampling):
            if isinstance(episode.result, Lost):
                self._lost(episode.result, lost)
            yield episode.number, self.finished(episode)
        for problem, count in lost.items():
            self.notice(f"environment {self.column!r}: {count} of {len(starts)} episodes are left out: it {problem}")
        if starts and sum(lost.values()) == len(starts):
            raise UserError(f"environment {self.column!r}: every episode of a step failed, the last: it {problem}")

    def _lost(self, result: Lost, lost: dict[str, int]) -> None:
        """Count an episode that was lost. Raises UserError where the run is to stop for it."""
        for line in result.traceback.splitlines() if result.problem not in lost else ():
            self.player.pool.on_output(line)
        lost[result.problem] = lost.get(result.problem, 0) + 1
        if self.player.settings.on_error == "stop":
            raise UserError(
                f'environment {self.column!r} {result.problem}; mend it, or set environment.on_error = "mask" to leave '
                "such episodes out"
            )

    def finished(self, episode: Episode) -> EpisodeSample:
        """`episode` as a member of its group; of a lost one nothing is trained on."""
        result = episode.result
        transcripts = episode.transcripts if isinstance(result, Ended) else []
        drawn = [(token, own) for one in transcripts for token, own in zip(one.tokens, one.sampled, strict=True)]
        sample = EpisodeSample(
            token_ids=[token for token, own in drawn if own],
            logprobs=[logprob for one in transcripts for logprob in one.logprobs],
            truncated=episode.truncated,
            text=episode.text,
            transcripts=transcripts,
            messages=episode.messages,
        )
        sample.metrics = {
            "turns": float(episode.turns),
            "environment_tokens": float(sum(not own for _, own in drawn)),
            "cut_observations": float(episode.cut_observations),
            "malformed": float(len(episode.malformed)),
            "lost": float(isinstance(result, Lost)),
            "out_of_room": float(bool(episode.over)),
        }
        if isinstance(result, Ended):
            sample.metrics |= result.metrics
            sample.success = result.success
            sample.rewards = {self.column: result.reward} if self.scores else {}
        elif self.scores:
            sample.rewards = {self.column: None}
        return sample

    def _whole_result(self, group: Group, scored: RewardResult) -> RewardResult:
        """`scored` with the environment's own reward and figures; a lost episode has no scores."""
        samples = [sample for sample in group.samples if isinstance(sample, EpisodeSample)]
        scores = {self.column: [one.rewards[self.column] for one in samples]} if self.scores else {}
        scores |= {
            name: [value if one.length else None for one, value in zip(samples, values, strict=True)]
            for name, values in scored.scores.items()
        }
        seconds = {self.column: 0.0} if self.scores else {}
        return replace(
            scored,
            scores=scores,
            metrics={**scored.metrics, **means(samples)},
            seconds=seconds | scored.seconds,
        )


def means(samples: Sequence[EpisodeSample]) -> dict[str, float]:
    """The mean of each figure over the episodes that have it, as `environment/NAME`."""
    names = dict.fromkeys(name for sample in samples for name in sample.metrics)
    found = {name: [one.metrics[name] for one in samples if name in one.metrics] for name in names}
    result = {f"environment/{name}": math.fsum(values) / len(values) for name, values in found.items()}
    return result | {"environment/success": math.fsum(one.success for one in samples) / len(samples)}
