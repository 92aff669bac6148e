"""A training run: sample groups, score them, weigh them, update the adapter, hand it to vLLM; log, save, evaluate.

All randomness is a function of the run's seed and the step, so a resumed run is the same run. Several ranks, each with
a model and a vLLM of its own, make one run: all know the rewards and have the same adapter and optimiser, the first
writes. The arithmetic is elsewhere: sampling in `sampler.py`, advantages in `advantages.py`, the loss in `loss.py`,
gradients in `learner.py`, what ranks exchange in `ranks.py`.
"""

from __future__ import annotations

import contextlib
import json
import math
import resource
import time
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from grpo.config.schema import Config, config_toml
from grpo.data import Data, Prompt, PromptStream, keep_by_pass_rate, load_data
from grpo.distributed.launch import Launch
from grpo.distributed.ranks import Ranks, connect
from grpo.environments.pool import EnvironmentPool
from grpo.errors import UserError
from grpo.memory.plan import sequence_limits
from grpo.model.vocabulary import check_tokens
from grpo.monitor.run_log import RunLog
from grpo.monitor.silent_log import SilentLog
from grpo.policy.adapter_survival import adapter_survival
from grpo.policy.keep_16bit import remember_base
from grpo.printable import printable
from grpo.references import described
from grpo.rewards.runtime.pool import RewardPool
from grpo.rollout.episode_sampler import EpisodeSampler
from grpo.rollout.sampler import Group, Rollout, sample_seed
from grpo.run.checkpoint import latest, open_run, replace_folder, run_is_begun, save, step_numbers, write_atomically
from grpo.run.machine import resolve_device
from grpo.run.records import EVALUATIONS, read_entries
from grpo.run.signals import Interrupts
from grpo.run.tensor_state import load_tensors, save_tensors
from grpo.run.versions import versions
from grpo.session import Session, open_session, read_model
from grpo.training.advantages import Advantages, compute_advantages
from grpo.training.dump import dump_folder, gather_batch, write_dump
from grpo.training.environment import check_conversation, load_tasks, make_sampler, own_rewards, start_environment
from grpo.training.evaluation import evaluate, measure_pass_rates
from grpo.training.learner import UNMEASURED, Learner
from grpo.training.loss import resolve_loss
from grpo.training.reference_policy import set_reference
from grpo.training.rollout_memory import sample_within_memory
from grpo.training.self_check import check_start
from grpo.training.step_metrics import logged, reward_table, sampling_metrics
from grpo.training.turn_advantages import with_turns
from grpo.training.update_check import SkippedUpdate

STATE = "trainer.safetensors"
PASS_RATES = "pass_rates.json"
KEPT_QUESTIONS = 32
"""Held-out questions whose answers are kept at each evaluation, so that one can see how they change."""


class Trainer:
    """One run of one configuration, in one run folder; `launch` says which of its ranks this process is."""

    def __init__(self, config: Config, *, resume: bool = False, verbose: bool = False, launch: Launch | None = None):
        self.config, self.verbose, self.launch = config, verbose, launch or Launch()
        # A job that torchrun starts again goes on where it was.
        self.resume = resume or (self.launch.restarts > 0 and run_is_begun(config.checkpoint.output_dir))

    def run(self) -> dict[str, Any]:
        """Train to the last step and return the summary. Raises UserError for bad input; nothing is lost then.

        Raises RankLost where another rank ended.
        """
        config = self.config
        with Interrupts() as interrupts, self.run_folder(), self.log() as log, contextlib.ExitStack() as ending:
            # What fails in a second comes before what takes minutes.
            resolve_loss(config.loss)
            if self.launch.first and (uneven := uneven_share(config, self.launch.size)):
                log.notice(uneven)
            files = read_model(config, log.status, log.notice)
            check_conversation(config, files.tokenizer, files.stop_token_ids)
            environment = ending.enter_context(start_environment(config, show, log.status))
            data = load_data(config, files.tokenizer, tasks=load_tasks(config, environment))
            check_tokens(data.texts(), files.tokenizer, files.source.config)
            ranks = connect(self.launch, resolve_device(config.model.device))
            ranks.check = interrupts.check
            ranks.require_same(facts(config))
            share = config_of_rank(config, ranks.size)
            folder = config.checkpoint.output_dir
            resumed = folder if self.resume else None
            with (
                start_rewards(data, log) as pool,
                open_session(share, files=files, status=log.status, resumed=resumed, agree=ranks.broadcast) as session,
            ):
                return train_session(session, data, folder, log, self.resume, pool, ranks, environment)

    def run_folder(self) -> contextlib.AbstractContextManager[Any]:
        """The run folder, held by the first rank."""
        return open_run(self.config, resume=self.resume) if self.launch.first else contextlib.nullcontext()

    def log(self) -> RunLog:
        """The record and the display, which are the first rank's."""
        if not self.launch.first:
            return SilentLog(self.launch.rank, self.config)
        config = self.config
        return RunLog(config.checkpoint.output_dir, config, max_steps=config.train.max_steps or 0, verbose=self.verbose)


