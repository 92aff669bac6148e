"""Groups of scored completions: every prompt sampled `num_generations` times, scored while others are generated.

Which tokens are sampled depends on the seeds alone: every completion has its own, made from the run's seed, the step,
the prompt and its place in the group. What is submitted never depends on when a reward returns. Several ranks sample a
share of the prompts each; a group is never divided, and of the others' completions a rank learns the length, the
rewards and whether they were cut.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from grpo.data import Prompt
from grpo.distributed.ranks import Ranks, owners
from grpo.rewards.runtime.contract import RewardBatch, RewardResult
from grpo.rewards.runtime.pool import RewardPool
from grpo.rollout.types import Completion, Request, SamplingSettings, Segment

if TYPE_CHECKING:
    from grpo.rollout.engine import Engine

CHECK_SECONDS = 0.2


@dataclass
class Sample:
    """One completion: what vLLM returned, its text, and its scores once they are known (None: not applicable)."""

    token_ids: list[int]
    logprobs: list[float]
    """Of the sampled tokens under the rollout's policy, at the sampling temperature."""
    truncated: bool
    """Cut at the length limit."""
    text: str
    rewards: dict[str, float | None] = field(default_factory=dict)
    routes: Any = None
    """As in `Completion`."""

    @property
    def length(self) -> int:
        """Sampled tokens."""
        return len(self.token_ids)

    @property
    def fed_routes(self) -> list[Any]:
        """The experts of each part that is trained on, as in `Completion`."""
        return [self.routes]

    def previews(self) -> dict[str, str]:
        """What shows images that came after the prompt, by name and in base64, for the sample log."""
        return {}

    def segments(self, prompt: Prompt) -> list[Segment]:
        """What is trained on, of a sample of `prompt`."""
        return [Segment(prompt.token_ids, self.token_ids, routes=self.routes, images=prompt.images)]

    @property
    def rewards_by_turn(self) -> list[float]:
        """Of each turn, what it earned at once; what the whole earned besides counts at the end."""
        return [0.0]

    @property
    def turn_of_tokens(self) -> list[int]:
        """The turn, from 0, that each sampled token belongs to."""
        return [0] * self.length

    def conversation(self) -> list[dict[str, Any]] | None:
        """The turns of an episode, as the sample log keeps them."""
        return None

    @property
    def finite(self) -> bool:
        """Whether every logprob is a number."""
        return all(map(math.isfinite, self.logprobs))


@dataclass
class RemoteSample:
    """What is known here of a completion that another rank has."""

    length: int
    truncated: bool
    finite: bool
    rewards: dict[str, float | None]
    rewards_by_turn: list[float]


@dataclass
class Group:
    """A prompt and its completions, in the order of their seeds. Those of another rank are without tokens."""

    prompt: Prompt
    samples: Sequence[Sample | RemoteSample]

    @property
    def local(self) -> list[Sample]:
        """The completions, if they were sampled here; else none."""
        return [sample for sample in self.samples if isinstance(sample, Sample)]


@dataclass
class Rollout:
    """One call of the sampler, on every rank."""

    groups: list[Group]
    results: list[RewardResult]
    """Of each group; another rank's without extras."""
    seconds: float
    """Until the last completion was generated."""
    reward_wait_seconds: float
    """Seconds spent waiting for rewards after that."""
    wait_seconds: float = 0.0
    """Seconds, on average, that ranks waited for the slowest."""

    @property
    def tokens(self) -> int:
        """Sampled tokens."""
        return sum(sample.length for group in self.groups for sample in group.samples)


