"""What a configuration has groups drawn by: the sampler and, for `[environment]`, its processes and the player."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Callable
from typing import Any

import cloudpickle  # type: ignore[import-untyped]

from grpo.config.schema import OWN_QUESTIONS, Config
from grpo.distributed.ranks import Ranks
from grpo.environments.continuation import Continuer, ImageTokens
from grpo.environments.pool import EnvironmentPool
from grpo.errors import UserError
from grpo.printable import printable
from grpo.references import described
from grpo.rewards.runtime.pool import RewardPool
from grpo.rewards.runtime.runner import machine_memory
from grpo.rollout.episode_sampler import EpisodeSampler
from grpo.rollout.episodes import EpisodePlayer
from grpo.rollout.sampler import Sampler
from grpo.session import Session
from grpo.tasks.common import Row, Task, load_task


def show(line: str) -> None:
    """Print what a reward function or an environment printed: it may be what the model wrote."""
    print(printable(line), flush=True)


def check_conversation(
    config: Config, tokenizer: Any, end_tokens: tuple[int, ...], image_tokens: ImageTokens | None = None
) -> None:
    """Raise UserError where the model's chat template cannot continue the conversations of `[environment]`."""
    if config.environment is not None:
        tools = config.environment.kind in ("tools", "factory")
        continuer(config, tokenizer, end_tokens, image_tokens).prove(tools=tools)


def continuer(
    config: Config, tokenizer: Any, end_tokens: tuple[int, ...], image_tokens: ImageTokens | None = None
) -> Continuer:
    """The tokens between turns, by the model's chat template."""
    if tokenizer.chat_template is None:
        raise UserError(
            "[environment] needs a chat template, and the model's tokenizer has none; set model.chat_template"
        )
    parser = "auto" if config.environment is None else config.environment.tool_parser
    return Continuer(tokenizer, end_tokens, config.rollout.chat_template_kwargs, parser, image_tokens)


def start_environment(
    config: Config,
    on_output: Callable[[str], None] = show,
    status: Callable[[str], None] = lambda text: None,
    sent: Any = None,
    needs_rewards: bool = True,
) -> contextlib.AbstractContextManager[EnvironmentPool | None]:
    """The environment of `config`, loaded; None where it has none. Raises UserError where nothing gives a reward.

    `sent`: the function, class or list of tools that the configuration names, which is sent to the environment's
    process, as one of a notebook has to be.
    """
    settings = config.environment
    if settings is None:
        return contextlib.nullcontext()
    status("starting the environment")
    gigabytes = settings.memory_limit_gb
    pool = EnvironmentPool(
        settings.column,
        settings.kind,
        getattr(settings, settings.kind) if sent is None else as_sent(sent),
        settings.options,
        python=settings.python,
        processes=settings.processes,
        timeout=settings.timeout,
        memory_limit=machine_memory() // 2 if gigabytes is None else int(gigabytes * 1e9),
        on_output=on_output,
        max_turns=settings.max_turns,
        questions=wanted_questions(config),
    )
    if needs_rewards and settings.kind == "factory" and not (pool.facts["rewards"] or config.rewards):
        pool.close()
        raise UserError(f"environment {settings.factory!r} has no get_reward; add it, or a [[rewards]] table")
    return pool


def as_sent(sent: Any) -> Any:
    """A function, class or list of tools to send, or several classes by name, of which some may be named."""
    if isinstance(sent, dict):
        return {key: pickled(one) if callable(one) else one for key, one in sent.items()}
    return pickled(sent)


def pickled(sent: Any) -> dict[str, str]:
    """Functions or classes as `ways_in.found` takes them. Raises UserError for what cannot be sent."""
    try:
        return {"pickled": base64.b64encode(cloudpickle.dumps(sent)).decode()}
    except Exception as error:
        raise UserError(
            f"environment: it cannot be sent to its process ({described(error)}); write it in a file of its own"
        ) from None


def wanted_questions(config: Config) -> tuple[int, int] | None:
    """How many rows of the environment's own are wanted, and how many held-out ones; None where none are."""
    sections = [section for section in config.task if section.name == OWN_QUESTIONS]
    if not sections:
        return None
    unknown = sorted(set(sections[0].options) - {"rows", "held_out"})
    counts = [sections[0].options.get(name, default) for name, default in (("rows", 1000), ("held_out", 100))]
    if unknown or not all(isinstance(count, int) and count >= 0 for count in counts):
        raise UserError(f"task {OWN_QUESTIONS!r}: its options are rows and held_out, each a whole number")
    return counts[0], counts[1]


def load_tasks(config: Config, environment: EnvironmentPool | None) -> list[Task]:
    """The tasks of `config`; the one called "environment" asks what the environment has to ask."""
    return [
        own_questions(environment) if section.name == OWN_QUESTIONS else load_task(section.name, section.options)
        for section in config.task
    ]


def own_questions(environment: EnvironmentPool | None) -> Task:
    """The environment's own questions, as a task. Raises UserError where it has none."""
    questions = None if environment is None else environment.facts["questions"]
    if questions is None:
        raise UserError(
            f"task {OWN_QUESTIONS!r} asks what the environment itself has to ask, and only those of verifiers and GEM "
            "have anything; name another task"
        )
    rows, held_out = questions
    return Task(OWN_QUESTIONS, rows, held_out, strict=never, flexible=never)


def never(text: str, row: Row) -> bool:
    """An environment says itself whether an episode was a success."""
    return False


def own_rewards(config: Config, environment: EnvironmentPool | None) -> list[str]:
    """The column of the environment's own reward, if it gives one."""
    if environment is None or config.environment is None or not environment.facts["rewards"]:
        return []
    return [config.environment.column]


def make_player(
    session: Session,
    environment: EnvironmentPool,
    check: Callable[[], None] = lambda: None,
    config: Config | None = None,
) -> EpisodePlayer:
    """What plays episodes of `environment` with the model of `session`; `config` is the session's unless given."""
    config = config or session.config
    assert config.environment is not None
    return EpisodePlayer(
        session.engine,
        environment,
        config.environment,
        continuer(config, session.tokenizer, session.stop_token_ids, session.image_tokens),
        session.decode_all,
        episode_tokens=config.rollout.max_completion_length,
        max_seq_length=config.max_seq_length,
        max_pixels=config.model.max_pixels,
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


def held_out_player(session: Session, environment: EnvironmentPool | None) -> EpisodePlayer | None:
    """What plays held-out episodes; None where there is no `environment`."""
    return None if environment is None else make_player(session, environment)
