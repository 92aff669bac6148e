"""Which kernels a decoding step of a benchmark's engine has, by name."""

from __future__ import annotations

from grpo.kernels import cards

BACKENDS = ("flash_attn", "grpo", "grpo-apart")
"""vLLM's; ours; ours with no kernel launched before the one in front of it has ended."""


def choose(name: str) -> str:
    """`rollout.attention_backend` for `name`, one of BACKENDS or of the setting's. Before an engine starts."""
    cards.OVERLAPPED_LAUNCHES = not name.endswith("-apart")
    return name.removesuffix("-apart")
