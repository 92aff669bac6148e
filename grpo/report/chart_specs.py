"""Which metrics of a step have a chart of their own in the report: title, unit, a sentence, and how they are drawn.

How a chart is made of them is `charts.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from grpo.report.alarms import thresholds
from grpo.report.data import RunData


@dataclass(frozen=True)
class Spec:
    """A line chart of one or more metrics."""

    title: str
    unit: str
    about: str
    keys: dict[str, str]
    """Metric -> its label in the chart; with several runs only the first is drawn."""
    format: str = "number"
    """"number", "percent" or "integer"."""
    mark: Callable[[RunData], tuple[str, float | None]] | None = None
    """A line at a fixed height: its label and value."""
    log: bool = False
    """Logarithmic where all values are above 0 and far apart."""
    from_zero: bool = False
    noisy: bool = False


def length_limit(run: RunData) -> tuple[str, float | None]:
    return "limit", run.setting("rollout", "max_completion_length")


def norm_limit(run: RunData) -> tuple[str, float | None]:
    return "max_grad_norm", run.setting("train", "max_grad_norm")


def survival_limit(run: RunData) -> tuple[str, float | None]:
    return "alarm below", thresholds(run).adapter_survival


def mismatch_limit(run: RunData) -> tuple[str, float | None]:
    return "alarm above", thresholds(run).mismatch_kl


COMPLETIONS = (
    Spec(
        "Completion length",
        "tokens",
        "Mean over the step's completions, and the longest one.",
        {"completion_length": "mean", "completion_length_max": "longest"},
        format="integer",
        mark=length_limit,
        from_zero=True,
    ),
    Spec(
        "Cut at the length limit",
        "% of completions",
        "Completions that ran into rollout.max_completion_length.",
        {"clipped_ratio": "cut"},
        format="percent",
        from_zero=True,
    ),
)
EPISODES = (
    Spec("Turns", "turns", "The model's, in an episode.", {"environment/turns": "turns"}, from_zero=True),
    Spec(
        "Success",
        "% of episodes",
        "As the environment says; without a word of it, a reward of 1.",
        {"environment/success": "success"},
        format="percent",
        from_zero=True,
    ),
    Spec(
        "Calls of tools",
        "in an episode",
        "All calls, those that failed, and those that could not be read.",
        {
            "environment/calls": "calls",
            "environment/call_errors": "failed",
            "environment/malformed_calls": "unreadable",
        },
        from_zero=True,
    ),
    Spec(
        "Tokens of the environment",
        "tokens",
        "In an episode. They are context, and not trained on.",
        {"environment/environment_tokens": "tokens"},
        from_zero=True,
    ),
    Spec(
        "Episodes cut short",
        "% of episodes",
        "By environment.max_turns, for want of room for another turn, within the last turn, or lost to an error.",
        {
            "environment/out_of_turns": "out of turns",
            "environment/out_of_room": "out of room",
            "environment/cut_turns": "last turn cut",
            "environment/lost": "lost",
        },
        format="percent",
        from_zero=True,
    ),
    Spec(
        "Waiting for the environment",
        "seconds",
        "How long the engine stood still in a step for want of an answer.",
        {"environment_wait_seconds": "waiting"},
        from_zero=True,
    ),
)
LEARNING = (
    Spec(
        "Groups without spread",
        "% of groups",
        "All rewards of such a group are equal: it teaches nothing.",
        {"frac_reward_zero_std": "equal rewards"},
        format="percent",
        from_zero=True,
    ),
    Spec(
        "Entropy",
        "nats per token",
        "How undecided the model is. Near 0 it has stopped exploring.",
        {"entropy": "entropy"},
        from_zero=True,
    ),
    Spec("KL from the base model", "nats per token", "Distance from the model without the adapter.", {"kl": "KL"}),
    Spec(
        "Clipped tokens",
        "% of tokens",
        "Tokens whose probability ratio was clipped by the loss.",
        {"clip_ratio": "all", "clip_ratio_low": "below", "clip_ratio_high": "above"},
        format="percent",
        from_zero=True,
    ),
    Spec(
        "Gradient norm",
        "norm",
        "Before it is scaled down to train.max_grad_norm.",
        {"grad_norm": "norm"},
        mark=norm_limit,
        log=True,
    ),
    Spec(
        "Experts that no token went to",
        "% of experts",
        "Of all layers with experts. They are frozen, and so is their router: what changes is what reaches it.",
        {"experts/unused": "unused"},
        format="percent",
        from_zero=True,
    ),
    Spec(
        "Load of experts",
        "share",
        "Entropy of the tokens over a layer's experts (1: evenly), and the busiest one's share of its tokens.",
        {"experts/load_entropy": "entropy", "experts/busiest": "busiest"},
        from_zero=True,
    ),
    Spec("Loss", "loss", "Its height says little: rewards are compared within a group.", {"loss": "loss"}),
    Spec("Learning rate", "rate", "", {"learning_rate": "learning rate"}, from_zero=True),
)
AGREEMENT = (
    Spec(
        "Mismatch KL",
        "nats per token",
        "How far the sampler's and the trainer's probabilities of the same tokens are apart.",
        {"mismatch_kl": "mismatch KL"},
        mark=mismatch_limit,
        log=True,
    ),
    Spec(
        "Largest mismatch",
        "nats",
        "The largest difference of log-probabilities at one token.",
        {"mismatch_logp_max": "largest"},
        log=True,
    ),
    Spec(
        "Adapter's effect that survives",
        "share",
        "Of what the adapter does to logprobs in float32, how much the 16-bit policy does. Scatters while it is small.",
        {"adapter_survival": "survives"},
        mark=survival_limit,
    ),
    Spec(
        "Change of the weights that is served",
        "share",
        "With all weights trained: of the optimiser's change since the start, how much those in bfloat16 show.",
        {"weight_survival": "served"},
    ),
    Spec(
        "Corrected tokens",
        "% of tokens",
        "Tokens whose importance weight was cut or masked by the correction.",
        {"correction_clip_ratio": "corrected"},
        format="percent",
        from_zero=True,
    ),
)
RESOURCES = (
    Spec(
        "Sampling speed",
        "tokens per second",
        "",
        {"tokens_per_second": "tokens/s"},
        format="integer",
        from_zero=True,
    ),
    Spec("Peak memory", "GiB", "The most held so far.", {"peak_memory_gib": "memory"}, from_zero=True),
)
