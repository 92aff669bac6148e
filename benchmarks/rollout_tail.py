"""The tail of a rollout: how long few sequences are left, and what drafts from earlier tokens would save there.

`sample` draws groups with a model and keeps their token ids. `simulate` plays steps of them with decoding times that
benchmarks/rollout.py measured. A draft is what followed the last tokens of a sequence where they stood before: in its
prompt, in itself, in its siblings as far as they are by then. One decoding step verifies a draft and samples the token
after it. A draft is certain of its tokens, so exact verification keeps one with the probability that the policy gives
it: as often as the recorded token, which the policy drew, is the drafted one. Nothing is drafted for real here.

    python -m benchmarks.rollout_tail sample --config configs/gsm8k-smollm2.toml --out gsm8k.json
    python -m benchmarks.rollout_tail simulate --tokens gsm8k.json --rollout benchmarks/results/rollout_3b_h200.json

A row of verified tokens is charged as much as a sequence of its own, which is too much for attention and right for
the weights. Prints a table; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common.processes import write_result
from benchmarks.scaling_simulation import decoding_seconds

Seconds = Callable[[int], float]
"""Of a decoding step, by the rows that it computes."""
LONGEST_MATCH = 8


@dataclass(frozen=True)
class Sampled:
    """A prompt and the token ids of its completions."""

    prompt: list[int]
    completions: list[list[int]]


@dataclass
class Text:
    """A growing sequence in which what followed earlier tokens can be looked up; of each group one for all members."""

    shortest_match: int
    tokens: list[list[int]] = field(default_factory=list)
    places: dict[tuple[int, ...], tuple[int, int]] = field(default_factory=dict)
    """Where the newest occurrence of some tokens ends: member, and index of what follows."""

    def member(self, prompt: Sequence[int]) -> int:
        """Begin another sequence."""
        self.tokens.append([])
        for token in prompt:
            self.append(len(self.tokens) - 1, token)
        return len(self.tokens) - 1

    def append(self, member: int, token: int) -> None:
        """The tokens before `token` are followed by it from now on."""
        own = self.tokens[member]
        for length in range(self.shortest_match, min(LONGEST_MATCH, len(own)) + 1):
            self.places[tuple(own[-length:])] = (member, len(own))
        own.append(token)

    def draft(self, member: int, most: int) -> list[int]:
        """Up to `most` tokens that may come next in `member`: what followed its longest end that stood before."""
        own = self.tokens[member]
        for length in range(min(LONGEST_MATCH, len(own)), self.shortest_match - 1, -1):
            place = self.places.get(tuple(own[-length:]))
            if place is not None:
                source, start = place
                return self.tokens[source][start : start + most]
        return []


@dataclass
class Running:
    """A completion on its way."""

    text: Text
    member: int
    rest: list[int]

    def draft(self, most: int) -> list[int]:
        """Up to `most` tokens to verify, of which the step after them leaves one to sample."""
        return self.text.draft(self.member, min(most, len(self.rest) - 1)) if most else []

    def verify(self, draft: Sequence[int]) -> int:
        """Decode once; returns how many tokens of the draft were right."""
        right = next((n for n, (a, b) in enumerate(zip(draft, self.rest, strict=False)) if a != b), len(draft))
        for token in self.rest[: right + 1]:
            self.text.append(self.member, token)
        del self.rest[: right + 1]
        return right


@dataclass(frozen=True)
class Drafting:
    """Drafts of up to `tokens` where at most `alive` of the sequences are left."""

    tokens: int
    alive: float
    shortest_match: int = 3


@dataclass
class Played:
    """A simulated rollout."""

    seconds: float = 0.0
    tail_seconds: float = 0.0
    """While fewer than a quarter of the sequences were left."""
    drafted: int = 0
    accepted: int = 0


def play(groups: Sequence[Sampled], seconds: Seconds, drafting: Drafting) -> Played:
    """Sample all `groups` together."""
    running = list(begin(groups, drafting.shortest_match))
    total, played = len(running), Played()
    while running:
        most = drafting.tokens if len(running) <= drafting.alive * total else 0
        drafts = [one.draft(most) for one in running]
        drafted = sum(map(len, drafts))
        took = seconds(len(running) + drafted)
        played.seconds += took
        played.tail_seconds += took if len(running) < total / 4 else 0.0
        played.drafted += drafted
        played.accepted += sum(one.verify(draft) for one, draft in zip(running, drafts, strict=True))
        running = [one for one in running if one.rest]
    return played


def begin(groups: Sequence[Sampled], shortest_match: int) -> Iterator[Running]:
    for group in groups:
        text = Text(shortest_match)
        for completion in group.completions:
            if completion:
                yield Running(text, text.member(group.prompt), list(completion))


def mean_of_steps(groups: Sequence[Sampled], seconds: Seconds, drafting: Drafting, options: Any) -> Played:
    """Means over simulated steps, whose prompts are drawn with the same seed for every way to draft."""
    draw = random.Random(0)
    plays = [play(draw.sample(groups, options.prompts), seconds, drafting) for _ in range(options.steps)]
    return Played(*(statistics.fmean(values) for values in zip(*(vars(each).values() for each in plays), strict=True)))


def simulate(options: argparse.Namespace) -> dict[str, Any]:
    """A row for every task and way to draft."""
    seconds = decoding_seconds(json.loads(options.rollout.read_text()))
    rows = []
    for file in options.tokens:
        content = json.loads(file.read_text())
        groups = [Sampled(**group) for group in content["groups"]]
        lengths = sorted(len(each) for group in groups for each in group.completions)
        training = options.prompts * statistics.fmean(
            sum(len(each) + len(group.prompt) for each in group.completions) for group in groups
        )
        other = training / options.train_tokens_per_second
        ways = [Drafting(0, 0.0), *(Drafting(t, a) for t in (2, 4, 8) for a in (0.125, 0.25, 0.5, 1.0))]
        played = [(drafting, mean_of_steps(groups, seconds, drafting, options)) for drafting in ways]
        plain = played[0][1]
        for drafting, found in played:
            rows.append(
                {
                    "task": content["task"],
                    "median_tokens": lengths[len(lengths) // 2],
                    "longest": lengths[-1],
                    "cut": content["cut"],
                    "draft": drafting.tokens,
                    "below_alive": drafting.alive,
                    "rollout_s": found.seconds,
                    "tail_share": found.tail_seconds / found.seconds,
                    "accepted": found.accepted / found.drafted if found.drafted else None,
                    "rollout_gain": 1 - found.seconds / plain.seconds,
                    "step_gain": 1 - (found.seconds + other) / (plain.seconds + other),
                }
            )
    return {"benchmark": "rollout_tail", "rows": rows, "settings": settings_of(options)}


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("prompts", "steps", "train_tokens_per_second")} | {
        "rollout": options.rollout.name
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Gains as shares of the time without drafts."""
    lines = [
        f"{'task':20} {'draft':>5} {'below':>6} {'rollout':>9} {'tail':>5} {'right':>6} {'rollout':>8} {'step':>6}"
    ]
    for row in rows:
        accepted = "" if row["accepted"] is None else f"{row['accepted']:.0%}"
        lines.append(
            f"{row['task'][:20]:20} {row['draft']:5} {row['below_alive']:6.0%} {row['rollout_s']:7.2f} s"
            f" {row['tail_share']:5.0%} {accepted:>6} {row['rollout_gain']:8.1%} {row['step_gain']:6.1%}"
        )
    return "\n".join(lines)


