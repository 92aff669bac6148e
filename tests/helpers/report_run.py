"""A run folder as a training run leaves it, written by the project's own run log, without a model."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

from rich.console import Console

from grpo.config.schema import Config, config_toml, parse_config
from grpo.monitor.run_log import RunLog
from grpo.run.checkpoint import CONFIG
from grpo.run.samples import Sample, SampleGroup

HOSTILE = (
    "</script><script>window.pwned=1</script><img src=x onerror=window.pwned=2>"
    "<!-- \x1b[2J\x1b]0;title\x07 \u202egnp \ud800 {{ 7 * 7 }} & &amp; needle"
)


def run_config(folder: Path, **tables: Any) -> Config:
    values: dict[str, Any] = {
        "model": {"name": "some/model"},
        "task": {"name": "arithmetic", "options": {"api_key": "hunter2"}},
        "rewards": [{"function": "numeric_answer", "weight": 2.0}, {"function": "scores.py:brevity", "weight": 0.5}],
        "rollout": {"max_completion_length": 64},
        "eval": {"every": 10},
        "log": {"samples_every": 10},
        "checkpoint": {"output_dir": str(folder)},
    }
    for section, keys in tables.items():
        values[section] = {**values.get(section, {}), **keys}
    return parse_config(values)


def metrics(step: int, steps: int, **more: Any) -> dict[str, Any]:
    """A step of a run that learns: its reward rises from 0.5 to 2, its entropy falls."""
    done = step / steps
    wave = math.sin(step)
    figures = {
        "step": step,
        "reward": 0.5 + 1.5 * done + 0.05 * wave,
        "reward_std": 0.4 - 0.2 * done,
        "frac_reward_zero_std": 0.3 * done,
        "rewards/numeric_answer": 0.2 + 0.7 * done,
        "rewards/numeric_answer/std": 0.4,
        "rewards/numeric_answer/seconds": 0.01,
        "rewards/brevity": 0.5,
        "rewards/brevity/std": 0.1,
        "completion_length": 30 + wave,
        "completion_length_max": 64,
        "clipped_ratio": 0.1 * (1 - done),
        "loss": 0.01 * wave,
        "grad_norm": 0.4 + 0.1 * wave,
        "entropy": 0.9 - 0.5 * done,
        "kl": 0.001 * done,
        "clip_ratio": 0.0,
        "mismatch_kl": 0.001 * (1.2 + wave),
        "mismatch_logp_max": 0.5,
        "learning_rate": 1e-5 * (1 - done),
        "epoch": done,
        "tokens_per_second": 1000.0,
        "rollout_seconds": 6.0,
        "reward_seconds": 0.5,
        "train_seconds": 3.0,
        "sync_seconds": 0.1,
        "step_seconds": 10.0,
        "peak_memory_gib": 4.5,
    }
    return {**figures, **more}


def held_out(accuracy: float) -> dict[str, float]:
    found = {"eval_seconds": 5.0, "eval_prompts": 100}
    for kind, value in (("strict", accuracy), ("flexible", accuracy + 0.1)):
        found |= {f"eval/{kind}_accuracy": value}
        found |= {f"eval/{kind}_accuracy/low": value - 0.08, f"eval/{kind}_accuracy/high": value + 0.08}
    return found | {"eval/pass@1": accuracy, "eval/completion_length": 30.0}


def groups(step: int, steps: int, text: str = "") -> list[SampleGroup]:
    """Three groups of four: two questions of the step's own, and one that is asked at every step."""
    made = []
    for number, question in enumerate((f"What is {step} + 1?", f"What is {step} + 2?", "What is 20 + 22?")):
        samples = [
            Sample(
                text=f"{text or 'It is'} {step + number + member}",
                reward=member * step / steps,
                rewards={"numeric_answer": float(member == 3), "brevity": None if member == 0 else 0.5},
                extracted=str(step + number + member),
                tokens=30 + member,
                finish_reason="length" if member == 0 else "stop",
            )
            for member in range(4)
        ]
        made.append(SampleGroup([{"role": "user", "content": question}], "42", samples, "arithmetic"))
    return made


def write_run(
    folder: Path, steps: int = 40, *, text: str = "", finished: bool = True, config: Config | None = None, **more: Any
) -> Path:
    """A run of `steps` steps in `folder`; `text` stands at the start of every completion, `more` in every metric."""
    config = config or run_config(folder, train={"max_steps": steps})
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(config_toml(config))
    with RunLog(folder, config, max_steps=steps, console=Console(file=io.StringIO())) as log:
        for step in range(steps + 1):
            if step:
                log.step(metrics(step, steps, **more))
                if log.wants_samples(step):
                    log.samples(step, groups(step, steps, text))
            if step % 20 == 0 or step == steps:
                asked = SampleGroup("What is 5 + 6?", "11", [Sample(f"{step}", float(step > 0), {"strict": 1.0})])
                log.evaluation(step, held_out(0.3 + 0.4 * step / steps), [asked])
        if finished:
            log.finish({"adapter": str(folder / "adapter")})
    return folder


EPISODES = {
    "environment/turns": 3.0,
    "environment/success": 0.5,
    "environment/calls": 2.0,
    "environment/call_errors": 0.25,
    "environment/malformed_calls": 0.125,
    "environment/environment_tokens": 60.0,
    "environment/out_of_turns": 0.1,
    "environment/out_of_room": 0.05,
    "environment/cut_turns": 0.02,
    "environment/lost": 0.01,
    "environment_wait_seconds": 1.5,
}
"""What the steps of a run with an environment measure besides."""


def episode(step: int, turns: int = 3, text: str = "") -> list[dict[str, Any]]:
    """So many turns of the policy with a call each, and what the environment said between them."""
    made: list[dict[str, Any]] = []
    for number in range(turns):
        call = {"name": "look", "arguments": {"at": number, "why": text or "to see"}}
        last = number == turns - 1
        said = {"role": "assistant", "text": f"Turn {number} of step {step}.", "sampled": True, "reward": number / 4}
        made.append(said | {"calls": [] if last else [call]})
        if not last:
            made.append({"role": "tool", "text": f"{text or 'Seen'} {number}", "sampled": False, "calls": []})
    return made


def write_episodes(folder: Path, steps: int = 40, *, text: str = "", turns: int = 3) -> Path:
    """A run with an environment: conversations in training and of held-out questions."""
    config = run_config(folder, train={"max_steps": steps}, environment={"tools": ["my_tools.py:look"]})
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(config_toml(config))

    def group(step: int, question: str) -> SampleGroup:
        samples = [
            Sample("done", member * step / steps, {"tools": 1.0}, None, 20, "stop", episode(step, turns, text))
            for member in range(2)
        ]
        return SampleGroup([{"role": "user", "content": question}], None, samples, "games")

    with RunLog(folder, config, max_steps=steps, console=Console(file=io.StringIO())) as log:
        for step in range(steps + 1):
            if step:
                log.step(metrics(step, steps, **EPISODES))
                if log.wants_samples(step):
                    log.samples(step, [group(step, f"Game {step}")])
            if step in (0, steps):
                log.evaluation(step, held_out(0.3 + 0.4 * step / steps), [group(step, "A held-out game")])
        log.finish({"adapter": str(folder / "adapter")})
    return folder
