"""Faults that a family may have in one of the two graphs, for whatever a tiny model has: what the gate has to see.

Each is a thing left out or moved, as a class that computes otherwise would have it: a scale, the adapter of a module, a
window by a token, rotary frequencies by a factor, a norm's weight, the state at a sequence's start. They are found in
the model and not listed by family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from grpo.kernels.attention import Span
from grpo.kernels.recurrence import Recurrence

ROTARY_FACTOR = 1.25
Fault = Callable[[], AbstractContextManager[None]]


@contextmanager
def changed(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, an attribute has another value."""
    kept = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, kept)


def faults(session: Any) -> dict[str, Fault]:
    """What it is -> a context inside which one graph has it."""
    graph = session.policy.decoder.model
    return (
        adapters_left_out(session)
        | scales_left_out(graph)
        | windows_moved(graph)
        | rotary_factors(graph)
        | norms_changed(graph)
        | heads_scaled(session)
        | states_kept(session)
    )


def adapters_left_out(session: Any) -> dict[str, Fault]:
    """Of each linear layer of vLLM's, and of each of the graph's."""
    served, graph = dict(session.engine.vllm_model().named_modules()), session.policy.decoder
    adapted = set(session.policy.adapter_layers())
    found: dict[str, Fault] = {}
    for name, linear in session.base.linears.items():
        if adapted & set(linear.parts):
            found[f"vLLM without the adapter of {name}"] = partial(changed, served[name], "adapter", None)
    for part in sorted(adapted):
        module = graph.get_submodule(part)
        found[f"the graph without the adapter of {part}"] = partial(changed, module, "_disable_adapters", True)
    return found


def scales_left_out(graph: nn.Module) -> dict[str, Fault]:
    """Numbers other than 1 that modules multiply by: of scores, residuals, embeddings, layers. Not what multiplies the
    last layer's output: the norm after it divides it out, so that leaving it out is no fault."""
    found: dict[str, Fault] = {}
    last = graph.layers[-1]
    for name, module in graph.named_modules():
        for key in ("scaling", "residual_multiplier", "embedding_multiplier"):
            value = getattr(module, key, None)
            if isinstance(value, float) and value != 1.0:
                found[f"{name}.{key} left out"] = partial(changed, module, key, 1.0)
        for key in ("embed_scale", "layer_scalar"):
            value = getattr(module, key, None)
            if module is last and key == "layer_scalar":
                continue
            if isinstance(value, torch.Tensor) and not bool((value == 1).all()):
                found[f"{name}.{key} left out"] = partial(changed, module, key, torch.ones_like(value))
    return found


def windows_moved(graph: nn.Module) -> dict[str, Fault]:
    """A token more, a token less, and none."""
    found: dict[str, Fault] = {}
    for name, module in graph.named_modules():
        window = getattr(module, "sliding_window", None)
        if isinstance(window, int) and window:
            for moved in (window + 1, window - 1, None):
                found[f"{name} with a window of {moved}"] = partial(changed, module, "sliding_window", moved)
    return found


def rotary_factors(graph: nn.Module) -> dict[str, Fault]:
    """Frequencies of each kind of layer, divided by a factor."""
    rotary = graph.rotary_emb
    names = [name for name, _ in rotary.named_buffers() if name.endswith("inv_freq")]
    return {
        f"{name} by a factor": partial(changed, rotary, name, rotary.get_buffer(name) / ROTARY_FACTOR) for name in names
    }


def norms_changed(graph: nn.Module) -> dict[str, Fault]:
    """Weights of norms, with one subtracted: as a family that adds one, or does not."""
    found: dict[str, Fault] = {}
    for name, module in graph.named_modules():
        weight = getattr(module, "weight", None)
        if "norm" in name.rpartition(".")[2] and isinstance(weight, nn.Parameter):
            other = nn.Parameter(weight.detach() - 1, requires_grad=False)
            found[f"{name} without one"] = partial(changed, module, "weight", other)
    return found


def heads_scaled(session: Any) -> dict[str, Fault]:
    """Logits times a factor, or without theirs."""
    processor = session.engine.vllm_model().logits_processor
    found: dict[str, Fault] = {"logits times 1.25": partial(changed, processor, "scale", processor.scale * 1.25)}
    if processor.soft_cap is not None:
        found["logits without a cap"] = partial(changed, processor, "soft_cap", None)
    return found


def states_kept(session: Any) -> dict[str, Fault]:
    """Of layers with a state: one that runs on into the next sequence, one that no completion continues, and vLLM's
    that is not emptied."""
    if not any(type(module).__name__.endswith(("GatedDeltaNet", "ShortConv")) for module in modules(session)):
        return {}

    def run_on(packing: Any) -> Recurrence:
        return Recurrence([Span(0, packing.tokens)], packing.device)

    def alone(packing: Any) -> Recurrence:
        return Recurrence([Span(span.start, span.length) for span in packing.spans], packing.device)

    return {
        "states that run on": partial(changed, Recurrence, "of", run_on),
        "states that no completion continues": partial(changed, Recurrence, "of", alone),
        **served_states(session),
    }


def served_states(session: Any) -> dict[str, Fault]:
    """vLLM's, of gated DeltaNet on a CPU."""
    from grpo.rollout import vllm_recurrence_cpu

    if not any(type(module).__name__.endswith("GatedDeltaNet") for module in modules(session)):
        return {}
    recur = vllm_recurrence_cpu.recur

    def begun(layer: Any, sequences: Any, *more: Any) -> None:
        everywhere = torch.ones(len(sequences.non_spec_query_start_loc) - 1, dtype=torch.bool)
        recur(layer, replace(sequences, has_initial_state=everywhere), *more)

    return {"states of vLLM that are not emptied": partial(changed, vllm_recurrence_cpu, "recur", begun)}


def modules(session: Any) -> list[nn.Module]:
    """Of the graph."""
    return list(session.policy.decoder.modules())
