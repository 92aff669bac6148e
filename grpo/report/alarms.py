"""Alarms: figures of a run that deserve a look at once, each with its evidence; `docs/alarms.md` explains every one.

An `AlarmWatch` is told every step and every evaluation as it comes. A figure is compared as a median over a window of
steps, with a limit of `[alarms]` or with its own first window, so that one odd step raises nothing. An alarm stands
until its figure has been within the limit for a whole window. One that comes back soon after is the same alarm.

Not here: suggestions about a run as a whole (findings.py), updates that are left out (`grpo.training.update_check`).
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import ValidationError

from grpo.config.schema import Alarms
from grpo.report.data import RunData

SURVIVAL_FROM = 20
"""Step from which `adapter_survival` is judged: before, the adapter's effect is smaller than the noise of rounding."""
LAST_SURVIVALS = 3
"""Measurements of it that are averaged."""
LEAST_MISMATCH = 0.001
"""Nats a token below which a mismatch that rises is still noise of rounding."""
SAME_WINDOWS = 5
"""Within so many windows of its end an alarm that comes back is not raised anew."""
SURE = 1.64
"""Standard errors beyond which a change is none by chance, one-sided at 95 %."""

Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Alarm:
    """One figure beyond its limit, at the step where that was seen."""

    name: str
    """The setting of `[alarms]` that holds its limit."""
    step: int
    value: float
    limit: float
    text: str
    """What is so, and against what: one sentence."""

    @property
    def title(self) -> str:
        return TITLES[self.name]

    @property
    def said(self) -> str:
        """The sentence, the setting that holds the limit, and where it is explained."""
        return f'{self.text} (alarms.{self.name} = {self.limit:g}; docs/alarms.md, "{self.title}")'

    def entry(self) -> dict[str, Any]:
        """As a line of alarms.jsonl."""
        values = asdict(self)
        return {"step": values.pop("step"), "alarm": values.pop("name"), **values}


TITLES = {
    "reward_without_accuracy": "Reward without accuracy",
    "length_collapse": "Length collapse",
    "length_explosion": "Length explosion",
    "cut_completions": "Cut completions",
    "entropy_collapse": "Entropy collapse",
    "equal_groups": "Groups without variance",
    "adapter_survival": "Adapter lost to rounding",
    "mismatch_kl": "Mismatch high",
    "mismatch_rise": "Mismatch rising",
}
"""Name -> its title, which is also the heading in docs/alarms.md."""


class Figure:
    """The values of one metric, as far as alarms need them: the first window and the last."""

    def __init__(self, window: int):
        self.first: list[float] = []
        self.last: deque[float] = deque(maxlen=window)
        self.window, self.count = window, 0

    def add(self, value: float) -> None:
        if len(self.first) < self.window:
            self.first.append(value)
        self.last.append(value)
        self.count += 1

    @property
    def compared(self) -> tuple[float, float] | None:
        """Medians of the first window and of the last; None until the two are apart."""
        if self.count < 2 * self.window:
            return None
        return statistics.median(self.first), statistics.median(self.last)


@dataclass
class Standing:
    """An alarm that is on, and for how many steps in a row its figure has been within the limit."""

    alarm: Alarm
    quiet: int = 0


@dataclass(frozen=True)
class HeldOut:
    """An evaluation, and the reward around it."""

    step: int
    accuracies: dict[str, tuple[float, float]]
    """Name -> share and its standard error."""
    rewards: list[float] = field(default_factory=list)
    """The window before it; of the first evaluation, after it."""


Judged = tuple[float, float, str] | None
"""A figure beyond its limit: value, limit, sentence. None: within it, or not known."""


