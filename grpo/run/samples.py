"""Completions as a run keeps and shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Sample:
    """One completion with its scores. `extracted` is the answer that was read from it, where a reward says."""

    text: str
    reward: float | None
    rewards: Mapping[str, float | None]
    extracted: str | None = None
    tokens: int | None = None
    finish_reason: str | None = None
    turns: Sequence[Mapping[str, Any]] | None = None
    """Of an episode, after its prompt: {"role", "text", "calls", "sampled"} and, where it has one, "reward" each."""

    def entry(self) -> dict[str, Any]:
        """The sample as a row for a JSON lines file."""
        values = asdict(self)
        if self.turns is None:
            del values["turns"]
        return values


@dataclass(frozen=True)
class SampleGroup:
    """A prompt (text or chat messages), its gold answer where there is one, and the completions sampled for it."""

    prompt: str | Sequence[Mapping[str, Any]]
    answer: Any
    samples: Sequence[Sample]
    task: str | None = None

    def entry(self) -> dict[str, Any]:
        """The group as a row for a JSON lines file."""
        return {**asdict(self), "samples": [sample.entry() for sample in self.samples]}

    @property
    def question(self) -> str:
        """The prompt, or the last message of a chat."""
        if isinstance(self.prompt, str):
            return self.prompt
        return str(self.prompt[-1].get("content", "")) if self.prompt else ""
