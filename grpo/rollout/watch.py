"""What vLLM's linear layers take and give while it computes a prompt: for the start-up gate, which compares modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo.rollout.engine import Engine
from grpo.rollout.types import Request, SamplingSettings
from grpo.rollout.vllm_model import SharedLinearMethod


class Seen(NamedTuple):
    """Of one linear layer, on the CPU in the compute dtype."""

    x: Tensor
    """[places, in]: what it took at the places asked for."""
    y: Tensor
    """[places, out]: what it gave there."""
    everywhere: Tensor | None
    """[tokens, out]: what it gave for the whole prompt, where that is asked for."""


def watched_linears(engine: Engine, prompt: Sequence[int], places: list[int], *, everywhere: bool) -> dict[str, Seen]:
    """vLLM's module name -> what it took and gave at `places` of the prompt; the results of all tokens `everywhere`.

    Cached prefixes are forgotten first, so that the whole prompt is computed.
    """
    seen: dict[str, Seen] = {}
    hooks = [
        module.register_forward_hook(remember(seen, name, len(prompt), places, everywhere))
        for name, module in engine.vllm_model().named_modules()
        if isinstance(getattr(module, "quant_method", None), SharedLinearMethod)
    ]
    try:
        engine.reset_prefix_cache()
        with engine.without_graphs():
            for _ in engine.generate([Request(0, list(prompt), seed=0)], SamplingSettings(1.0, max_tokens=1)):
                pass
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def remember(seen: dict[str, Seen], name: str, tokens: int, places: list[int], everywhere: bool) -> Callable[..., None]:
    """A hook that keeps the first pass over so many tokens."""

    def hook(module: Any, args: tuple[Any, ...], output: Any) -> None:
        x, y = args[0], output[0] if isinstance(output, tuple) else output
        x, y = x.detach().reshape(-1, x.shape[-1]), y.detach().reshape(-1, y.shape[-1])
        if name not in seen and len(x) >= tokens:
            at = torch.tensor(places, device=x.device)
            # Copies, all of them: attention turns q and k in place.
            whole = y[:tokens].to("cpu", copy=True) if everywhere else None
            seen[name] = Seen(x.index_select(0, at).cpu(), y.index_select(0, at).cpu(), whole)

    return hook
