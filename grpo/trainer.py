"""A training run: sample groups, score them, weigh them, update the adapter, hand it to vLLM; log, save, evaluate.

All randomness is a function of the run's seed and the step, so a resumed run is the same run. The arithmetic is
elsewhere: sampling in `sampler.py`, advantages in `advantages.py`, the loss in `loss.py`, gradients in `learner.py`.
"""

from __future__ import annotations

import json
import math
import resource
import time
from pathlib import Path
from typing import Any

import torch

from grpo.advantages import Advantages, compute_advantages, reward_metrics
from grpo.checkpoint import latest, load_tensors, open_run, save, save_tensors, write_atomically
from grpo.config import Config
from grpo.data import Data, Prompt, PromptStream, keep_by_pass_rate, load_data
from grpo.evaluate import evaluate, measure_pass_rates
from grpo.learner import Learner
from grpo.log import RunLog, SampleGroup
from grpo.log import Sample as LoggedSample
from grpo.rewards.contract import merge_results
from grpo.rewards.extract import extracted_answer
from grpo.rewards.pool import RewardPool
from grpo.sampler import Group, Rollout, Sampler, sample_seed
from grpo.selftest import check_rollout_follows_adapter
from grpo.session import Session, open_session

STATE = "trainer.safetensors"
PASS_RATES = "pass_rates.json"
KEPT_QUESTIONS = 32
"""Held-out questions whose answers are kept at each evaluation, so that one can see how they change."""


class Trainer:
    """One run of one configuration, in one run folder."""

    def __init__(self, config: Config, *, resume: bool = False, verbose: bool = False):
        self.config, self.resume, self.verbose = config, resume, verbose

    def run(self) -> dict[str, Any]:
        """Train to the last step and return the summary. Raises UserError for bad input; nothing is lost then."""
        with open_run(self.config, resume=self.resume) as run:
            log = RunLog(run.path, self.config, max_steps=self.config.train.max_steps or 0, verbose=self.verbose)
            with log, open_session(self.config, status=log.status) as session:
                return train_session(session, load_data(self.config, session.tokenizer), run.path, log, self.resume)


def train_session(session: Session, data: Data, folder: Path, log: RunLog, resume: bool = False) -> dict[str, Any]:
    """Train an open `session` on `data` as its configuration says, in the run folder `folder`; returns the summary."""
    if data.dropped:
        log.notice(f"{data.dropped} prompts longer than rollout.max_prompt_length were dropped")
    log.status("checking that vLLM follows the adapter")
    check_rollout_follows_adapter(session)
    log.status("starting rewards")
    with RewardPool(data.rewards, example=data.train[0].columns) as pool:
        return Run(session.config, folder, log, session, data, pool).train(resume)


