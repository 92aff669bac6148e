"""Beginnings that sequences share are computed once: the row is right, and gradients are those of sequences alone."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.config.schema import Config, parse_config
from grpo.model.base_weights import BaseWeights
from grpo.policy.packing import tree_row
from grpo.policy.policy import Policy
from grpo.policy.prefix_tree import FEWEST, PrefixTree
from grpo.rollout.types import Segment
from grpo.training.batch import TrainingSequence, pack
from grpo.training.learner import Learner
from grpo.training.loss import BatchTotals
from tests.helpers.learner_batches import base_weights, moved_policy
from tests.helpers.tiny import FAMILIES, VOCABULARY, save_tiny


@st.composite
def sequences(draw) -> list[tuple[list[int], list[int]]]:
    """(prompt, completion) pairs, each of which begins with some beginning of one before."""
    generator = random.Random(draw(st.integers(0, 10_000)))
    found: list[list[int]] = []
    for _ in range(draw(st.integers(1, 8))):
        old = draw(st.sampled_from(found)) if found else []
        kept = draw(st.integers(0, len(old)))
        new = [generator.randrange(3) for _ in range(draw(st.integers(0 if kept > 1 else 2, 40)))]
        found.append(old[:kept] + new)
    ends = [draw(st.integers(1, len(one) - 1)) for one in found]
    return [(one[:end], one[end:]) for one, end in zip(found, ends, strict=True)]


@settings(max_examples=200)
@given(sequences())
def test_every_token_is_predicted_from_its_own_sequence(pairs):
    prompts, completions = [prompt for prompt, _ in pairs], [completion for _, completion in pairs]
    row, tree = tree_row(prompts, completions), PrefixTree()
    new = sum(tree.add([*prompt, *completion[:-1]], len(prompt)) for prompt, completion in pairs)
    assert len(row.tokens) == len(row.positions) == new
    seen = {}
    for span in row.spans:
        places = [place for start, length in span.ranges for place in range(start, start + length)]
        assert [row.positions[place] for place in places] == list(range(span.keys))
        seen |= {place: places[: row.positions[place] + 1] for place in range(span.start, span.start + span.length)}
    predicting = iter(row.predicting)
    for prompt, completion in pairs:
        for index in range(len(completion)):
            assert [row.tokens[place] for place in seen[next(predicting)]] == [*prompt, *completion[:index]]
    assert next(predicting, None) is None


@settings(max_examples=200)
@given(sequences())
def test_what_is_worth_it_is_computed_once(pairs):
    """Of two sequences that begin alike, what is computed twice is shorter than what is worth a span."""
    tree, whole = PrefixTree(), [[*prompt, *completion[:-1]] for prompt, completion in pairs]
    for index, tokens in enumerate(whole):
        new = tree.add(tokens, len(pairs[index][0]))
        alike = [sum(1 for _ in same_beginning(tokens, other)) for other in whole[:index]]
        assert new <= len(tokens) - max(alike, default=0) + FEWEST


def same_beginning(one: list[int], other: list[int]):
    for a, b in zip(one, other, strict=False):
        if a != b:
            return
        yield a


# Gradients


def episodes(members: int = 3, turns: int = 8, seed: int = 0) -> list[TrainingSequence]:
    """Members of a group whose turns each rewrite what was said: what was thought in the turn before is left out."""
    draw = random.Random(seed)

    def words(count: int) -> list[int]:
        return [draw.randrange(3, VOCABULARY) for _ in range(count)]

    prompt, found = words(20), []
    for _ in range(members):
        history, parts = list(prompt), []
        for _ in range(turns):
            thought, answer, observed = words(draw.randint(1, 8)), words(draw.randint(1, 6)), words(6)
            drawn = [True] * len(thought + answer)
            parts.append(Segment(list(history), [*thought, *answer], drawn))
            history += [*answer, *observed]
        trained = sum(len(part.token_ids) for part in parts)
        first, *others = parts
        found.append(
            TrainingSequence(
                first.prompt_ids, first.token_ids, [-4.0] * trained, draw.uniform(-1, 1), False, rewritten=others,
                sampled=first.sampled,
            )
        )  # fmt: skip
    return found


def config_of(folder: Path, **train) -> Config:
    return parse_config(
        {
            "model": {"name": str(folder), "load_in_4bit": False, "dtype": "float32"},
            "task": {"name": "arithmetic"},
            "environment": {"program": "grpo.tasks.nim:play"},
            "lora": {"r": 4, "lora_alpha": 8},
            "rollout": {"max_completion_length": 400},
            "train": {"max_steps": 1, **train},
        }
    )


def gradient(base: BaseWeights, config: Config, batch: list[TrainingSequence], *, tree: bool) -> torch.Tensor:
    policy: Policy = moved_policy(base, config)
    learner = Learner(policy, config, max_steps=1, notice=print)
    learner.tree = tree
    total = sum(sequence.trained for sequence in batch)
    learner.backpropagate(batch, BatchTotals(total, len(batch), config.rollout.max_completion_length))
    return torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])


OTHERS = [pytest.param(family, marks=pytest.mark.wide) for family in FAMILIES if family not in ("llama", "gemma2")]


@pytest.mark.parametrize("family", ["llama", "gemma2", *OTHERS])
def test_the_gradient_is_that_of_sequences_computed_alone(family, tmp_path):
    save_tiny(tmp_path, family)
    base, batch = base_weights(config_of(tmp_path)), episodes()
    alone = gradient(base, config_of(tmp_path), batch, tree=False)
    for tokens in (8192, 120, 40):  # all together, an episode or so, less than one
        shared = gradient(base, config_of(tmp_path, tokens_per_micro_batch=tokens), batch, tree=True)
        assert (shared - alone).norm() < 5e-6 * alone.norm()


def test_what_is_shared_is_counted_once():
    batch = episodes()
    apart = sum(len(sequence) for sequence in batch)
    parts = [part for sequence in batch for part in sequence.segments]
    row = tree_row([part.prompt_ids for part in parts], [part.token_ids for part in parts])
    assert len(row.tokens) < 0.4 * apart
    assert pack(batch, len(row.tokens), tree=True) == [batch] and len(pack(batch, len(row.tokens))) == 3
    assert len(pack(batch, len(row.tokens) - 1, tree=True)) == 2