class AlarmWatch:
    """What is known of a run while it goes on. `standing`: alarms that are on; `raised`: all that were, in order."""

    def __init__(self, settings: Alarms):
        self.settings = settings
        self.figures: dict[str, Figure] = {}
        self.survivals: deque[tuple[int, float]] = deque(maxlen=LAST_SURVIVALS)
        self.evaluations: list[HeldOut] = []
        self.standing: dict[str, Standing] = {}
        self._ended: dict[str, tuple[int, Alarm]] = {}
        self.raised: list[Alarm] = []

    def step(self, entry: Entry) -> list[Alarm]:
        """Take up the metrics of a step; returns the alarms that begin with it."""
        for key in WATCHED:
            if (value := number(entry.get(key))) is not None:
                self.figures.setdefault(key, Figure(self.settings.window)).add(value)
        survival, step = number(entry.get("adapter_survival")), entry["step"]
        if survival is not None and step >= SURVIVAL_FROM:
            self.survivals.append((step, survival))
        if self.evaluations and len(self.evaluations[0].rewards) < self.settings.window:
            self.evaluations[0].rewards.extend(value for value in [number(entry.get("reward"))] if value is not None)
        return [alarm for name, rule in RULES.items() if (alarm := self.judge(name, step, rule(self))) is not None]

    def evaluation(self, entry: Entry) -> list[Alarm]:
        """Take up held-out figures; returns the alarms that begin with them."""
        accuracies = {}
        for name in ("strict_accuracy", "flexible_accuracy"):
            share, low, high = (number(entry.get(f"eval/{name}{end}")) for end in ("", "/low", "/high"))
            if share is not None and low is not None and high is not None:
                accuracies[name] = (share, (high - low) / 2 / 1.96)
        if not accuracies:
            return []
        reward = self.figures.get("reward")
        before = list(reward.last) if reward is not None and self.evaluations else []
        self.evaluations.append(HeldOut(entry["step"], accuracies, before))
        alarm = self.judge("reward_without_accuracy", entry["step"], reward_without_accuracy(self), clears=True)
        return [] if alarm is None else [alarm]

    def judge(self, name: str, step: int, judged: Judged, *, clears: bool = False) -> Alarm | None:
        """The alarm, if it begins now. `clears`: one judgement within the limit ends it."""
        on = self.standing.get(name)
        if judged is None:
            if on is not None:
                on.quiet += 1
                if clears or on.quiet >= self.settings.window:
                    self._ended[name] = step, self.standing.pop(name).alarm
            return None
        if on is not None:
            on.quiet = 0
            return None
        ended = self._ended.get(name)
        if ended is not None and step - ended[0] <= SAME_WINDOWS * self.settings.window:
            self.standing[name] = Standing(ended[1])
            return None
        alarm = Alarm(name, step, *judged)
        self.standing[name] = Standing(alarm)
        self.raised.append(alarm)
        return alarm

    def accuracy_rose(self) -> bool:
        """Whether held-out accuracy is surely above where it began."""
        return len(self.evaluations) > 1 and change(self.evaluations[0], self.evaluations[-1]) > 0


def replayed(settings: Alarms, steps: Iterable[Entry], evaluations: Iterable[Entry]) -> AlarmWatch:
    """What a watch knows at the end of a run of `steps` and `evaluations`, each in order."""
    watch = AlarmWatch(settings)
    waiting = deque(evaluations)
    for entry in steps:
        while waiting and waiting[0]["step"] < entry["step"]:
            watch.evaluation(waiting.popleft())
        watch.step(entry)
    for entry in waiting:
        watch.evaluation(entry)
    return watch


def thresholds(run: RunData) -> Alarms:
    """The limits of a recorded run; the usual ones where its configuration has none, or none that is understood."""
    table = run.config.get("alarms")
    try:
        return Alarms.model_validate(table if isinstance(table, dict) else {})
    except ValidationError:
        return Alarms()


def watch_of(run: RunData) -> AlarmWatch:
    """What a watch knows at the end of a recorded run."""
    return replayed(thresholds(run), run.entries(), run.evaluations)


def number(value: Any) -> float | None:
    """`value` if it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


# The rules


def reward_without_accuracy(watch: AlarmWatch) -> Judged:
    limit = watch.settings.reward_without_accuracy
    if limit is None or len(watch.evaluations) < 2:
        return None
    first, last = watch.evaluations[0], watch.evaluations[-1]
    rose = rise(watch, first.rewards, last.rewards)
    moved = change(first, last)
    if rose is None or rose <= limit or moved > 0:
        return None
    name = next(iter(first.accuracies))
    shares = f"{100 * first.accuracies[name][0]:.1f} % to {100 * last.accuracies[name][0]:.1f} %"
    reward = f"{statistics.fmean(first.rewards):.3g} to {statistics.fmean(last.rewards):.3g}"
    did = "fell" if moved < 0 else "did not rise beyond chance"
    return rose, limit, (
        f"the reward rose from {reward}, {rose:.1f} standard deviations of a completion's, while held-out "
        f"accuracy {did}: from {shares} between steps {first.step} and {last.step}"
    )  # fmt: skip


def rise(watch: AlarmWatch, first: list[float], last: list[float]) -> float | None:
    """By how many standard deviations of single completions' rewards their mean rose; None within noise."""
    if len(first) < watch.settings.window or len(last) < watch.settings.window:
        return None
    difference = statistics.fmean(last) - statistics.fmean(first)
    error = math.sqrt((statistics.variance(first) + statistics.variance(last)) / watch.settings.window)
    if difference <= SURE * error:
        return None
    spread = watch.figures.get("reward_std")
    if spread is None:
        return None
    deviation = (statistics.fmean(spread.first) + statistics.fmean(spread.last)) / 2
    return difference / deviation if deviation > 0 else None


def change(first: HeldOut, last: HeldOut) -> int:
    """1 where an accuracy surely rose, -1 where one surely fell and none rose, else 0."""
    scores = []
    for name in first.accuracies.keys() & last.accuracies.keys():
        (before, error_before), (after, error_after) = first.accuracies[name], last.accuracies[name]
        error = math.hypot(error_before, error_after)
        scores.append((after - before) / error if error > 0 else math.copysign(math.inf, after - before))
    if any(score > SURE for score in scores):
        return 1
    return -1 if any(score < -SURE for score in scores) else 0