class Run:
    """The live parts of a run. `step` counts from 1; 0 is before the first."""

    def __init__(self, config: Config, folder: Path, log: RunLog, session: Session, data: Data, pool: RewardPool):
        self.config, self.folder, self.log = config, folder, log
        self.session, self.data = session, data
        self.stream = PromptStream(self.chosen_prompts(), data.settings, config.train.seed)
        self.max_steps = config.train.max_steps or math.ceil(
            config.train.num_train_epochs * len(data.train) / config.rollout.prompts_per_step
        )
        log.max_steps = self.max_steps
        self.learner = Learner(session.policy, config, max_steps=self.max_steps, notice=log.notice)
        self.weights = torch.tensor([reward.weight for reward in data.rewards], dtype=torch.float64)
        self.reward_names = [reward.column for reward in data.rewards]
        self.sampler = Sampler(
            session.engine,
            pool,
            session.sampling(config.rollout.temperature, config.rollout.max_completion_length),
            num_generations=config.rollout.num_generations,
            seed=config.train.seed,
            max_steps=self.max_steps,
            decode=session.decode,
        )
        self.step = 0
        self.best_accuracy = -1.0

    def chosen_prompts(self) -> list[Prompt]:
        """The training prompts, without those whose pass rate is outside their task's window.

        Rates are measured once a run, with the starting model, and kept in the run folder.
        """
        windows = {name: section.pass_rate for name, section in self.data.settings.items() if section.pass_rate}
        if not windows:
            return self.data.train
        file = self.folder / PASS_RATES
        measured = [prompt for prompt in self.data.train if prompt.task in windows]
        if not file.exists():
            self.log.status("measuring pass rates")
            samples = max(self.data.settings[name].pass_rate_samples for name in windows)
            found = measure_pass_rates(self.session, measured, self.data.tasks, samples)
            write_atomically(file, json.dumps(found).encode())
        rates = dict(zip((prompt.index for prompt in measured), json.loads(file.read_text()), strict=True))
        chosen = []
        for task in self.data.tasks:
            prompts = [prompt for prompt in self.data.train if prompt.task == task]
            if task in windows:
                prompts = keep_by_pass_rate(prompts, [rates[prompt.index] for prompt in prompts], windows[task])
            chosen += prompts
        self.log.notice(f"{len(chosen)} of {len(self.data.train)} prompts have a pass rate within the window")
        return chosen

    def train(self, resume: bool) -> dict[str, Any]:
        """All remaining steps; returns the summary."""
        if resume:
            self.restore()
        else:
            self.evaluate()
        while self.step < self.max_steps:
            self.step += 1
            self.log.step(self.one_step())
            last = self.step == self.max_steps
            if last or self.step % self.config.checkpoint.save_steps == 0:
                self.save()
            self.evaluate()
        return self.finish()

    def one_step(self) -> dict[str, Any]:
        """Sample, score, weigh, update, sync. Returns the step's metrics."""
        started = time.perf_counter()
        torch.manual_seed(sample_seed(self.config.train.seed, self.step))
        rollouts = self.sample()
        sampled = time.perf_counter()
        groups = [group for rollout in rollouts for group in rollout.groups]
        advantages = self.advantages(groups)
        trained = self.learner.update(*self.trained_on(groups, advantages), self.step)
        sync_seconds = self.session.engine.sync_adapter()
        now = time.perf_counter()
        if self.log.wants_samples(self.step):
            self.log.samples(self.step, [self.logged(group) for group in groups[: self.config.log.samples]])
        tokens = sum(rollout.tokens for rollout in rollouts)
        rollout_seconds = sum(rollout.seconds for rollout in rollouts)
        return {
            "step": self.step,
            **self.sampling_metrics(groups, rollouts, advantages),
            **trained,
            "epoch": self.stream.epoch,
            "tokens": tokens,
            "tokens_per_second": tokens / rollout_seconds,
            "rollout_seconds": rollout_seconds,
            "reward_seconds": sum(rollout.waited for rollout in rollouts),
            "train_seconds": now - sampled - sync_seconds,
            "sync_seconds": sync_seconds,
            "step_seconds": now - started,
            "peak_memory_gib": peak_memory_gib(self.session.base.device),
        }

    def sample(self) -> list[Rollout]:
        """One rollout or, with dynamic sampling, as many as it takes to fill the batch with unequal rewards."""
        wanted = self.config.rollout.prompts_per_step
        rounds = self.config.loss.dynamic_sampling_max_rounds if self.config.loss.dynamic_sampling else 1
        rollouts: list[Rollout] = []
        for number in range(rounds):
            rollouts.append(self.sampler.sample(self.stream.take(wanted), self.step, number))
            groups = [group for rollout in rollouts for group in rollout.groups]
            if rounds == 1 or int((~self.advantages(groups).zero_std).sum()) >= wanted:
                break
        return rollouts

    def trained_on(self, groups: list[Group], advantages: Advantages) -> tuple[list[Group], Advantages]:
        """All groups, or with dynamic sampling the first `prompts_per_step` of unequal rewards."""
        if not self.config.loss.dynamic_sampling:
            return groups, advantages
        unequal = [group for group, equal in zip(groups, advantages.zero_std, strict=True) if not equal]
        kept = unequal[: self.config.rollout.prompts_per_step] or groups[: self.config.rollout.prompts_per_step]
        return kept, self.advantages(kept)

    def advantages(self, groups: list[Group]) -> Advantages:
        return compute_advantages(self.reward_table(groups), self.weights, self.config.loss)

    def reward_table(self, groups: list[Group]) -> torch.Tensor:
        """Rewards [P, G, F] of `groups`, NaN where a function gave none."""
        rows = [
            [[as_float(sample.rewards[name]) for name in self.reward_names] for sample in group.samples]
            for group in groups
        ]
        return torch.tensor(rows, dtype=torch.float64)

    def sampling_metrics(
        self, groups: list[Group], rollouts: list[Rollout], advantages: Advantages
    ) -> dict[str, float]:
        """Rewards and lengths over all completions, before any group is dropped."""
        result = merge_results([rollout.result for rollout in rollouts])
        samples = [sample for group in groups for sample in group.samples]
        lengths = [len(sample.token_ids) for sample in samples]
        return {
            **result.metrics,
            **{f"rewards/{name}/seconds": seconds for name, seconds in result.seconds.items()},
            **reward_metrics(self.reward_table(groups), advantages, self.reward_names),
            "completion_length": sum(lengths) / len(lengths),
            "completion_length_max": max(lengths),
            "clipped_ratio": sum(sample.truncated for sample in samples) / len(samples),
            "sampling_rounds": len(rollouts),
        }

    def logged(self, group: Group) -> SampleGroup:
        """`group` as the sample log keeps it."""
        samples = [
            LoggedSample(
                text=sample.text,
                reward=self.total(sample.rewards),
                rewards=sample.rewards,
                extracted=extracted_answer(sample.text),
                tokens=len(sample.token_ids),
                finish_reason="length" if sample.truncated else "stop",
            )
            for sample in group.samples
        ]
        return SampleGroup(group.prompt.prompt, group.prompt.columns.get("answer"), samples, group.prompt.task)

    def total(self, rewards: dict[str, float | None]) -> float:
        """Weighted sum of the rewards that apply."""
        pairs = zip(self.weights.tolist(), (rewards[name] for name in self.reward_names), strict=True)
        return sum(weight * value for weight, value in pairs if value is not None)

    def evaluate(self) -> None:
        """Held-out accuracy, where `[eval]` asks for it at this step; the best adapter is kept."""
        settings = self.config.eval
        due = settings.every and (self.step % settings.every == 0 or self.step == self.max_steps)
        if not due or not self.data.eval:
            return
        self.log.status("evaluating")
        result = evaluate(self.session, self.data.eval, self.data.tasks, settings)
        self.log.evaluation(self.step, result.metrics, result.groups(KEPT_QUESTIONS))
        accuracy = result.metrics["eval/strict_accuracy"]
        if settings.keep_best and accuracy > self.best_accuracy:
            self.best_accuracy = accuracy
            self.session.policy.save_adapter(self.folder / "best_adapter")

    def save(self) -> None:
        """Write a checkpoint of this step."""

        def write(folder: Path) -> None:
            self.session.policy.save_adapter(folder / "adapter")
            state = {
                "step": self.step,
                "learner": self.learner.state_dict(),
                "stream": self.stream.state_dict(),
                "best_accuracy": self.best_accuracy,
            }
            save_tensors(folder / STATE, state)

        save(self.folder, self.step, write, self.config.checkpoint.save_total_limit)

    def restore(self) -> None:
        """Continue from the newest good checkpoint, or from the beginning if the run ended before its first."""
        folder = latest(self.folder, self.log.notice)
        if folder is None:
            self.log.notice("no checkpoint was written yet; starting again from the first step")
            self.log.resume(0)
            self.evaluate()
            return
        state = load_tensors(folder / STATE)
        self.session.policy.load_adapter(folder / "adapter")
        self.learner.load_state_dict(state["learner"])
        self.stream.load_state_dict(state["stream"])
        self.step, self.best_accuracy = state["step"], state["best_accuracy"]
        self.session.engine.sync_adapter()
        self.log.resume(self.step)

    def finish(self) -> dict[str, Any]:
        """Save the adapter where people look for it, and sum up."""
        adapter = self.folder / "adapter"
        self.session.policy.save_adapter(adapter)
        summary = {"adapter": str(adapter), "model": self.config.model.name}
        self.log.finish(summary)
        return summary


def as_float(value: float | None) -> float:
    return math.nan if value is None else float(value)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
