"""Groups of scored completions: every prompt sampled `num_generations` times, scored while others are generated.

Which tokens are sampled depends on the seeds alone: every completion has its own, made from the run's seed, the step,
the prompt and its place in the group. What is submitted never depends on when a reward returns.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field

from grpo.data import Prompt
from grpo.engine import Completion, Engine, Request, SamplingSettings
from grpo.rewards.contract import RewardBatch, RewardResult, merge_results
from grpo.rewards.pool import RewardPool

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


@dataclass
class Group:
    """A prompt and its completions, in the order of their seeds."""

    prompt: Prompt
    samples: list[Sample]


@dataclass
class Rollout:
    """One call of the sampler."""

    groups: list[Group]
    result: RewardResult
    """Scores of all completions, group after group."""
    seconds: float
    """Until the last completion was generated."""
    waited: float
    """Seconds spent waiting for rewards after that."""

    @property
    def tokens(self) -> int:
        """Sampled tokens."""
        return sum(len(sample.token_ids) for group in self.groups for sample in group.samples)


class Sampler:
    """Draws groups from an engine and has them scored by a pool."""

    def __init__(
        self,
        engine: Engine,
        pool: RewardPool,
        sampling: SamplingSettings,
        *,
        num_generations: int,
        seed: int,
        max_steps: int,
        decode: Callable[[list[int]], str],
        check: Callable[[], None] = lambda: None,
    ):
        """`check` is called while rewards are waited for, and may raise to abandon the rollout."""
        self.engine, self.pool, self.sampling, self.check = engine, pool, sampling, check
        self.num_generations, self.seed, self.max_steps = num_generations, seed, max_steps
        self.decode = decode

    def sample(self, prompts: Sequence[Prompt], step: int, round: int = 0) -> Rollout:
        """`num_generations` completions of every prompt, scored. `round` tells repeated calls of one step apart.

        Raises UserError when a reward function fails, after the running requests are aborted.
        """
        started = time.perf_counter()
        requests = self._requests(prompts, step, round)
        finished: dict[int, Completion] = {}
        futures: dict[int, Future[RewardResult]] = {}
        groups: dict[int, Group] = {}
        for completion in self.engine.generate(requests, self.sampling):
            finished[completion.request_id] = completion
            index = completion.request_id // self.num_generations
            members = range(index * self.num_generations, (index + 1) * self.num_generations)
            if all(member in finished for member in members):
                groups[index] = self._group(prompts[index], [finished[member] for member in members])
                futures[index] = self.pool.submit(self._batch(groups[index], step))
                raise_early_failures(futures.values())
        generated = time.perf_counter()
        results = [self._result(futures[index]) for index in range(len(prompts))]
        for index, result in enumerate(results):
            for name, scores in result.scores.items():
                for sample, score in zip(groups[index].samples, scores, strict=True):
                    sample.rewards[name] = score
        return Rollout(
            groups=[groups[index] for index in range(len(prompts))],
            result=merge_results(results),
            seconds=generated - started,
            waited=time.perf_counter() - generated,
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
                requests.append(Request(len(requests), prompt.token_ids, seed))
            seen[prompt.index] += 1
        return requests

    def _group(self, prompt: Prompt, completions: Sequence[Completion]) -> Group:
        samples = [
            Sample(
                token_ids=completion.token_ids,
                logprobs=completion.logprobs,
                truncated=completion.finish_reason == "length",
                text=self.decode(completion.token_ids),
            )
            for completion in completions
        ]
        return Group(prompt, samples)

    def _batch(self, group: Group, step: int) -> RewardBatch:
        count = len(group.samples)
        return RewardBatch(
            prompts=[group.prompt.prompt] * count,
            completions=[sample.text for sample in group.samples],
            completion_ids=[sample.token_ids for sample in group.samples],
            columns={name: [value] * count for name, value in group.prompt.columns.items()},
            step=step,
            max_steps=self.max_steps,
        )


def sample_seed(*parts: int) -> int:
    """A 63-bit seed that differs for different `parts`."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def raise_early_failures(futures: Iterable[Future[RewardResult]]) -> None:
    """Raise the error of a failed reward now rather than after the rest of the rollout."""
    for future in futures:
        if future.done():
            future.result()