def uneven_share(config: Config, ranks: int) -> str | None:
    """What to say where some of `ranks` have more prompts than others."""
    prompts, parts = config.rollout.prompts_per_step, config.train.optimizer_steps_per_rollout
    if ranks == 1 or prompts % (ranks * parts) == 0:
        return None
    updates = f" in each of {parts} optimiser steps" if parts > 1 else ""
    return (
        f"rollout.prompts_per_step = {prompts} does not divide evenly among {ranks} ranks{updates}: some wait for "
        "others that have one prompt more"
    )


def config_of_rank(config: Config, ranks: int) -> Config:
    """`config` with vLLM sized for what one of `ranks` samples at once, unless it says how many that are."""
    rollout = config.rollout
    if ranks == 1 or rollout.max_num_seqs is not None:
        return config
    completions = math.ceil(rollout.prompts_per_step / ranks) * rollout.num_generations
    sized = rollout.model_copy(update={"max_num_seqs": min(completions, sequence_limits(config)[1])})
    return config.model_copy(update={"rollout": sized})


def facts(config: Config) -> dict[str, Any]:
    """What must be the same on every rank."""
    gpu = resolve_device(config.model.device).type == "cuda"
    return {
        "the configuration": config_toml(config),
        "the GPU": torch.cuda.get_device_name() if gpu else "none",
        **{f"the version of {name}": version for name, version in versions().items()},
    }


def start_rewards(data: Data, log: RunLog) -> contextlib.AbstractContextManager[RewardPool | None]:
    """The reward functions of `data`, loaded. What they print is shown without what a terminal would act upon."""
    if not data.rewards:  # an environment gives its own
        return contextlib.nullcontext()
    log.status("starting rewards")
    return RewardPool(data.rewards, example=data.train[0].columns, on_output=lambda name, line: show(line))


def train_session(
    session: Session,
    data: Data,
    folder: Path,
    log: RunLog,
    resume: bool = False,
    pool: RewardPool | None = None,
    ranks: Ranks | None = None,
    environment: EnvironmentPool | None = None,
) -> dict[str, Any]:
    """Train an open `session` on `data` as its configuration says, in the run folder `folder`; returns the summary.

    `pool` has the rewards and `environment` the environment, if they are loaded already; `ranks` the other processes of
    the run, if there are any.
    Raises Interrupted after SIGINT or SIGTERM, once the last whole step is in a checkpoint.
    """
    if pool is None and data.rewards:
        with start_rewards(data, log) as pool:
            return train_session(session, data, folder, log, resume, pool, ranks, environment)
    if environment is None and session.config.environment is not None:
        with start_environment(session.config, show) as environment:
            return train_session(session, data, folder, log, resume, pool, ranks, environment)
    if data.dropped:
        log.notice(f"{data.dropped} prompts longer than rollout.max_prompt_length were dropped")
    ranks = ranks or Ranks()
    ranks.copy_first(session.policy.parameters())
    if ranks.first:
        remember_base(session.base, folder)
    log.status("checking that vLLM computes what is trained")
    if (unlisted := check_start(session)) is not None:
        log.notice(unlisted)
    with Interrupts() as interrupts, interrupts.deferred():
        session.engine.between_steps = interrupts.check
        try:
            run = Run(session.config, folder, log, session, data, pool, interrupts.check, ranks, environment)
            return run.train(resume)
        finally:
            session.engine.between_steps = lambda: None


