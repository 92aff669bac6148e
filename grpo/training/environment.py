"""What a configuration has groups drawn by: the sampler and, for `[environment]`, its processes and the player."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from grpo.config.schema import Config
from grpo.distributed.ranks import Ranks
from grpo.environments.continuation import Continuer
from grpo.environments.pool import EnvironmentPool
from grpo.errors import UserError
from grpo.printable import printable
from grpo.rewards.runtime.pool import RewardPool
from grpo.rewards.runtime.runner import machine_memory
from grpo.rollout.episodes import EpisodePlayer, EpisodeSampler
from grpo.rollout.sampler import Sampler
from grpo.session import Session


def show(line: str) -> None:
    """Print what an environment printed: it may be what the model wrote."""
    print(printable(line), flush=True)


def check_conversation(config: Config, tokenizer: Any, end_tokens: tuple[int, ...]) -> None:
    """Raise UserError where the model's chat template cannot continue the conversations of `[environment]`."""
    if config.environment is not None:
        continuer(config, tokenizer, end_tokens).prove(tools=config.environment.kind != "program")


def continuer(config: Config, tokenizer: Any, end_tokens: tuple[int, ...]) -> Continuer:
    """The tokens between turns, by the model's chat template."""
    if tokenizer.chat_template is None:
        raise UserError(
            "[environment] needs a chat template, and the model's tokenizer has none; set model.chat_template"
        )
    return Continuer(tokenizer, end_tokens, config.rollout.chat_template_kwargs)


def start_environment(
    config: Config, on_output: Callable[[str], None] = show
) -> contextlib.AbstractContextManager[EnvironmentPool | None]:
    """The environment of `config`, loaded; None where it has none. Raises UserError where nothing gives a reward."""
    settings = config.environment
    if settings is None:
        return contextlib.nullcontext()
    gigabytes = settings.memory_limit_gb
    pool = EnvironmentPool(
        settings.column,
        settings.kind,
        getattr(settings, settings.kind),
        settings.options,
        python=settings.python,
        processes=settings.processes,
        timeout=settings.timeout,
        memory_limit=machine_memory() // 2 if gigabytes is None else int(gigabytes * 1e9),
        on_output=on_output,
    )
    if settings.kind == "factory" and not (pool.facts["rewards"] or config.rewards):
        pool.close()
        raise UserError(f"environment {settings.factory!r} has no get_reward; add it, or a [[rewards]] table")
    return pool


def own_rewards(config: Config, environment: EnvironmentPool | None) -> list[str]:
    """The column of the environment's own reward, if it gives one."""
    if environment is None or config.environment is None or not environment.facts["rewards"]:
        return []
    return [config.environment.column]


def make_player(
    session: Session, environment: EnvironmentPool, check: Callable[[], None] = lambda: None
) -> EpisodePlayer:
    """What plays episodes of `environment` with the model of `session`."""
    config = session.config
    assert config.environment is not None
    return EpisodePlayer(
        session.engine,
        environment,
        config.environment,
        continuer(config, session.tokenizer, session.stop_token_ids),
        session.decode,
        episode_tokens=config.rollout.max_completion_length,
        max_seq_length=config.max_seq_length,
        check=check,
    )


def make_sampler(
    session: Session,
    pool: RewardPool | None,
    environment: EnvironmentPool | None,
    *,
    max_steps: int,
    check: Callable[[], None],
    ranks: Ranks,
    notice: Callable[[str], None],
) -> Sampler:
    """What draws groups: of completions or, in an `environment`, of episodes."""
    config = session.config
    sampling = session.sampling(config.rollout.temperature, config.rollout.max_completion_length)
    named: dict[str, Any] = {
        "num_generations": config.rollout.num_generations,
        "seed": config.train.seed,
        "max_steps": max_steps,
        "decode": session.decode,
        "check": check,
        "ranks": ranks,
        "optimizer_steps": config.train.optimizer_steps_per_rollout,
    }
    if environment is None:
        return Sampler(session.engine, pool, sampling, **named)
    player = make_player(session, environment, check)
    return EpisodeSampler(session.engine, pool, sampling, **named, player=player, notice=notice)


@contextlib.contextmanager
def held_out_player(session: Session) -> Iterator[EpisodePlayer | None]:
    """What plays held-out episodes; None where the configuration has no environment."""
    check_conversation(session.config, session.tokenizer, session.stop_token_ids)
    with start_environment(session.config) as pool:
        yield None if pool is None else make_player(session, pool)
