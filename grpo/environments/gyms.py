"""Text games of SkyRL-gym and GEM, each made a `Program`; neither package is needed for anything else.

Both step through an episode themselves: they are given what the policy said and return what it sees next.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grpo.environments.program import Program, Questions, Sampling, package

Row = Mapping[str, Any]


def skyrl_gym(reference: str, options: dict[str, Any], setup: Mapping[str, Any]) -> Program:
    """`[environment] skyrl_gym`: a registered environment by its id; `options` are its `env_config`.

    What a row holds besides the prompt are its `extras`; a column `answer` stands for `reward_spec.ground_truth`.
    """
    gym = package("skyrl_gym", "skyrl-gym")

    async def run(row: Row, sample: Sampling, start: Row) -> dict[str, Any]:
        extras = {name: value for name, value in row.items() if name != "prompt" and value is not None}
        extras.setdefault("reward_spec", {"ground_truth": row.get("answer")})
        extras.setdefault("max_turns", setup["max_turns"])
        environment = gym.make(reference, env_config=options, extras=extras)
        messages, _ = environment.init(list(row["prompt"]))
        messages, rewards, done = list(messages), [], False
        while not done:
            turn = await sample(messages)
            seen = environment.step(turn.text)
            rewards.append(float(seen["reward"]))
            messages += [turn.message, *seen["observations"]]
            done = seen["done"] or turn.last
        metrics = {name: value for name, value in environment.get_metrics().items() if isinstance(value, int | float)}
        environment.close()
        return {"turn_rewards": rewards, "metrics": metrics, "success": rewards[-1] >= 1}

    return Program(run, {"rewards": True})


def gem(reference: str, options: dict[str, Any], setup: Mapping[str, Any]) -> Program:
    """`[environment] gem`: a registered environment by its id; `options` are its keyword arguments.

    The task "environment" takes its questions from it: what it says when it is reset with a row's `seed`.
    """
    games = package("gem", "gem-llm")
    environment = games.make(reference, **options)  # an id or an option that is wrong is told at the start

    async def run(row: Row, sample: Sampling, start: Row) -> dict[str, Any]:
        said, _ = environment.reset(seed=row.get("seed", start["seed"] % 2**32))
        messages, rewards, done = [{"role": "user", "content": said}], [], False
        while not done:
            turn = await sample(messages)
            said, reward, terminated, truncated, _ = environment.step(turn.text)
            rewards.append(float(reward))
            messages += [turn.message, {"role": "user", "content": said}]
            done = terminated or truncated or turn.last
        return {"turn_rewards": rewards, "success": rewards[-1] >= 1}

    def question(seed: int) -> dict[str, Any]:
        return {"prompt": [{"role": "user", "content": environment.reset(seed=seed)[0]}], "seed": seed}

    def questions(rows: int, held_out: int) -> Questions:
        asked = [question(seed) for seed in range(rows + held_out)]
        return asked[held_out:], asked[:held_out]

    return Program(run, {"rewards": True}, questions)