class Run:
    """The live parts of a run. `step` is the last whole one; they count from 1.

    A step happens or does not: what raises within one leaves the adapter, the optimiser and the place in the data as
    they were before it, until the adapter has moved; from then on `step_complete` is false until the step is recorded.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        log: RunLog,
        session: Session,
        data: Data,
        pool: RewardPool | None,
        check: Callable[[], None] = lambda: None,
        ranks: Ranks | None = None,
        environment: EnvironmentPool | None = None,
    ):
        """`check` is called often while nothing is half done, and may raise to end the run."""
        self.config, self.folder, self.log = config, folder, log
        self.ranks = ranks or Ranks()
        self.session, self.data = session, data
        self.stream = PromptStream(self.chosen_prompts(), data.settings, config.train.seed)
        self.max_steps = config.train.max_steps or math.ceil(
            config.train.num_train_epochs * len(data.train) / config.rollout.prompts_per_step
        )
        log.max_steps = self.max_steps
        session.engine.release_kv_cache()  # the learner plans with the memory that is free now
        self.learner = Learner(
            session.policy, config, max_steps=self.max_steps, notice=log.notice, check=check, ranks=self.ranks
        )
        own = own_rewards(config, environment)
        self.weights = torch.tensor([1.0] * len(own) + [one.weight for one in data.rewards], dtype=torch.float64)
        self.reward_names = own + [reward.column for reward in data.rewards]
        self.sampler = make_sampler(
            session, pool, environment, max_steps=self.max_steps, check=check, ranks=self.ranks, notice=log.notice
        )
        self.step = self.saved = 0
        self.step_complete = True
        self.accuracies: dict[int, float] = {}

    def chosen_prompts(self) -> list[Prompt]:
        """The training prompts, without those whose pass rate is outside their task's window.

        Rates are measured once a run, with the starting model, and kept in the run folder.
        """
        windows = {name: section.pass_rate for name, section in self.data.settings.items() if section.pass_rate}
        if not windows:
            return self.data.train
        file = self.folder / PASS_RATES
        measured = [prompt for prompt in self.data.train if prompt.task in windows]
        found = self.ranks.broadcast(json.loads(file.read_text()) if self.ranks.first and file.exists() else None)
        if found is None:
            self.log.status("measuring pass rates")
            samples = max(self.data.settings[name].pass_rate_samples for name in windows)
            found = measure_pass_rates(self.session, measured, self.data.tasks, samples, self.ranks)
            if self.ranks.first:
                write_atomically(file, json.dumps(found).encode())
        rates = dict(zip((prompt.index for prompt in measured), found, strict=True))
        chosen = []
        for task in self.data.tasks:
            prompts = [prompt for prompt in self.data.train if prompt.task == task]
            if task in windows:
                prompts = keep_by_pass_rate(prompts, [rates[prompt.index] for prompt in prompts], windows[task])
            chosen += prompts
        self.log.notice(f"{len(chosen)} of {len(self.data.train)} prompts have a pass rate within the window")
        return chosen

    def train(self, resume: bool) -> dict[str, Any]:
        """All remaining steps; returns the summary. Whatever ends them early leaves a checkpoint of the last one."""
        set_reference(self.session.policy, self.config.loss, self.folder, resume=resume, ranks=self.ranks)
        if resume:
            self.restore()
        if self.session.base.device.type == "cuda":
            self.log.status("trying the largest micro-batch")
            self.learner.probe_memory()
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
            rollouts = sample_within_memory(lambda: self.sample(step), self.stream, self.session, self.ranks)
            self.session.engine.release_kv_cache()
            sampled = time.perf_counter()
            groups = [group for rollout in rollouts for group in rollout.groups]
            advantages = self.advantages(groups)
            trained = self.update(*self.trained_on(groups, advantages), step)
        except BaseException:
            self.stream.taken = taken
            raise
        self.step_complete = False
        sync_seconds = self.session.engine.sync_adapter()
        now = time.perf_counter()
        survival = self.adapter_survival(groups, step)
        if self.log.wants_samples(step):
            weights = dict(zip(self.reward_names, self.weights.tolist(), strict=True))
            self.log.samples(step, logged(groups[: self.config.log.samples], weights, self.ranks))
        tokens = sum(rollout.tokens for rollout in rollouts)
        rollout_seconds = sum(rollout.seconds for rollout in rollouts)
        return {
            "step": step,
            **sampling_metrics(groups, rollouts, advantages, self.reward_names),
            **trained,
            **survival,
            "epoch": self.stream.epoch,
            "tokens": tokens,
            "tokens_per_second": tokens / rollout_seconds,
            "rollout_seconds": rollout_seconds,
            "reward_seconds": sum(rollout.reward_wait_seconds for rollout in rollouts),
            "train_seconds": now - sampled - sync_seconds,
            "sync_seconds": sync_seconds,
            "step_seconds": now - started,
            "peak_memory_gib": peak_memory_gib(self.session.base.device),
            **self.rank_metrics(rollouts),
        }

    def adapter_survival(self, groups: list[Group], step: int) -> dict[str, float]:
        """Now and then, how much of the adapter's effect shows in 16 bit, on completions of different prompts."""
        every = self.config.log.adapter_survival_every
        if not self.ranks.first or every is None or (step > 1 and step % every):
            return {}
        turns = zip_longest(*([one.segments(group.prompt.token_ids) for one in group.local] for group in groups))
        firsts = [one[0] for turn in turns for one in turn if one]  # one of each group, then another
        share = adapter_survival(
            self.session.policy, [one.prompt_ids for one in firsts], [one.token_ids for one in firsts]
        )
        return {} if share is None else {"adapter_survival": share}

    def seed_suffix(self) -> tuple[int, ...]:
        """What tells this rank's random numbers from those of the first, which are a lone process's."""
        return () if self.ranks.first else (self.ranks.rank,)

    def rank_metrics(self, rollouts: list[Rollout]) -> dict[str, float]:
        """Of several ranks: what one sent in this step, and how long they waited for the slowest on average."""
        if self.ranks.size == 1:
            return {}
        wait_seconds = sum(rollout.wait_seconds for rollout in rollouts)
        return {"ranks": self.ranks.size, "sent_bytes": self.ranks.bytes_sent, "idle_seconds": wait_seconds}

    def update(self, groups: list[Group], advantages: Advantages, step: int) -> dict[str, float | None]:
        """Train on `groups`; returns the training metrics, also of an update that had to be left out.

        Raises UserError when the configuration says that the run is to stop for it.
        """
        update_check = self.learner.update_check
        try:
            update_check.check_sampled(groups, advantages)
            return {**self.learner.update(groups, advantages, step), "update_skipped": 0.0}
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

    def sample(self, step: int) -> list[Rollout]:
        """One rollout or, with dynamic sampling, as many as it takes to fill the batch with unequal rewards."""
        wanted = self.config.rollout.prompts_per_step
        rounds = self.config.loss.dynamic_sampling_max_rounds if self.config.loss.dynamic_sampling else 1
        rollouts: list[Rollout] = []
        for number in range(rounds):
            rollouts.append(self.sampler.sample(self.stream.take(wanted), step, number))
            groups = [group for rollout in rollouts for group in rollout.groups]
            if rounds == 1 or int((~self.advantages(groups).zero_std).sum()) >= wanted:
                break
        return rollouts

    def trained_on(self, groups: list[Group], advantages: Advantages) -> tuple[list[Group], Advantages]:
        """All groups, or with dynamic sampling the first `prompts_per_step` of unequal rewards."""
        if not self.config.loss.dynamic_sampling:
            return groups, advantages
        unequal = [group for group, equal in zip(groups, advantages.zero_std, strict=True) if not equal]
        selected = unequal[: self.config.rollout.prompts_per_step] or groups[: self.config.rollout.prompts_per_step]
        return selected, self.advantages(selected)

    def advantages(self, groups: list[Group]) -> Advantages:
        table = reward_table(groups, self.reward_names)
        return with_turns(compute_advantages(table, self.weights, self.config.loss), groups, self.config.loss)

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
            replace_folder(self.folder / "best_adapter", self.session.policy.save_adapter)
        self.log.evaluation(self.step, result.metrics, result.groups(KEPT_QUESTIONS))
        self.accuracies[self.step] = accuracy

    def save(self) -> None:
        """Write a checkpoint of this step. Raises UserError where the disk refuses, and for a ruined adapter."""
        if not self.ranks.first:
            self.saved = self.step
            return
        if not self.learner.is_finite():
            raise UserError(
                f"step {self.step}: the adapter has values that are not finite, and is not saved; continue from the "
                "checkpoint before with --resume and a lower train.learning_rate"
            )

        def write(folder: Path) -> None:
            self.session.policy.save_adapter(folder / "adapter")
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
            self.session.policy.load_adapter(folder / "adapter")
            return str(folder / STATE), state
        if step_numbers(self.folder):
            raise UserError(f"{self.folder}: every checkpoint is damaged; start a new run with another --output")
        self.log.notice("no checkpoint was written yet; starting again from the first step")
        return "", None

    def load(self, where: str, state: Any) -> None:
        """Go on from `state`, and the adapter of the first rank. Raises UserError for one of another program or run."""
        self.ranks.copy_first(self.learner.parameters)
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
        adapter = self.folder / "adapter"
        if self.ranks.first:
            replace_folder(adapter, self.session.policy.save_adapter)
        summary = {"adapter": str(adapter), "model": self.config.model.name}
        self.log.finish(summary)
        return summary


def show(line: str) -> None:
    """Print what a reward function printed: it may be what the model wrote."""
    print(printable(line), flush=True)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