def lengths(watch: AlarmWatch) -> tuple[float, float] | None:
    """Median lengths at first and now; None where they are not known, or accuracy rose with the change."""
    figure = watch.figures.get("completion_length")
    return None if figure is None or watch.accuracy_rose() else figure.compared


def length_collapse(watch: AlarmWatch) -> Judged:
    limit, both = watch.settings.length_collapse, lengths(watch)
    if limit is None or both is None or both[1] >= limit * both[0]:
        return None
    text = f"completions shrank from {both[0]:.0f} to {both[1]:.0f} tokens, {100 * both[1] / both[0]:.0f} % of it"
    return both[1] / both[0], limit, text


def length_explosion(watch: AlarmWatch) -> Judged:
    limit, both = watch.settings.length_explosion, lengths(watch)
    if limit is None or both is None or both[1] <= limit * max(both[0], 1.0):
        return None
    times = both[1] / max(both[0], 1.0)
    return times, limit, f"completions grew from {both[0]:.0f} to {both[1]:.0f} tokens, {times:.1f} times as long"


def cut_completions(watch: AlarmWatch) -> Judged:
    both = compared(watch, "clipped_ratio")
    limit = watch.settings.cut_completions
    if limit is None or both is None or both[1] <= limit:
        return None
    return both[1], limit, f"{100 * both[1]:.0f} % of the completions are cut at rollout.max_completion_length"


def entropy_collapse(watch: AlarmWatch) -> Judged:
    both = compared(watch, "entropy")
    limit = watch.settings.entropy_collapse
    if limit is None or both is None or both[0] <= 0 or both[1] >= limit * both[0]:
        return None
    share = both[1] / both[0]
    return share, limit, f"entropy fell from {both[0]:.3g} to {both[1]:.2g} nats a token, {100 * share:.1f} % of it"


def equal_groups(watch: AlarmWatch) -> Judged:
    both = compared(watch, "frac_reward_zero_std")
    limit = watch.settings.equal_groups
    if limit is None or both is None or both[1] <= limit:
        return None
    rewards = compared(watch, "reward")
    at = "" if rewards is None else f", at a mean reward of {rewards[1]:.3g}"
    return both[1], limit, f"{100 * both[1]:.0f} % of the groups have equal rewards and teach nothing{at}"


def adapter_survival(watch: AlarmWatch) -> Judged:
    limit = watch.settings.adapter_survival
    if limit is None or not watch.survivals:
        return None
    share = statistics.fmean(value for _, value in watch.survivals)
    if share >= limit:
        return None
    steps = [str(step) for step, _ in watch.survivals]
    when = f"step {steps[0]}" if len(steps) == 1 else f"the mean of steps {', '.join(steps)}"
    text = f"in 16 bit {100 * share:.0f} % of the adapter's effect shows ({when}), where one rounding shows nearly all"
    return share, limit, text


def mismatch_kl(watch: AlarmWatch) -> Judged:
    both = compared(watch, "mismatch_kl")
    limit = watch.settings.mismatch_kl
    if limit is None or both is None or both[1] <= limit:
        return None
    text = f"the mismatch KL of sampler and trainer is {both[1]:.2g} nats a token; it began at {both[0]:.2g}"
    return both[1], limit, text


def mismatch_rise(watch: AlarmWatch) -> Judged:
    both = compared(watch, "mismatch_kl")
    limit = watch.settings.mismatch_rise
    if limit is None or both is None or both[1] <= max(limit * both[0], LEAST_MISMATCH):
        return None
    times = both[1] / both[0] if both[0] > 0 else math.inf
    text = f"the mismatch KL of sampler and trainer rose from {both[0]:.2g} to {both[1]:.2g} nats a token"
    return times, limit, text


def compared(watch: AlarmWatch, key: str) -> tuple[float, float] | None:
    """A metric's medians over the first window and the last; None until they are apart."""
    figure = watch.figures.get(key)
    return None if figure is None else figure.compared


RULES: dict[str, Callable[[AlarmWatch], Judged]] = {
    "length_collapse": length_collapse,
    "length_explosion": length_explosion,
    "cut_completions": cut_completions,
    "entropy_collapse": entropy_collapse,
    "equal_groups": equal_groups,
    "adapter_survival": adapter_survival,
    "mismatch_kl": mismatch_kl,
    "mismatch_rise": mismatch_rise,
}
"""Those that are judged at every step; `reward_without_accuracy` is at every evaluation."""
WATCHED = (
    "reward", "reward_std", "completion_length", "clipped_ratio", "entropy", "frac_reward_zero_std", "mismatch_kl",
)  # fmt: skip
