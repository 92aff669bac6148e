"""Starting a run: what it needs is opened, the cheap first, and handed to the trainer.

`launch` is what the command line calls, in every rank; `train_session` trains a session that is open already. What a
step is: grpo/training/trainer.py. What ranks exchange: grpo/distributed/ranks.py.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from grpo.config.schema import Config, config_toml
from grpo.data import Data, load_data
from grpo.distributed.launch import Launch
from grpo.distributed.ranks import connect
from grpo.environments.pool import EnvironmentPool
from grpo.memory.plan import sequence_limits
from grpo.model.vocabulary import check_tokens
from grpo.monitor.log import NullLog, TrainingLog
from grpo.monitor.run_log import RunLog
from grpo.policy.keep_16bit import record_base
from grpo.rewards.runtime.pool import RewardPool
from grpo.run.checkpoint import open_run, run_is_begun
from grpo.run.machine import resolve_device
from grpo.run.signals import Interrupts
from grpo.run.versions import versions
from grpo.session import Session, open_session, read_model
from grpo.training.environment import check_conversation, load_tasks, show, start_environment
from grpo.training.loss import resolve_loss
from grpo.training.prompts import filter_prompts
from grpo.training.self_check import check_start
from grpo.training.trainer import Parts, Trainer


def launch(
    config: Config, *, resume: bool = False, verbose: bool = False, rank: Launch | None = None
) -> dict[str, Any]:
    """Train as `config` says, in its run folder, to the last step; returns the summary.

    `rank` says which of several processes this is. Raises UserError for bad input; nothing is lost then. Raises
    RankLost where another rank ended, and Interrupted after SIGINT or SIGTERM.
    """
    rank = rank or Launch()
    folder = config.checkpoint.output_dir
    # A job that torchrun starts again goes on where it was.
    resume = resume or (rank.restarts > 0 and run_is_begun(folder))
    with (
        Interrupts() as interrupts,
        run_folder(config, rank, resume),
        open_log(config, rank, verbose) as log,
        contextlib.ExitStack() as opened,
    ):
        # What fails in a second comes before what takes minutes.
        resolve_loss(config.loss)
        if rank.first and (uneven := uneven_share(config, rank.size)):
            log.notice(uneven)
        files = read_model(config, log.status, log.notice)
        check_conversation(config, files.tokenizer, files.stop_token_ids, files.image_tokens)
        environment = opened.enter_context(start_environment(config, status=log.status))
        data = load_data(
            config, files.tokenizer, tasks=load_tasks(config, environment), image_tokens=files.image_tokens
        )
        check_tokens(data.texts(), files.tokenizer, files.source.config)
        ranks = connect(rank, resolve_device(config.model.device))
        ranks.check = interrupts.check
        ranks.require_same(facts(config))
        resume = ranks.broadcast(resume)  # the first has the run folder, and not all agents have restarted as often
        share = config_of_rank(config, ranks.size)
        resumed = folder if resume else None
        with (
            start_rewards(data, log) as rewards,
            open_session(share, files=files, status=log.status, resumed=resumed, agree=ranks.broadcast) as session,
        ):
            return train(Parts(folder, log, session, data, rewards, environment, ranks), resume=resume)


def train_session(
    session: Session,
    data: Data,
    folder: Path,
    log: TrainingLog,
    *,
    environment: EnvironmentPool | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Train an open `session` on `data` as its configuration says, in the run folder `folder`; returns the summary.

    `environment` is the configuration's, open, if it has one.
    Raises Interrupted after SIGINT or SIGTERM, once the last whole step is in a checkpoint.
    """
    with start_rewards(data, log) as rewards:
        return train(Parts(folder, log, session, data, rewards, environment), resume=resume)


def train(parts: Parts, *, resume: bool) -> dict[str, Any]:
    """Check what is open, choose the prompts, and train to the last step; returns the summary."""
    session, ranks, log = parts.session, parts.ranks, parts.log
    if parts.data.dropped:
        log.notice(f"{parts.data.dropped} prompts longer than rollout.max_prompt_length were dropped")
    ranks.broadcast_parameters(session.policy.parameters())
    if ranks.first:
        record_base(session.base, session.config.lora, parts.folder)
    log.status("checking that vLLM computes what is trained")
    if (unlisted := check_start(session)) is not None:
        log.notice(unlisted)
    with Interrupts() as interrupts, interrupts.deferred():
        session.engine.between_steps = interrupts.check
        try:
            prompts = filter_prompts(session, parts.data, parts.folder, log, ranks)
            session.engine.release_kv_cache()  # the learner plans with the memory that is free now
            return Trainer(replace(parts, check=interrupts.check), prompts).train(resume=resume)
        finally:
            session.engine.between_steps = lambda: None


def run_folder(config: Config, rank: Launch, resume: bool) -> contextlib.AbstractContextManager[Any]:
    """The run folder, held by the first rank."""
    return open_run(config, resume=resume) if rank.first else contextlib.nullcontext()


def open_log(config: Config, rank: Launch, verbose: bool) -> TrainingLog:
    """The record and the display, which are the first rank's."""
    if not rank.first:
        return NullLog(rank.rank, config)
    return RunLog(config.checkpoint.output_dir, config, max_steps=config.train.max_steps or 0, verbose=verbose)


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


def start_rewards(data: Data, log: TrainingLog) -> contextlib.AbstractContextManager[RewardPool | None]:
    """The reward functions of `data`, loaded. What they print is shown without what a terminal would act upon."""
    if not data.rewards:  # an environment gives its own
        return contextlib.nullcontext()
    log.status("starting rewards")
    return RewardPool(data.rewards, example=data.train[0].columns, on_output=lambda name, line: show(line))