class Sampler:
    """Draws groups from an engine and has them scored by a pool."""

    def __init__(
        self,
        engine: Engine,
        pool: RewardPool | None,
        sampling: SamplingSettings,
        *,
        num_generations: int,
        seed: int,
        max_steps: int,
        decode: Callable[[list[int]], str],
        check: Callable[[], None] = lambda: None,
        ranks: Ranks | None = None,
        optimizer_steps: int = 1,
    ):
        """`check` is called while rewards are waited for, and may raise to abandon the rollout. Each of
        `optimizer_steps` has work for each of `ranks`."""
        self.engine, self.pool, self.sampling, self.check = engine, pool, sampling, check
        self.num_generations, self.seed, self.max_steps = num_generations, seed, max_steps
        self.decode, self.ranks, self.optimizer_steps = decode, ranks or Ranks(), optimizer_steps

    def sample(self, prompts: Sequence[Prompt], step: int, round: int = 0) -> Rollout:
        """`num_generations` completions of every prompt, scored. `round` tells repeated calls of one step apart.

        Raises UserError when a reward function fails, after the running requests are aborted.
        """
        started = time.perf_counter()
        owning = owners(len(prompts), self.optimizer_steps, self.ranks.size)
        indices = [index for index, rank in enumerate(owning) if rank == self.ranks.rank]
        groups, results, generated = self._sample_local(prompts, set(indices), step, round)
        seconds, reward_wait_seconds = generated - started, time.perf_counter() - generated
        if self.ranks.size > 1:
            return self._exchange(prompts, groups, results, seconds, reward_wait_seconds)
        return Rollout(
            [groups[index] for index in indices], [results[index] for index in indices], seconds, reward_wait_seconds
        )

    def _sample_local(
        self, prompts: Sequence[Prompt], indices: set[int], step: int, round: int
    ) -> tuple[dict[int, Group], dict[int, RewardResult], float]:
        """The groups at `indices` and their scores, and when the last completion was generated."""
        requests = [
            request for request in self._requests(prompts, step, round) if request.id // self.num_generations in indices
        ]
        finished: dict[int, Sample] = {}
        futures: dict[int, Future[RewardResult]] = {}
        groups: dict[int, Group] = {}
        for number, sample in self._draw(requests, prompts):
            finished[number] = sample
            index = number // self.num_generations
            members = range(index * self.num_generations, (index + 1) * self.num_generations)
            if all(member in finished for member in members):
                groups[index] = Group(prompts[index], [finished[member] for member in members])
                if self.pool is not None:
                    futures[index] = self.pool.submit(self._batch(groups[index], step))
                raise_early_failures(futures.values())
        generated = time.perf_counter()
        results = {}
        for index in sorted(indices):
            scored = self._result(futures[index]) if index in futures else RewardResult({}, {}, {}, {})
            results[index] = self._whole_result(groups[index], scored)
            for name, scores in results[index].scores.items():
                for member, score in zip(groups[index].samples, scores, strict=True):
                    member.rewards[name] = score
        return groups, results, generated

    def timing(self) -> dict[str, float]:
        """What took time in the rollouts since the last call, besides what a rollout knows."""
        return {}

    def _draw(self, requests: list[Request], prompts: Sequence[Prompt]) -> Iterator[tuple[int, Sample]]:
        """A sample for each of `requests`, with its number, as they are finished."""
        for completion in self.engine.generate(requests, self.sampling):
            yield completion.request_id, self._sample(completion)

    def _whole_result(self, group: Group, scored: RewardResult) -> RewardResult:
        """All scores of `group`, of which the reward functions gave `scored`."""
        return scored

    def _exchange(
        self,
        prompts: Sequence[Prompt],
        groups: dict[int, Group],
        results: dict[int, RewardResult],
        seconds: float,
        reward_wait_seconds: float,
    ) -> Rollout:
        """The whole rollout from this rank's part: here the ranks wait for the slowest."""
        remote = {index: as_remote(group, results[index]) for index, group in groups.items()}
        gathered = self.ranks.gather({"groups": remote, "seconds": seconds, "waited": reward_wait_seconds})
        others = {index: entry for part in gathered for index, entry in part["groups"].items()}
        for index, entry in others.items():
            if index not in groups:
                samples = [RemoteSample(**sample) for sample in entry["samples"]]
                scores = {name: [sample.rewards[name] for sample in samples] for name in entry["seconds"]}
                groups[index] = Group(prompts[index], samples)
                results[index] = RewardResult(scores, entry["metrics"], {}, entry["seconds"])
        taken = [part["seconds"] + part["waited"] for part in gathered]
        return Rollout(
            groups=[groups[index] for index in range(len(prompts))],
            results=[results[index] for index in range(len(prompts))],
            seconds=max(part["seconds"] for part in gathered),
            reward_wait_seconds=max(part["waited"] for part in gathered),
            wait_seconds=max(taken) - sum(taken) / len(taken),
        )

    def _result(self, future: Future[RewardResult]) -> RewardResult:
        while not future.done():
            self.check()
            wait([future], timeout=CHECK_SECONDS)
        return future.result()

    def _requests(self, prompts: Sequence[Prompt], step: int, round: int) -> list[Request]:
        seen: Counter[int] = Counter()
        requests: list[Request] = []
        for prompt in prompts:
            for member in range(self.num_generations):
                seed = sample_seed(self.seed, step, round, prompt.index, seen[prompt.index], member)
                requests.append(Request(len(requests), prompt.token_ids, seed, images=prompt.images))
            seen[prompt.index] += 1
        return requests

    def _sample(self, completion: Completion) -> Sample:
        return Sample(
            token_ids=completion.token_ids,
            logprobs=completion.logprobs,
            truncated=completion.finish_reason == "length",
            text=self.decode(completion.token_ids),
            routes=completion.routes,
        )

    def _batch(self, group: Group, step: int) -> RewardBatch:
        samples = group.local
        count = len(samples)
        return RewardBatch(
            prompts=[group.prompt.prompt] * count,
            completions=[sample.text for sample in samples],
            completion_ids=[sample.token_ids for sample in samples],
            columns={name: [value] * count for name, value in group.prompt.columns.items()},
            step=step,
            max_steps=self.max_steps,
        )


def as_remote(group: Group, result: RewardResult) -> dict[str, Any]:
    """What other ranks get of a scored group, as `RemoteSample` and `RewardResult` take it."""
    samples = [
        {
            "length": one.length,
            "truncated": one.truncated,
            "finite": one.finite,
            "rewards": one.rewards,
            "rewards_by_turn": one.rewards_by_turn,
        }
        for one in group.samples
    ]
    return {"samples": samples, "metrics": result.metrics, "seconds": result.seconds}


def sample_seed(*parts: int) -> int:
    """A 63-bit seed that differs for different `parts`."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def raise_early_failures(futures: Iterable[Future[RewardResult]]) -> None:
    """Raise the error of a failed reward now rather than after the rest of the rollout."""
    for future in futures:
        if future.done():
            future.result()
