"""Talking to a run in its environment: a message is answered by a whole episode, tools and all."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo.api.prompts import asked
from grpo.config.schema import Environment, parse_config
from grpo.environments.pictures import shown_prompt, with_images
from grpo.errors import UserError
from grpo.run.model_reference import resolve_model

if TYPE_CHECKING:
    from grpo.api.loaded_policy import LoadedPolicy

Messages = list[dict[str, Any]]


def environment_of(model: str | Path, base: str | Path | None) -> Environment:
    """The `[environment]` of a run. Raises UserError where there is none."""
    tables = resolve_model(model, base).tables
    if "environment" not in tables:
        raise UserError(f"{model}: there is no run with an [environment]; leave --environment out")
    known = {"model": {"name": "none"}, "task": {"name": "environment"}, "environment": tables["environment"]}
    environment = parse_config(known, str(model)).environment
    assert environment is not None
    return environment


@contextmanager
def episodes_of(
    policy: LoadedPolicy, environment: Environment, *, temperature: float, max_tokens: int, seed: int | None
) -> Iterator[Callable[[Messages], Messages]]:
    """What plays an episode from a conversation and returns it whole. Raises UserError where one is lost.

    `max_tokens`: of a whole episode, the environment's words included.
    """
    from grpo.environments.pool import Lost
    from grpo.training.environment import check_conversation, make_player, start_environment

    session = policy.session
    config = session.config.model_copy(update={"environment": environment})
    check_conversation(config, session.tokenizer, session.stop_token_ids, session.image_tokens)
    with start_environment(config, needs_rewards=False) as pool:
        assert pool is not None
        player = make_player(session, pool, config=config)
        player.episode_tokens = max_tokens

        def play(messages: Messages) -> Messages:
            drawn = random.getrandbits(62) if seed is None else seed
            sampling = session.sampling(temperature, max_tokens)
            given = asked(messages, (), "the conversation", config.model.max_pixels)
            assert not isinstance(given.prompt, str)
            row = {"prompt": shown_prompt(given.prompt, given.images)}
            (episode,) = player.play([(0, row, drawn)], sampling)
            if isinstance(episode.result, Lost):
                raise UserError(f"environment {environment.column!r} {episode.result.problem}")
            return with_images(episode.messages, episode.images.values())

        yield play
