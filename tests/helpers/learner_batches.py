"""What a learner needs for an update, made up: a policy whose adapter has moved, groups of samples, advantages."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from grpo.config.schema import Config
from grpo.data import Prompt
from grpo.model.base_weights import BaseWeights
from grpo.model.source import open_source
from grpo.policy.policy import Policy
from grpo.rollout.sampler import Group, Sample
from grpo.training.advantages import Advantages, compute_advantages


def base_weights(config: Config) -> BaseWeights:
    """The model of `config` in float32 on the CPU."""
    return BaseWeights(open_source(config.model), config.model, device=torch.device("cpu"), dtype=torch.float32)


def moved_policy(base: BaseWeights, config: Config) -> Policy:
    """A policy with an adapter that does something."""
    policy = Policy(base, config.lora, seed=1, base_name=config.model.name)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in policy.adapter_layers().values():
            layer.lora_B["default"].weight.normal_(std=0.05, generator=generator)
    return policy


def random_groups(
    prompt_lengths: Sequence[int], generations: int, lengths: tuple[int, int], vocabulary: int, logprob: float
) -> list[Group]:
    """A group for each prompt, of samples of between `lengths` tokens, with logprobs from `logprob` to one above."""
    made, draw = [], random.Random(3)
    for index, prompt_length in enumerate(prompt_lengths):
        prompt = Prompt(index, "t", "p", {}, [draw.randrange(3, vocabulary) for _ in range(prompt_length)])
        samples = []
        for _ in range(generations):
            ids = [draw.randrange(3, vocabulary) for _ in range(draw.randint(*lengths))]
            samples.append(Sample(ids, [logprob + draw.random() for _ in ids], len(ids) == lengths[1], "text"))
        made.append(Group(prompt, samples))
    return made


def advantages_of(rewards: Sequence[Sequence[float]], config: Config) -> Advantages:
    """Advantages of `rewards` [groups, generations] from one function of weight 1."""
    table = torch.tensor(rewards, dtype=torch.float64)[..., None]
    return compute_advantages(table, torch.ones(1, dtype=torch.float64), config.loss)
