"""How far apart vLLM and the training graph are, by kind of module, depth, and whether a token was sampled or given.

Every decoder layer's mixer and MLP of the training graph is given what vLLM's was given, so that each difference is of
that module alone; and, apart, the stream between layers as it comes through all layers before. vLLM has to run without
CUDA graphs, whose replays call no module. Of a mixture of experts both have those that sampling chose. Nothing here
loads a model.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from grpo.policy.policy import Policy
from grpo.rollout.engine import Completion, Engine, Request, SamplingSettings

KINDS = ("linear_attn", "self_attn", "conv", "mlp")
LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)(?:\.(\w+))?")


def watched(model: nn.Module) -> Iterator[tuple[tuple[int, str], nn.Module]]:
    """((layer, kind), module) of a decoder; the kind of a whole layer is "stream"."""
    for name, module in model.named_modules():
        found = LAYER.fullmatch(name)
        if found and (found[2] is None or found[2] in KINDS):
            yield (int(found[1]), found[2] or "stream"), module


def first(value: Any) -> Tensor:
    return value[0] if isinstance(value, tuple) else value


def taken(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


@contextmanager
def hooked(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def vllms(engine: Engine, prompt: list[int], new_tokens: int) -> tuple[Completion, dict[Any, tuple[Tensor, Tensor]]]:
    """(What was sampled, (layer, kind) -> what it took and gave at all tokens)."""
    parts: dict[Any, list[tuple[Tensor, Tensor]]] = defaultdict(list)

    def remember(key: tuple[int, str]) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if key[1] == "stream":  # of vLLM's pair, the sum is the stream
                x, y = args[0], (output[0] + output[1]) if isinstance(output, tuple) else output
            else:
                x, y = taken(args, kwargs), first(output)
            parts[key].append((x.detach().clone(), y.detach().clone()))

        return hook

    handles = [
        module.register_forward_hook(remember(key), with_kwargs=True) for key, module in watched(engine.vllm_model())
    ]
    with hooked(handles):
        (done,) = engine.generate([Request(0, prompt, 7)], SamplingSettings(1.0, new_tokens))
    seen = {key: tuple(torch.cat(both) for both in zip(*calls, strict=True)) for key, calls in parts.items()}
    return done, seen  # type: ignore[return-value]


@torch.no_grad()
def differences(engine: Engine, policy: Policy, prompt: list[int], new_tokens: int) -> dict[str, Any]:
    """Relative differences: of each kind of module alone (mean over layers, worst layer) and of the stream by depth,
    at given and at sampled tokens; and the mean square of the logprobs' difference."""
    done, seen = vllms(engine, prompt, new_tokens)
    ids, routes, given = list(done.token_ids), None if done.routes is None else [done.routes], len(prompt)
    alone: dict[str, dict[str, list[float]]] = defaultdict(lambda: {"given": [], "sampled": []})
    stream: dict[int, tuple[float, float]] = {}

    def compare(ours: Tensor, theirs: Tensor) -> tuple[float, float]:
        count = min(len(ours), len(theirs))
        gap = (ours[:count].double() - theirs[:count].double()).norm(dim=1)
        size = theirs[:count].double().norm(dim=1)
        relative = gap / size
        return relative[:given].mean().item(), relative[given:].mean().item()

    def replace(key: tuple[int, str]) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            own = taken(args, kwargs)
            x = own.clone()
            count = min(x.shape[1], len(seen[key][0]))
            x[0, :count] = seen[key][0][:count]
            if "hidden_states" in kwargs:
                return args, {**kwargs, "hidden_states": x}
            return (x, *args[1:]), kwargs

        return hook

    def measure(key: tuple[int, str]) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            found = compare(first(output)[0], seen[key][1])
            if key[1] == "stream":
                stream[key[0]] = found
            else:
                for where, size in zip(("given", "sampled"), found, strict=True):
                    alone[key[1]][where].append(size)

        return hook

    ours = list(watched(policy.decoder.model))
    streams = [
        module.register_forward_hook(measure(key), with_kwargs=True) for key, module in ours if key[1] == "stream"
    ]
    with hooked(streams):
        scored = policy.score([prompt], [ids], temperature=1.0, routes=routes).logprobs
    parts = [(key, module) for key, module in ours if key[1] != "stream" and key in seen]
    handles = [module.register_forward_pre_hook(replace(key), with_kwargs=True) for key, module in parts]
    handles += [module.register_forward_hook(measure(key), with_kwargs=True) for key, module in parts]
    with hooked(handles):
        policy.score([prompt], [ids], temperature=1.0, routes=routes)
    gap = scored.double().cpu() - torch.tensor(done.logprobs, dtype=torch.float64)
    return {
        "alone": {
            kind: {where: [sum(sizes) / len(sizes), max(sizes)] for where, sizes in both.items()}
            for kind, both in alone.items()
        },
        "stream": {layer: [round(size, 6) for size in both] for layer, both in sorted(stream.items())},
        "logprobs": gap.square().mean().sqrt().item(),
    }


@torch.no_grad()
def own_spread(policy: Policy, prompts: list[list[int]], completions: list[list[int]]) -> float:
    """k3 between the training graph and itself, each sequence in a row of its own and all in one row: what the order of
    sums alone makes of it."""
    together = policy.score(prompts, completions, temperature=1.0).logprobs.double()
    apart = [
        policy.score([prompt], [ids], temperature=1.0).logprobs
        for prompt, ids in zip(prompts, completions, strict=True)
    ]
    gap = together - torch.cat(apart).double()
    return (gap.exp() - gap - 1).mean().item()
