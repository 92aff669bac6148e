"""When answers begin their turns: the rule on its own, that it loses little against the best moments, and that every
episode ends, whenever its process is lost."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.environments.pool import Lost
from grpo.rollout.episodes import EpisodePlayer


def rule(steps: int, running: int, join_steps: int, due: list[int]) -> bool:
    player = SimpleNamespace(steps=steps, engine=SimpleNamespace(running=running), join_steps=join_steps)
    return EpisodePlayer.worth_a_join(player, due)  # type: ignore[arg-type]


@given(st.integers(0, 1000), st.integers(0, 64), st.lists(st.integers(0, 1000), min_size=1, max_size=64))
def test_where_a_join_costs_nothing_or_nobody_speaks_none_waits(steps: int, running: int, due: list[int]) -> None:
    due = [min(when, steps) for when in due]
    assert rule(steps, running, 0, due)
    assert rule(steps, 0, 12, due)


@given(st.integers(1, 64), st.integers(1, 40), st.lists(st.integers(0, 50), min_size=1, max_size=64))
def test_answers_join_when_they_have_waited_as_long_as_the_others_would(
    running: int, join_steps: int, due: list[int]
) -> None:
    """And so at some step, and not before it; not more than one step's waiting is lost beyond what a join costs."""
    steps = max(due)
    while not rule(steps, running, join_steps, due):
        steps += 1
    lost = sum(steps - when for when in due)
    assert lost >= join_steps * running
    if steps > max(due):
        assert lost - len(due) < join_steps * running


def rollout_steps(lengths: list[list[int]], join_steps: int, gathers: bool, latency: int = 4) -> int:
    """Decoding steps, and those that joins cost, of a rollout whose tools answer within `latency` steps."""
    left = dict(enumerate(turns[0] for turns in lengths))
    spoken, due, steps, cost = [0] * len(lengths), {}, 0, join_steps
    while left or due:
        steps = steps if left else max(steps, min(due.values()))
        ready = [number for number, when in due.items() if when <= steps]
        if ready and rule(steps, len(left), join_steps if gathers else 0, [due[number] for number in ready]):
            for number in ready:
                del due[number]
                spoken[number] += 1
                if spoken[number] < len(lengths[number]):
                    left[number] = lengths[number][spoken[number]]
            cost += join_steps
        elif left:
            steps += 1
            left = {number: count - 1 for number, count in left.items()}
            due |= {number: steps + latency for number, count in left.items() if not count}
            left = {number: count for number, count in left.items() if count}
    return steps + cost


@given(st.integers(0, 10**6))
@settings(max_examples=15)
def test_gathering_pays_where_turns_end_one_by_one(seed: int) -> None:
    """64 episodes of four turns of 64 to 192 tokens take at most 0.6 of the time, where a join costs twelve steps."""
    draw = random.Random(seed)
    lengths = [[draw.randint(64, 192) for _ in range(4)] for _ in range(64)]
    assert rollout_steps(lengths, 12, gathers=True) < 0.6 * rollout_steps(lengths, 12, gathers=False)


@given(st.integers(1, 200))
def test_turns_of_one_length_are_not_held_up(length: int) -> None:
    lengths = [[length] * 4] * 32
    assert rollout_steps(lengths, 12, gathers=True) == rollout_steps(lengths, 12, gathers=False)


class Losing:
    """A pool and an engine at once: programs answer after a few looks, and some are lost, also while they listen."""

    facts, has_graphs, graph_tokens = {"rewards": []}, True, 2048

    def __init__(self, draw: random.Random):
        self.draw, self.inbox, self.left, self.slow, self.gone = draw, {}, {}, {}, set()

    def start(self, number: int, row: Any, seed: int) -> None:
        self.slow[number] = self.draw.randrange(4)

    def tell(self, number: int, message: Any) -> None:
        if number not in self.gone:
            self.slow[number] = self.draw.randrange(4)

    def collect(self, seconds: float) -> None:
        self.inbox |= {number: None for number, looks in self.slow.items() if not looks}
        self.slow = {number: looks - 1 for number, looks in self.slow.items() if looks}
        for number in [*self.slow, *self.left]:
            if self.draw.random() < 0.1 and number not in self.gone:
                self.gone.add(number)
                self.slow.pop(number, None)
                self.inbox[number] = Lost("was killed")

    def step(self) -> list[Any]:
        self.left = {number: count - 1 for number, count in self.left.items()}
        done = [number for number, count in self.left.items() if not count]
        self.left = {number: count for number, count in self.left.items() if count}
        return [SimpleNamespace(request_id=number, token_ids=[]) for number in done]

    @property
    def running(self) -> int:
        return len(self.left)

    def begin(self, *arguments: Any, **options: Any) -> None: ...
    def sweep(self) -> None: ...
    def prepare(self, count: int) -> None: ...
    def ending(self) -> Any:
        return nullcontext()


class Plays(EpisodePlayer):
    """Turns without tokens; three of them are an episode."""

    def admit(self, episode: Any, said: Any) -> Iterator[Any]:
        if said is not None or episode.turns == 3:
            episode.result = said
            del self.open[episode.number]
            yield episode
        else:
            self.engine.left[episode.number] = self.pool.draw.randint(1, 6)  # type: ignore[attr-defined]

    def take(self, completion: Any, text: str) -> None:
        episode = self.open[completion.request_id]
        episode.turns += 1
        self.hand_over(episode, {})


@pytest.mark.parametrize("schedule", ["deterministic", "eager"])
@given(st.integers(0, 10**6), st.sampled_from([None, 0, 1, 12]))
@settings(max_examples=50)
def test_every_episode_ends_once_also_those_that_are_lost(schedule: str, seed: int, join_steps: int | None) -> None:
    both: Any = Losing(random.Random(seed))
    how: Any = SimpleNamespace(schedule=schedule, latency_steps=2, join_steps=join_steps)
    none: Any = None
    player = Plays(both, both, how, none, lambda all_: [""] * len(all_), episode_tokens=9, max_seq_length=9)
    played = list(player.play([(number, {}, number) for number in range(12)], none))
    assert sorted(episode.number for episode in played) == list(range(12))
    assert {episode.number for episode in played if episode.result is not None} == both.gone
