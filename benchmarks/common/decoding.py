"""A benchmark's engine: which kernels a decoding step has, by name, and for how many sequences it is captured."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from grpo.kernels import cards
from grpo.rollout.engine import Engine

BACKENDS = ("flash_attn", "grpo", "grpo-apart")
"""vLLM's; ours; ours with no kernel launched before the one in front of it has ended."""


def choose(name: str) -> str:
    """`rollout.attention_backend` for `name`, one of BACKENDS or of the setting's. Before an engine starts."""
    cards.OVERLAPPED_LAUNCHES = not name.endswith("-apart")
    return name.removesuffix("-apart")


class FewGraphs(Engine):
    """Captures steps of so many sequences and no others, which starts sooner."""

    def __init__(self, *arguments: Any, captured: Iterable[int]):
        self.captured = sorted({*captured})
        super().__init__(*arguments)

    def _arguments(self) -> dict[str, Any]:
        arguments = super()._arguments()
        if self.has_graphs:
            arguments["compilation_config"]["cudagraph_capture_sizes"] = self.captured
        return arguments
