"""A training run: sample groups, score them, weigh them, update the adapter, hand it to vLLM; log, save, evaluate.

All randomness is a function of the run's seed and the step, so a resumed run is the same run. Several ranks, each with
a model and a vLLM of its own, make one run: all know the rewards and have the same adapter and optimiser, the first
writes. The arithmetic is elsewhere: sampling in `sampler.py`, advantages in `advantages.py`, the loss in `loss.py`,
gradients in `learner.py`, what ranks exchange in `ranks.py`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo.data import Data, Prompt, PromptStream
from grpo.distributed.ranks import Ranks
from grpo.environments.pool import EnvironmentPool
from grpo.errors import UserError
from grpo.model.expert_sizes import expert_sizes
from grpo.monitor.log import TrainingLog
from grpo.policy.adapter_survival import adapter_survival
from grpo.references import described
from grpo.rewards.runtime.pool import RewardPool
from grpo.rollout.episode_sampler import EpisodeSampler
from grpo.rollout.sampler import Group, Rollout, sample_seed
from grpo.run.checkpoint import latest, replace_folder, save, step_numbers
from grpo.run.records import EVALUATIONS, read_entries
from grpo.run.tensor_state import load_tensors, save_tensors
from grpo.session import Session
from grpo.training.dump import dump_folder, gather_batch, write_dump
from grpo.training.environment import make_sampler, own_rewards
from grpo.training.evaluation import evaluate
from grpo.training.learner import UNMEASURED, Learner
from grpo.training.peak_memory import PeakMemory
from grpo.training.reference_policy import set_reference
from grpo.training.rollout_memory import sample_within_memory
from grpo.training.step_metrics import ScoredGroups, expert_metrics, logged, reward_table, sampling_metrics
from grpo.training.update_check import SkippedUpdate
from grpo.training.weight_optimizer import WeightOptimizer

STATE = "trainer.safetensors"
KEPT_QUESTIONS = 32
"""Held-out questions whose answers are kept at each evaluation, so that one can see how they change."""


@dataclass(frozen=True)
class Parts:
    """What a run is made of, all of it open; whoever opened it closes it."""

    folder: Path
    """The run folder."""
    log: TrainingLog
    session: Session
    """With its configuration."""
    data: Data
    rewards: RewardPool | None = None
    """None where an environment gives all rewards."""
    environment: EnvironmentPool | None = None
    ranks: Ranks = field(default_factory=Ranks)
    check: Callable[[], None] = lambda: None
    """Called often while nothing is half done; may raise to end the run."""


class Trainer:
    """The steps of a run on its open `parts`. `step` is the last whole one; they count from 1.

    A step happens or does not: what raises within one leaves the adapter, the optimiser and the place in the data as
    they were before it, until the adapter has moved; from then on `step_complete` is false until the step is recorded.
    """

    def __init__(self, parts: Parts, prompts: Sequence[Prompt]):
        """`prompts`: those to train on, of `parts.data`. Nothing is computed, sampled or written yet."""
        self.folder, self.log, self.session, self.data = parts.folder, parts.log, parts.session, parts.data
        self.ranks, self.config = parts.ranks, parts.session.config
        config = self.config
        self.stream = PromptStream(prompts, self.data.settings, config.train.seed)
        self.max_steps = config.train.max_steps or math.ceil(
            config.train.num_train_epochs * len(self.data.train) / config.rollout.prompts_per_step
        )
        self.learner = Learner(
            self.session.policy,
            config,
            max_steps=self.max_steps,
            notice=self.log.notice,
            check=parts.check,
            ranks=self.ranks,
        )
        environment_rewards = own_rewards(config, parts.environment)
        self.weights = torch.tensor(
            [1.0] * len(environment_rewards) + [one.weight for one in self.data.rewards], dtype=torch.float64
        )
        self.reward_names = environment_rewards + [reward.column for reward in self.data.rewards]
        self.sampler = make_sampler(
            self.session,
            parts.rewards,
            parts.environment,
            max_steps=self.max_steps,
            check=parts.check,
            ranks=self.ranks,
            notice=self.log.notice,
        )
        self.peak = PeakMemory(self.session.base.device)
        self.step = self.saved = 0
        self.step_complete = True
        self.accuracies: dict[int, float] = {}

    def train(self, *, resume: bool = False) -> dict[str, Any]:
        """All remaining steps; returns the summary. Whatever ends them early leaves a checkpoint of the last one."""
        self.log.max_steps = self.max_steps
        set_reference(self.session.policy, self.config.loss, self.folder, resume=resume, ranks=self.ranks)
        if resume:
            self.restore()
        if self.session.base.device.type == "cuda":
            self.log.status("trying the largest micro-batch")
            self.peak.note()
            self.learner.probe_memory()
            self.peak.note(self.session.engine.released_bytes())
        try:
            self.evaluate()
            while self.step < self.max_steps:
                self.log.step(self.one_step(self.step + 1))
                self.step, self.step_complete = self.step + 1, True
                last = self.step == self.max_steps
                if last or self.step % self.config.checkpoint.save_steps == 0:
                    self.save()
                self.evaluate()
        except BaseException:
            self.save_what_is_not()
            raise
        return self.finish()

    def one_step(self, step: int) -> dict[str, Any]:
        """Sample, score, weigh, update, sync. Returns the step's metrics."""
        started = time.perf_counter()
        self.ranks.bytes_sent = 0
        torch.manual_seed(sample_seed(self.config.train.seed, step, *self.seed_suffix()))
        taken = self.stream.taken.copy()
        try:
            rollouts, scored = sample_within_memory(lambda: self.sample(step), self.stream, self.session, self.ranks)
            self.peak.note()
            self.session.engine.release_kv_cache()
            sampled = time.perf_counter()
            trained = self.update(self.trained_on(scored), step)
        except BaseException:
            self.stream.taken = taken
            raise
        self.peak.note(self.session.engine.released_bytes())
        self.step_complete = False
        sync_seconds = self.session.engine.sync_adapter()
        now = time.perf_counter()
        survival = self.survival(scored.groups, step)
        if self.log.wants_samples(step):
            weights = dict(zip(self.reward_names, self.weights.tolist(), strict=True))
            self.log.samples(step, logged(scored.groups[: self.config.log.samples], weights, self.ranks))
        tokens = sum(rollout.tokens for rollout in rollouts)
        rollout_seconds = sum(rollout.seconds for rollout in rollouts)
        return {
            "step": step,
            **sampling_metrics(scored, rollouts, self.reward_names),
            **trained,
            **survival,
            **self.expert_metrics(scored.groups),
            **self.image_metrics(),
            "epoch": self.stream.epoch,
            "tokens": tokens,
            "tokens_per_second": tokens / rollout_seconds,
            "rollout_seconds": rollout_seconds,
            "reward_seconds": sum(rollout.reward_wait_seconds for rollout in rollouts),
            "train_seconds": now - sampled - sync_seconds,
            "sync_seconds": sync_seconds,
            "step_seconds": now - started,
            "peak_memory_gib": self.peak.gib(),
            **self.rank_metrics(rollouts),
        }

    def image_metrics(self) -> dict[str, float]:
        """How many images went through the tower since the last step, and how long that took."""
        tower = self.session.policy.tower
        return {} if tower is None else tower.take_counts()

    def survival(self, groups: list[Group], step: int) -> dict[str, float]:
        """Now and then, how much of what is trained shows in 16 bit: of the weights' change, or of the adapter's effect
        on completions of different prompts."""
        every = self.config.log.adapter_survival_every
        if not self.ranks.first or every is None or (step > 1 and step % every):
            return {}
        if isinstance(optimizer := self.learner.optimizer, WeightOptimizer):
            changed = optimizer.survival()
            return {} if changed is None else {"weight_survival": changed}
        turns = zip_longest(*([one.segments(group.prompt) for one in group.local] for group in groups))
        firsts = [segments[0] for turn in turns for segments in turn if segments]  # one of each group, then another
        share = adapter_survival(
            self.session.policy,
            [one.prompt_ids for one in firsts],
            [one.token_ids for one in firsts],
            [one.images for one in firsts],
        )
        return {} if share is None else {"adapter_survival": share}

    def expert_metrics(self, groups: list[Group]) -> dict[str, float]:
        """Of a mixture of experts, how the step's completions used them."""
        sizes = expert_sizes(self.session.base.config)
        return {} if sizes is None else expert_metrics(groups, sizes.experts, self.ranks)

    def seed_suffix(self) -> tuple[int, ...]:
        """What tells this rank's random numbers from those of the first, which are a lone process's."""
        return () if self.ranks.first else (self.ranks.rank,)

    def rank_metrics(self, rollouts: list[Rollout]) -> dict[str, float]:
        """Of several ranks: what one sent in this step, and how long they waited for the slowest on average."""
        if self.ranks.size == 1:
            return {}
        wait_seconds = sum(rollout.wait_seconds for rollout in rollouts)
        return {"ranks": self.ranks.size, "sent_bytes": self.ranks.bytes_sent, "idle_seconds": wait_seconds}

    def update(self, scored: ScoredGroups, step: int) -> dict[str, float | None]:
        """Train on `scored`; returns the training metrics, also of an update that had to be left out.

        Raises UserError when the configuration says that the run is to stop for it.
        """
        update_check = self.learner.update_check
        try:
            update_check.check_sampled(scored.groups, scored.advantages)
            return {**self.learner.update(scored.groups, scored.advantages, step), "update_skipped": 0.0}
        except SkippedUpdate as skipped:
            dump = self.dump(step, skipped)
            message = f"step {step}: {skipped.problem}; python -m grpo.replay {dump} says where that begins"
            if update_check.ends_run():
                raise UserError(
                    f"{message}; {update_check.skipped} such steps in a row end the run: lower train.learning_rate, or "
                    "mend what it shows, and continue with --resume"
                ) from None
            self.log.notice(f"{message}; the update was left out")
            return {**UNMEASURED, **skipped.figures, "update_skipped": 1.0}

    def dump(self, step: int, skipped: SkippedUpdate) -> Path:
        """Keep what it takes to compute the update again; returns where."""
        skipped.batch = gather_batch(skipped.batch, self.ranks)
        if not self.ranks.first:
            return dump_folder(self.folder, step)
        return write_dump(self.folder, step, self.config, self.session.policy, skipped)

    def sample(self, step: int) -> tuple[list[Rollout], ScoredGroups]:
        """One rollout or, with dynamic sampling, as many as it takes to fill the batch with unequal rewards."""
        wanted = self.config.rollout.prompts_per_step
        rounds = self.config.loss.dynamic_sampling_max_rounds if self.config.loss.dynamic_sampling else 1
        rollouts: list[Rollout] = []
        tables: list[Tensor] = []
        for number in range(rounds):
            rollouts.append(self.sampler.sample(self.stream.take(wanted), step, number))
            tables.append(reward_table(rollouts[-1].groups, self.reward_names))
            scored = self.scored([group for rollout in rollouts for group in rollout.groups], torch.cat(tables))
            if len(scored.unequal) >= wanted:
                break
        return rollouts, scored

    def trained_on(self, scored: ScoredGroups) -> ScoredGroups:
        """All groups, or with dynamic sampling the first `prompts_per_step` of unequal rewards."""
        if not self.config.loss.dynamic_sampling:
            return scored
        selected = (scored.unequal or list(range(len(scored.groups))))[: self.config.rollout.prompts_per_step]
        return self.scored([scored.groups[index] for index in selected], scored.rewards[selected])

    def scored(self, groups: list[Group], rewards: Tensor) -> ScoredGroups:
        """`groups` with their `rewards` [P, G, F]."""
        return ScoredGroups.of(groups, rewards, self.weights, self.config.loss)

    def evaluate(self) -> None:
        """Held-out accuracy, where `[eval]` asks for it at this step; the best adapter is kept."""
        settings = self.config.eval
        due = settings.every and (self.step % settings.every == 0 or self.step == self.max_steps)
        if not due or not self.data.eval or self.step in self.accuracies:
            return
        self.log.status("evaluating")
        player = self.sampler.player if isinstance(self.sampler, EpisodeSampler) else None
        result = evaluate(self.session, self.data.eval, self.data.tasks, settings, ranks=self.ranks, player=player)
        accuracy = result.metrics["eval/strict_accuracy"]
        if self.ranks.first and settings.keep_best and accuracy > max(self.accuracies.values(), default=-1.0):
            # Before it is recorded: a run that dies in between does it again.
            policy = self.session.policy
            replace_folder(self.folder / f"best_{policy.artefact}", policy.save)
        self.log.evaluation(self.step, result.metrics, result.groups(KEPT_QUESTIONS))
        self.accuracies[self.step] = accuracy

    def save(self) -> None:
        """Write a checkpoint of this step. Raises UserError where the disk refuses, and for a ruined adapter."""
        if not self.ranks.first:
            self.saved = self.step
            return
        if not self.learner.is_finite():
            raise UserError(
                f"step {self.step}: the {self.session.policy.artefact} has values that are not finite, and is not "
                "saved; continue from the checkpoint before with --resume and a lower train.learning_rate"
            )

        def write(folder: Path) -> None:
            policy = self.session.policy
            (folder / policy.artefact).mkdir(exist_ok=True)
            policy.save(folder / policy.artefact)
            state = {"step": self.step, "learner": self.learner.state_dict(), "stream": self.stream.state_dict()}
            save_tensors(folder / STATE, state)

        save(self.folder, self.step, write, self.config.checkpoint.save_total_limit)
        self.saved = self.step

    def save_what_is_not(self) -> None:
        """Write a checkpoint of the last step if it is whole and has none; where that fails, say so and no more."""
        if not self.step_complete or self.step == self.saved:
            return
        self.log.status("saving a checkpoint")
        try:
            self.save()
        except Exception as error:  # the one that ends the run matters more
            self.log.notice(f"step {self.step} could not be saved: {error}")

    def restore(self) -> None:
        """Continue from the newest good checkpoint, or from the beginning if the run ended before its first."""
        where, state = self.ranks.broadcast(self.last_checkpoint() if self.ranks.first else None)
        if state is not None:
            self.load(where, state)
        self.log.resume(self.step)
        entries = read_entries(self.folder / EVALUATIONS) if self.ranks.first else []
        self.accuracies = self.ranks.broadcast({entry["step"]: entry["eval/strict_accuracy"] for entry in entries})

    def last_checkpoint(self) -> tuple[str, Any]:
        """Where the newest good checkpoint is and its state, without the adapter, which is loaded; or "" and None."""
        folder = latest(self.folder, self.log.notice)
        if folder is not None:
            state = load_tensors(folder / STATE)
            self.session.policy.load(folder / self.session.policy.artefact)
            return str(folder / STATE), state
        if step_numbers(self.folder):
            raise UserError(f"{self.folder}: every checkpoint is damaged; start a new run with another --output")
        self.log.notice("no checkpoint was written yet; starting again from the first step")
        return "", None

    def load(self, where: str, state: Any) -> None:
        """Go on from `state`, and the adapter of the first rank. Raises UserError for one of another program or run."""
        self.ranks.broadcast_parameters(self.learner.parameters)
        try:
            self.learner.load_state_dict(state["learner"])
            self.stream.load_state_dict(state["stream"])
            self.step = self.saved = int(state["step"])
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UserError(
                f"{where}: not a state that this version of grpo continues from ({described(error)}); start a "
                "new run with another --output"
            ) from None
        self.session.engine.sync_adapter()

    def finish(self) -> dict[str, Any]:
        """Save the adapter where people look for it, and sum up."""
        policy = self.session.policy
        saved = self.folder / policy.artefact
        if self.ranks.first:
            replace_folder(saved, policy.save)
        trained = "adapter" if policy.artefact == "adapter" else "trained_model"
        summary = {trained: str(saved), "model": self.config.model.name}
        self.log.finish(summary)
        return summary