def sample(options: argparse.Namespace) -> dict[str, Any]:
    """Groups of a configuration's first prompts, drawn as a rollout of its first step draws them."""
    from grpo.config.schema import read_config
    from grpo.data import load_data
    from grpo.rollout.sampler import Sampler
    from grpo.session import open_session

    config = read_config(options.config, options.set)
    with open_session(config, adapter=options.adapter) as session:
        prompts = load_data(config, session.tokenizer).train[: options.groups]
        settings = session.sampling(config.rollout.temperature, config.rollout.max_completion_length)
        sampler = Sampler(
            session.engine,
            None,
            settings,
            num_generations=config.rollout.num_generations,
            seed=config.train.seed,
            max_steps=1,
            decode=session.decode,
        )
        rollout = sampler.sample(prompts, step=0)
    groups = [
        {"prompt": list(group.prompt.token_ids), "completions": [sample.token_ids for sample in group.local]}
        for group in rollout.groups
    ]
    cut = statistics.fmean(sample.truncated for group in rollout.groups for sample in group.local)
    return {"task": options.name or options.config.stem, "model": config.model.name, "cut": cut, "groups": groups}


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    result.add_argument("what", choices=("sample", "simulate"))
    result.add_argument("--config", type=Path)
    result.add_argument("--adapter", type=Path, help="of a run, to sample from what was trained")
    result.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    result.add_argument("--groups", type=int, default=64)
    result.add_argument("--name", help="of the task, in the table")
    result.add_argument("--tokens", type=Path, action="append", default=[], help="what `sample` wrote; several times")
    result.add_argument("--rollout", type=Path, help="a result of benchmarks/rollout.py")
    result.add_argument("--prompts", type=int, default=16, help="of a step")
    result.add_argument("--steps", type=int, default=20)
    result.add_argument("--train-tokens-per-second", type=float, default=39000)
    result.add_argument("--out", type=Path)
    return result


def main() -> int:
    options = parser().parse_args()
    if options.what == "sample":
        options.out.write_text(json.dumps(sample(options)) + "\n")
        return 0
    result = simulate(options)
    print(table(result["rows"]))
    write_result(options.out, result)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
