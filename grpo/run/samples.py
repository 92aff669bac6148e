"""Completions as a run keeps and shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from grpo.images import Image, preview_name
from grpo.messages import content_text


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
    """Of an episode, after its prompt: {"role", "text", "calls", "sampled"} and, where there are such, "reward" and
    "images", the names of their previews, each."""
    previews: Mapping[str, str] = field(default_factory=dict)
    """What shows images of those turns, by name, in base64, as ranks send it; not every one has to be kept."""

    def entry(self) -> dict[str, Any]:
        """The sample as a row for a JSON lines file."""
        values = asdict(replace(self, previews={}))
        del values["previews"]
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
    images: Sequence[Image] = ()
    """The prompt's, in the order of their places."""

    def entry(self) -> dict[str, Any]:
        """The group as a row for a JSON lines file."""
        values = {**asdict(replace(self, samples=(), images=())), "samples": [each.entry() for each in self.samples]}
        del values["images"]
        return {**values, **({"images": [preview_name(image.digest) for image in self.images]} if self.images else {})}

    @property
    def question(self) -> str:
        """The prompt, or the last message of a chat."""
        if isinstance(self.prompt, str):
            return self.prompt
        count = len(self.images)
        shown = f" [{count} image{'' if count == 1 else 's'}]" if count else ""
        return content_text(self.prompt[-1].get("content", "")) + shown if self.prompt else ""
