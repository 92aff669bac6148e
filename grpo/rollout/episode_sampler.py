"""Groups of scored episodes for training: the environment's reward comes first, then those of the reward functions.

How an episode goes is `episodes.py`'s; what is trained on is what the policy sampled in it, turn after turn.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from grpo.data import Prompt
from grpo.environments.pictures import parts_of
from grpo.environments.pool import Ended, Lost
from grpo.errors import UserError
from grpo.images import preview_name
from grpo.rewards.runtime.contract import RewardResult
from grpo.rollout.episodes import Episode, EpisodePlayer, Message, Transcript, logged_turns
from grpo.rollout.sampler import Group, Sample, Sampler
from grpo.rollout.types import Request, Segment

PREVIEWS = 6
"""Images of an episode's turns that the sample log keeps small copies of: tens of milliseconds and kilobytes each."""


@dataclass
class EpisodeSample(Sample):
    """A finished episode: `token_ids` and `logprobs` are of what was sampled."""

    transcripts: list[Transcript] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    success: bool = False
    turn_rewards: list[float] | None = None
    prompt_messages: int = 0
    """So many of `messages` are the prompt."""

    @property
    def rewards_by_turn(self) -> list[float]:
        if self.turn_rewards is not None:
            return self.turn_rewards
        return [0.0] * (1 + max(self.turn_of_tokens, default=0))

    @property
    def turn_of_tokens(self) -> list[int]:
        return [turn for one in self.transcripts for turn in one.turns]

    def conversation(self) -> list[dict[str, Any]]:
        return logged_turns(self.messages[self.prompt_messages :], self.turn_rewards or ())

    def previews(self) -> dict[str, str]:
        """Of the first PREVIEWS images that its turns were shown."""
        parts = [part for message in self.messages[self.prompt_messages :] for part in parts_of(message)]
        digests = list(dict.fromkeys(part["digest"] for part in parts if "digest" in part))[:PREVIEWS]
        known = {image.digest: image for one in self.transcripts for image in one.images}
        made = {digest: known[digest].preview() for digest in digests if digest in known}
        return {preview_name(digest): base64.b64encode(data).decode() for digest, data in made.items()}

    @property
    def fed_routes(self) -> list[Any]:
        return [one.routes for one in self.transcripts]

    def segments(self, prompt: Prompt) -> list[Segment]:
        """What is trained on; prompts are the conversations' own."""
        return [Segment(one.prompt_ids, one.tokens, one.sampled, one.routes, one.images) for one in self.transcripts]


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

    def timing(self) -> dict[str, float]:
        waited, self.player.waited = self.player.waited, 0.0
        return {"environment_wait_seconds": waited}

    def _draw(self, requests: list[Request], prompts: Sequence[Prompt]) -> Iterator[tuple[int, Sample]]:
        rows = [self.player.row(prompt) for prompt in prompts]
        starts = [(one.id, rows[one.id // self.num_generations], one.seed) for one in requests]
        lost: dict[str, int] = {}
        for episode in self.player.play(starts, self.sampling, members=self.num_generations):
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
            prompt_messages=episode.prompt_messages,
        )
        out_of_turns = episode.turns >= self.player.settings.max_turns and bool(episode.over)
        sample.metrics = {
            "turns": float(episode.turns),
            "environment_tokens": float(sum(not own for _, own in drawn)),
            "cut_observations": float(episode.cut_observations),
            "malformed": float(len(episode.malformed)),
            "lost": float(isinstance(result, Lost)),
            "out_of_room": float(bool(episode.over) and not out_of_turns),
            "out_of_turns": float(out_of_turns),
            "cut_turns": float(episode.finish_reason == "length"),
        }
        if isinstance(result, Ended):
            sample.metrics |= result.metrics
            sample.success, sample.turn_rewards = result.success, result.turn_rewards
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
