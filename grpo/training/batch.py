"""What the training graph is fed: sequences with their advantages, packed to a token budget without padding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grpo.kernels.launch import float32_tensor, to_device
from grpo.policy.prefix_tree import PrefixTree
from grpo.rollout.sampler import Group
from grpo.rollout.types import Segment

if TYPE_CHECKING:
    from grpo.images import Image


@dataclass
class TrainingSequence:
    """A prompt with one completion, or an episode; and all that the loss needs to know of it."""

    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]
    rollout_logprobs: Sequence[float]
    advantage: float
    truncated: bool
    """Cut at the length limit."""
    old_logprobs: Tensor | None = None
    """float32 [trained]: under the policy before this rollout's first update; None: that of the current forward."""
    sampled: Sequence[bool] | None = None
    """Which of `completion_ids` the policy drew, as in `Segment`. Only these are trained on and have logprobs."""
    token_advantages: Sequence[float] | None = None
    """Of each trained token, where they differ; `advantage` is their mean then."""
    rewritten: Sequence[Segment] = ()
    """Further parts of an episode that changed its own history. Their logprobs follow those of the first part."""
    routes: Any = None
    """The experts that sampling chose, as in `Segment`."""
    images: Sequence[Image] = ()
    """Of the first part, as in `Segment`."""

    @property
    def segments(self) -> list[Segment]:
        """All parts."""
        first = Segment(self.prompt_ids, self.completion_ids, self.sampled, self.routes, self.images)
        return [first, *self.rewritten]

    @property
    def trained(self) -> int:
        """Tokens that the loss is over."""
        return sum(sum(segment.mask) for segment in self.segments)

    def __len__(self) -> int:
        """Tokens that a forward pass sees."""
        return sum(map(len, self.segments))


@dataclass
class TrainingGroup:
    """A prompt's completions, as an optimiser step takes them."""

    sequences: list[TrainingSequence]
    """Those that are computed here: none of another rank's."""
    lengths: list[int]
    """Tokens of every completion, here or elsewhere."""
    truncated: list[bool]
    zero_advantage: bool = False
    """Counts in the normaliser only."""

    @classmethod
    def of(cls, sequences: list[TrainingSequence], *, zero_advantage: bool = False) -> TrainingGroup:
        """A group whose completions are all here."""
        lengths = [sequence.trained for sequence in sequences]
        return cls(sequences, lengths, [sequence.truncated for sequence in sequences], zero_advantage)


def training_group(group: Group, advantages: Tensor, *, zero_advantage: bool = False) -> TrainingGroup:
    """`group` with its `advantages` [G]."""
    return TrainingGroup(
        training_sequences(group, advantages) if group.local else [],
        [sample.length for sample in group.samples],
        [sample.truncated for sample in group.samples],
        zero_advantage,
    )


def active_sequences(groups: Sequence[TrainingGroup]) -> list[TrainingSequence]:
    """What there is to compute here for `groups`."""
    return [sequence for group in groups if not group.zero_advantage for sequence in group.sequences]


def training_sequences(group: Group, advantages: Tensor) -> list[TrainingSequence]:
    """The completions of `group`, sampled here, with their `advantages` [G], or [G, U] of turns; an episode that was
    lost is left out."""
    sequences = []
    for sample, advantage in zip(group.local, advantages, strict=True):
        if not sample.length:
            continue
        first, *others = sample.segments(group.prompt)
        by_token = None if advantage.ndim == 0 else advantage[sample.turn_of_tokens].tolist()
        sequences.append(
            TrainingSequence(
                first.prompt_ids,
                first.token_ids,
                sample.logprobs,
                float(advantage) if by_token is None else math.fsum(by_token) / len(by_token),
                sample.truncated,
                sampled=first.sampled,
                rewritten=others,
                token_advantages=by_token,
                routes=first.routes,
                images=first.images,
            )
        )
    return sequences


UNEVEN = (0.0, 0.01, 0.02, 0.04, 0.08, 0.16)
"""By how much more than the mean the largest of even micro-batches may take, as a share of it; tried in this order."""


