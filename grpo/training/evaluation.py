"""Held-out accuracy of an adapter: sampling the questions, checking the answers, and the figures of it."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from grpo.config.schema import Eval
from grpo.data import Prompt
from grpo.errors import UserError
from grpo.messages import COLUMNS
from grpo.references import described
from grpo.rewards.extract import extracted_answer
from grpo.run.samples import Sample as LoggedSample
from grpo.run.samples import SampleGroup
from grpo.tasks.common import Task, Verifier

if TYPE_CHECKING:
    from grpo.distributed.ranks import Ranks
    from grpo.rollout.episodes import EpisodePlayer
    from grpo.rollout.types import Request, SamplingSettings
    from grpo.session import Session


Z95 = 1.959963984540054
"""97.5th percentile of the normal distribution: a 95 % interval."""


EVALUATION, DIFFICULTY = -1, -2
"""In place of the step in the seeds of samples, which training counts from 1."""


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Probability that at least one of `k` samples is right, estimated without bias from `samples` >= k of them.

    1 - C(n - c, k) / C(n, k): equation 1 of Chen et al. 2021, arXiv:2107.03374. Raises ValueError for k > samples.
    """
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise ValueError(f"pass@{k} of {correct} right among {samples} samples is not defined")
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def wilson_interval(mean: float, trials: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval (JASA 22, 1927) of a share `mean` over `trials`, 95 % by default.

    For values between 0 and 1, such as a question's share of right samples, it is wider than needed: no such
    variable varies more than a yes-or-no one of the same mean. Raises ValueError for no trials.
    """
    if trials < 1 or not 0 <= mean <= 1:
        raise ValueError(f"no interval for a mean of {mean} over {trials} trials")
    scale = 1 + z * z / trials
    centre = mean + z * z / (2 * trials)
    spread = z * math.sqrt(mean * (1 - mean) / trials + (z / (2 * trials)) ** 2)
    # At the ends rounding would leave 1e-17 where the interval reaches 0 or 1 exactly.
    return (centre - spread) / scale if mean > 0 else 0.0, (centre + spread) / scale if mean < 1 else 1.0


def with_interval(name: str, values: Sequence[float]) -> dict[str, float]:
    """The mean of one value per question, each from 0 to 1, as `name`, with its interval as `name`/low and /high."""
    mean = math.fsum(values) / len(values)
    low, high = wilson_interval(min(mean, 1.0), len(values))
    return {name: mean, f"{name}/low": low, f"{name}/high": high}


@dataclass(frozen=True)
class Sample:
    """One checked completion."""

    prompt: Prompt
    member: int
    """Its number among the question's completions, from 0."""
    text: str
    tokens: int
    truncated: bool
    strict: bool
    flexible: bool
    turns: list[dict[str, Any]] | None = None
    """Of an episode, as the sample log keeps them."""

    @property
    def columns(self) -> dict[str, Any]:
        """The prompt's, with what images are known by in their place."""
        rest = {name: value for name, value in self.prompt.columns.items() if name not in COLUMNS}
        return rest | {"images": [image.digest for image in self.prompt.images]} if self.prompt.images else rest

    def entry(self) -> dict[str, Any]:
        """The sample as a row for a JSON lines file."""
        return {
            "task": self.prompt.task,
            "index": self.prompt.index,
            "member": self.member,
            "prompt": self.prompt.prompt,
            **self.columns,
            "completion": self.text,
            "strict": self.strict,
            "flexible": self.flexible,
            "tokens": self.tokens,
            "finish_reason": "length" if self.truncated else "stop",
            **({} if self.turns is None else {"turns": self.turns}),
        }

    def logged(self) -> LoggedSample:
        """The sample as the run log keeps it."""
        verdicts = {"strict": float(self.strict), "flexible": float(self.flexible)}
        return LoggedSample(
            text=self.text,
            reward=verdicts["strict"],
            rewards=verdicts,
            extracted=extracted_answer(self.text),
            tokens=self.tokens,
            finish_reason="length" if self.truncated else "stop",
            turns=self.turns,
        )


@dataclass(frozen=True)
class EvalResult:
    """What an evaluation found."""

    metrics: dict[str, float]
    """For `eval.jsonl`: see `summarise`."""
    samples: list[Sample]
    """Question after question, in the order of the prompts."""

    def groups(self, limit: int) -> list[SampleGroup]:
        """The first `limit` questions with their answers, as the run log keeps them; the strict check is the reward."""
        by_question = [list(group) for _, group in itertools.groupby(self.samples, lambda sample: sample.prompt.index)]
        return [
            SampleGroup(
                answers[0].prompt.prompt,
                answers[0].prompt.columns.get("answer"),
                [sample.logged() for sample in answers],
                answers[0].prompt.task,
                answers[0].prompt.images,
            )
            for answers in by_question[:limit]
        ]


def evaluate(
    session: Session,
    prompts: Sequence[Prompt],
    tasks: Mapping[str, Task],
    settings: Eval,
    *,
    adapter: bool = True,
    stream: int = EVALUATION,
    ranks: Ranks | None = None,
    player: EpisodePlayer | None = None,
) -> EvalResult:
    """Sample `settings.num_generations` completions of each prompt and check them.

    `adapter = False` asks the model without its adapter. Seeds are the run's seed, `stream`, the prompt and the
    sample's number: every evaluation of a run draws the same random numbers. Of several `ranks` each takes a share of
    the prompts, and all know the whole result. With a `player` each is an episode. Raises UserError when there are no
    prompts, or when a task's check fails.
    """
    if not prompts:
        raise UserError("there are no held-out questions to evaluate on; give the task some, or unset eval.every")
    started = time.perf_counter()
    local = prompts if ranks is None else prompts[ranks.rank :: ranks.size]
    samples = sample_and_check(session, local, tasks, settings, adapter=adapter, stream=stream, player=player)
    if ranks is not None:
        samples = of_all_ranks(samples, prompts, settings.num_generations, ranks)
    seconds, tokens = time.perf_counter() - started, sum(sample.tokens for sample in samples)
    timing = {"eval_seconds": seconds, "eval_tokens_per_second": tokens / seconds}
    return EvalResult(summarise(samples, settings) | timing, samples)


def of_all_ranks(local: Sequence[Sample], prompts: Sequence[Prompt], count: int, ranks: Ranks) -> list[Sample]:
    """The samples of all `prompts`, `count` of each, of which this rank has those of prompts rank, rank + size, ..."""
    checked = [[one.text, one.tokens, one.truncated, one.strict, one.flexible, one.turns] for one in local]
    groups = [checked[start : start + count] for start in range(0, len(checked), count)]
    answers = ranks.gather_indexed(
        dict(zip(range(ranks.rank, len(prompts), ranks.size), groups, strict=True)), len(prompts)
    )
    return [
        Sample(prompt, member, *values)
        for prompt, answered in zip(prompts, answers, strict=True)
        for member, values in enumerate(answered)
    ]


def sample_and_check(
    session: Session,
    prompts: Sequence[Prompt],
    tasks: Mapping[str, Task],
    settings: Eval,
    *,
    adapter: bool,
    stream: int,
    player: EpisodePlayer | None = None,
) -> list[Sample]:
    """`settings.num_generations` checked completions of each prompt."""
    # PyTorch takes seconds to import; the statistics above and --help do without.
    from grpo.rollout.sampler import sample_seed
    from grpo.rollout.types import Request

    count = settings.num_generations
    length = settings.max_completion_length or session.config.rollout.max_completion_length
    sampling = session.sampling(settings.temperature, length, settings.top_p)
    requests = [
        Request(
            number * count + member,
            prompt.token_ids,
            sample_seed(session.config.train.seed, stream, prompt.index, member),
            images=prompt.images,
        )
        for number, prompt in enumerate(prompts)
        for member in range(count)
    ]
    if player is not None:
        return play_and_check(player, requests, prompts, tasks, sampling, adapter=adapter)
    samples: list[Sample | None] = [None] * len(requests)
    for completion in session.engine.generate(requests, sampling, adapter=adapter):
        number, member = divmod(completion.request_id, count)
        prompt, text = prompts[number], session.decode(completion.token_ids)
        task = tasks[prompt.task]
        samples[completion.request_id] = Sample(
            prompt=prompt,
            member=member,
            text=text,
            tokens=len(completion.token_ids),
            truncated=completion.finish_reason == "length",
            strict=verdict(task.strict, text, prompt),
            flexible=verdict(task.flexible, text, prompt),
        )
    done = [sample for sample in samples if sample is not None]
    if len(done) != len(requests):
        raise RuntimeError(f"the engine returned {len(done)} of {len(requests)} completions")
    return done


def play_and_check(
    player: EpisodePlayer,
    requests: Sequence[Request],
    prompts: Sequence[Prompt],
    tasks: Mapping[str, Task],
    sampling: SamplingSettings,
    *,
    adapter: bool,
) -> list[Sample]:
    """An episode for each of `requests`, those of a prompt adjacent.

    An environment that gives rewards says whether an episode is a success; for tools alone the task's checks judge the
    last answer. A lost episode counts as wrong.
    """
    count = len(requests) // len(prompts)
    starts = [(one.id, player.row(prompts[one.id // count]), one.seed) for one in requests]
    samples = {}
    for episode in player.play(starts, sampling, adapter=adapter, members=count):
        prompt, text = prompts[episode.number // count], episode.text
        task, success = tasks[prompt.task], episode.success
        alone = success is None
        samples[episode.number] = Sample(
            prompt=prompt,
            member=episode.number % count,
            text=text,
            tokens=sum(sum(one.sampled) for one in episode.transcripts),
            truncated=episode.truncated,
            strict=verdict(task.strict, text, prompt) if alone else bool(success),
            flexible=verdict(task.flexible, text, prompt) if alone else bool(success),
            turns=episode.conversation,
        )
    return [samples[one.id] for one in requests]


def verdict(check: Verifier, text: str, prompt: Prompt) -> bool:
    """What a task's check says of a completion. Raises UserError naming the row when it fails."""
    try:
        return bool(check(text, prompt.row))
    except Exception as error:
        raise UserError(
            f"task {prompt.task!r}: its check failed on row {prompt.index + 1} ({described(error)}); mend the task"
        ) from error


def summarise(samples: Sequence[Sample], settings: Eval) -> dict[str, float]:
    """Metrics of checked completions, those of a question adjacent: `settings.num_generations` each.

    `eval/strict_accuracy` and `eval/flexible_accuracy` are shares of right completions (mean@k), `eval/pass@k` and
    `eval/flexible_pass@k` unbiased estimates, each with a 95 % interval over questions as /low and /high. Several
    tasks also have their own, as `eval/TASK/strict_accuracy` and so on.
    """
    by_task: dict[str, list[Sample]] = {}
    for sample in samples:
        by_task.setdefault(sample.prompt.task, []).append(sample)
    metrics = accuracies(samples, settings, "eval/")
    if len(by_task) > 1:
        for task, of_task in by_task.items():
            metrics |= accuracies(of_task, settings, f"eval/{task}/")
    metrics["eval/completion_length"] = statistics.fmean(sample.tokens for sample in samples)
    metrics["eval/clipped_ratio"] = statistics.fmean(sample.truncated for sample in samples)
    metrics["eval_prompts"] = len(samples) // settings.num_generations
    return metrics


def accuracies(samples: Sequence[Sample], settings: Eval, prefix: str) -> dict[str, float]:
    """Accuracy and pass@k, strict and flexible, of whole groups of samples."""
    count = settings.num_generations
    metrics: dict[str, float] = {}
    for kind, right in (("strict", [s.strict for s in samples]), ("flexible", [s.flexible for s in samples])):
        correct = [sum(right[start : start + count]) for start in range(0, len(right), count)]
        metrics |= with_interval(f"{prefix}{kind}_accuracy", [each / count for each in correct])
        for k in settings.pass_at:
            name = f"pass@{k}" if kind == "strict" else f"flexible_pass@{k}"
            metrics |= with_interval(f"{prefix}{name}", [pass_at_k(count, each, k) for each in correct])
    return metrics


def measure_pass_rates(
    session: Session, prompts: Sequence[Prompt], tasks: Mapping[str, Task], samples: int, ranks: Ranks | None = None
) -> list[float]:
    """Share of right answers to each prompt among `samples` of the model without its adapter.

    Sampled as in training. Right is meant flexibly: a question is not difficult because the format is new.
    """
    settings = Eval(num_generations=samples, temperature=session.config.rollout.temperature)
    result = evaluate(session, prompts, tasks, settings, adapter=False, stream=DIFFICULTY, ranks=ranks)
    right = [sample.flexible for sample in result.samples]
    return [sum(right[start : start + samples]) / samples for start in range(0, len(right), samples)]