def pack(sequences: Sequence[TrainingSequence], tokens: int, *, tree: bool = False) -> list[list[TrainingSequence]]:
    """Micro-batches of at most `tokens` tokens each, in order, as few as filling each would give but of even sizes:
    a small rest would cost nearly as much as a whole one, and the others more memory. A longer sequence gets one of
    its own.

    What is computed once in a micro-batch is counted once: a prompt that follows itself or, with `tree`, whatever
    sequences begin with alike.
    """
    batches, sizes = filled(sequences, tokens, tree=tree)
    shared = [size for size in sizes if size <= tokens]  # without sequences that are too long for any micro-batch
    for share in UNEVEN if len(shared) > 1 else ():
        limit = math.ceil(sum(shared) / len(shared) * (1 + share))
        if limit >= max(shared):
            break
        even, _ = filled(sequences, limit, tree=tree)
        if len(even) == len(batches):
            return even
    return batches


def filled(
    sequences: Sequence[TrainingSequence], tokens: int, *, tree: bool = False
) -> tuple[list[list[TrainingSequence]], list[int]]:
    """Micro-batches of which each takes what it can, and the tokens of each; otherwise as `pack`."""
    count_new = new_tokens_of_trees if tree else new_tokens
    batches: list[list[TrainingSequence]] = []
    sizes: list[int] = []
    counted = count_new()
    for sequence in sequences:
        cost = counted(sequence)
        if not batches or sizes[-1] + cost > tokens:
            batches.append([])
            sizes.append(0)
            counted = count_new()
            cost = counted(sequence)
        batches[-1].append(sequence)
        sizes[-1] += cost
    return batches, sizes


def new_tokens() -> Callable[[TrainingSequence], int]:
    """What counts the tokens of one sequence after another, without a prompt that is the one before's."""
    last: list[tuple[Sequence[int], Sequence[Image]]] = []

    def count(sequence: TrainingSequence) -> int:
        prompt = sequence.prompt_ids, sequence.images
        shared = bool(last) and last[-1] == prompt
        last.append(prompt)
        return len(sequence) - (len(sequence.prompt_ids) if shared else 0)

    return count


def new_tokens_of_trees() -> Callable[[TrainingSequence], int]:
    """What counts the tokens of one sequence after another, without what any before it began with."""
    tree = PrefixTree()

    def count(sequence: TrainingSequence) -> int:
        # Whatever has images counts as different from what has others, from the first token on.
        parts = [
            ([*apart(one), *one.prompt_ids, *one.token_ids[:-1]], len(apart(one)) + len(one.prompt_ids))
            for one in sequence.segments
        ]
        return sum(tree.add(tokens, prompt) for tokens, prompt in parts)

    return count


def apart(segment: Segment) -> list[int]:
    """A number that is no token, for each image; the same for the same image."""
    return [-1 - int(image.digest[:12], 16) for image in segment.images]


def sampled_inputs(batch: Sequence[TrainingSequence], device: torch.device) -> dict[str, Any]:
    """What `LossInputs` takes from the rollout, of S sequences with T trained tokens, one sequence after another.

    Copied to `device` so that the host waits for none of what the device has to do before.
    """
    lengths = torch.tensor([sequence.trained for sequence in batch])
    index = to_device(torch.arange(len(batch)).repeat_interleave(lengths), device)
    old = [sequence.old_logprobs for sequence in batch if sequence.old_logprobs is not None]
    by_token = [sequence.token_advantages for sequence in batch if sequence.token_advantages is not None]
    of_tokens = [advantage for advantages in by_token for advantage in advantages]
    return {
        "sequence": index,
        "mask": torch.ones_like(index, dtype=torch.bool),
        "rollout_logprobs": to_device(float32_tensor(p for s in batch for p in s.rollout_logprobs), device),
        "old_logprobs": torch.cat(old).to(device) if len(old) == len(batch) else None,
        "advantages": to_device(torch.tensor([sequence.advantage for sequence in batch]), device),
        "token_advantages": to_device(float32_tensor(of_tokens), device) if len(by_token) == len(batch) else None,
        "truncated": to_device(torch.tensor([sequence.truncated for sequence in batch]), device),
    }
