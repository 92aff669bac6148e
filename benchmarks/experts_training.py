"""Mixtures of experts in the training graph on one GPU: correctness of a layer's experts, and where a step's time goes.

The experts of one layer of Qwen3-30B-A3B's or gpt-oss-20b's shape, values and gradients against float64 and timed with
8 to 16 thousand tokens, without adapters and with some of rank 16 on every expert; then a few decoder layers with a
LoRA adapter on attention: forward and backward with layers recomputed over a micro-batch of the step that
experts_whole.py measures, by kernel.

    python -m benchmarks.experts_training --out benchmarks/results/experts_training.json
    python -m benchmarks.experts_training --shape tiny_experts --device cpu

Random weights. Prints a line a part; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import shared_model as shared
from benchmarks.common.processes import write_result
from benchmarks.common.random_model import RandomSource, tensor_shapes
from benchmarks.common.timing import free_memory, milliseconds, tried
from grpo.config.schema import Lora, Model
from grpo.kernels.experts import ExpertAdapter, ExpertAdapters, Experts, experts_mlp, route
from grpo.kernels.glu import CLAMP, STEEPNESS
from grpo.model.base_weights import BaseWeights
from grpo.policy.policy import Policy

LAYERS = 4
GENERATIONS, PROMPT, COMPLETION = 16, 128, 512
RANK = 16
CHECKED_TOKENS = 256


class FewLayers(RandomSource):
    """A shape of random_model.py with fewer decoder layers."""

    def __init__(self, shape: str, device: torch.device, layers: int):
        super().__init__(shape, device)
        self.config.num_hidden_layers = layers
        if getattr(self.config, "layer_types", None):
            self.config.layer_types = self.config.layer_types[:layers]
        self._shapes = tensor_shapes(self.config)
        self.names = set(self._shapes)


def adapters_of(experts: Experts) -> ExpertAdapters:
    """Random ones on every expert, in what they are multiplied in."""

    def one(count: int, rows: int, columns: int) -> ExpertAdapter:
        device = experts.down.weight.device
        a = torch.randn(count, RANK, columns, device=device) * columns**-0.5
        b = torch.randn(count, rows, RANK, device=device) * 0.02
        return ExpertAdapter(*(each.to(experts.down.dtype).requires_grad_() for each in (a, b)))

    return ExpertAdapters(one(*experts.gate_up.shape), one(*experts.down.shape))


def inputs(tokens: int, experts: Experts, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, the chosen experts and their weights; x and weights want a gradient."""
    device, generator = experts.down.weight.device, torch.Generator(experts.down.weight.device).manual_seed(tokens)
    x = torch.randn(tokens, experts.gate_up.shape[2], device=device, generator=generator)
    logits = torch.randn(tokens, experts.gate_up.experts, device=device, generator=generator)
    weights, chosen = route(logits.to(experts.down.dtype), top_k, True)
    return x.to(experts.down.dtype).requires_grad_(), chosen, weights.requires_grad_()


def gated(gate_up: Tensor, activation: str) -> Tensor:
    """act(gate) * up, in torch's operators."""
    gate, up = gate_up.chunk(2, -1)
    if activation == "clamped_silu":
        gate, up = gate.clamp(max=CLAMP), up.clamp(-CLAMP, CLAMP) + 1
        return gate * torch.sigmoid(STEEPNESS * gate) * up
    return F.silu(gate) * up


def exact(x: Tensor, experts: Experts, chosen: Tensor, weights: Tensor, lora: ExpertAdapters | None) -> Tensor:
    """The same in float64 by autograd, an expert at a time, rounded nowhere."""
    result = torch.zeros(x.shape, dtype=torch.float64, device=x.device)

    def product(rows: Tensor, matrix: Any, expert: int, adapter: ExpertAdapter | None) -> Tensor:
        y = rows @ matrix.dense(expert, expert + 1)[0].double().t()
        if matrix.bias is not None:
            y = y + matrix.bias[expert].double()
        if adapter is not None:
            y = y + rows @ adapter.a[expert].double().t() @ adapter.b[expert].double().t()
        return y

    for expert in range(experts.gate_up.experts):
        token, place = (chosen == expert).nonzero(as_tuple=True)
        if len(token):
            above, below = (None, None) if lora is None else (lora.gate_up, lora.down)
            inner = gated(product(x[token].double(), experts.gate_up, expert, above), experts.activation)
            rows = product(inner, experts.down, expert, below) * weights[token, place].double()[:, None]
            result = result.index_add(0, token, rows)
    return result


def errors(experts: Experts, top_k: int, lora: ExpertAdapters | None) -> dict[str, float]:
    """Relative errors of the result and of every gradient against float64."""
    x, chosen, weights = inputs(CHECKED_TOKENS, experts, top_k)
    leaves = {"x": x, "weights": weights}
    if lora is not None and lora.gate_up is not None and lora.down is not None:
        leaves |= dict(zip(("a_above", "b_above", "a_below", "b_below"), (*lora.gate_up, *lora.down), strict=True))
    incoming = torch.randn_like(x)
    ours = experts_mlp(x, experts, chosen, weights, lora)
    wanted = exact(x, experts, chosen, weights, lora)
    pairs = {"result": (ours, wanted)}
    got = torch.autograd.grad((ours * incoming).sum(), [*leaves.values()])
    right = torch.autograd.grad((wanted * incoming.double()).sum(), [*leaves.values()])
    pairs |= dict(zip(leaves, zip(got, right, strict=True), strict=True))
    return {
        name: float((a.detach().double() - b.detach()).norm() / b.detach().norm()) for name, (a, b) in pairs.items()
    }


def layer_times(experts: Experts, top_k: int, lora: ExpertAdapters, tokens: int) -> dict[str, Any]:
    """Milliseconds of one layer's experts, and the memory that they add."""
    x, chosen, weights = inputs(tokens, experts, top_k)
    incoming = torch.randn_like(x)

    def both(each: ExpertAdapters | None) -> None:
        experts_mlp(x, experts, chosen, weights, each).backward(incoming)

    def forward() -> None:
        with torch.no_grad():
            experts_mlp(x, experts, chosen, weights)

    found = {"forward": forward, "forward_backward": lambda: both(None), "with_adapters": lambda: both(lora)}
    times = {name: round(sorted(milliseconds(call, 5))[2], 3) for name, call in found.items()}
    flops = 2 * tokens * top_k * sum(rows * columns for _, rows, columns in (experts.gate_up.shape, experts.down.shape))
    return {"tokens": tokens, "ms": times, "forward_tflops": round(flops / times["forward"] / 1e9, 1)}


def micro_batch(policy: Policy, options: argparse.Namespace) -> Any:
    """A call: forward and backward over completions in pairs of groups."""
    generator = torch.Generator().manual_seed(1)
    vocabulary = policy.base.config.vocab_size

    def drawn(tokens: int) -> list[int]:
        return torch.randint(10, vocabulary, (tokens,), generator=generator).tolist()

    prompts = [drawn(options.prompt) for _ in range(2)]
    prompts = [prompts[number * 2 // options.generations] for number in range(options.generations)]
    completions = [drawn(options.completion) for _ in range(options.generations)]

    def call() -> None:
        policy.score(prompts, completions, temperature=1.0).logprobs.mean().backward()

    return call


def by_kernel(call: Any) -> dict[str, Any]:
    """Milliseconds of every kernel in one call, and of the call from its first to its last."""
    activity = torch.profiler.ProfilerActivity
    shared.synchronize()
    with torch.profiler.profile(activities=[activity.CUDA, activity.CPU]) as profiler:
        call()
        shared.synchronize()
    times: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    starts, ends = [], []
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[event.name[:120]] += event.device_time / 1e3
            calls[event.name[:120]] += 1
            starts.append(event.time_range.start)
            ends.append(event.time_range.end)
    table = [{"kernel": name, "ms": round(ms, 3), "calls": calls[name]} for name, ms in times.most_common(45)]
    span = (max(ends) - min(starts)) / 1e3 if ends else 0.0
    return {"busy_ms": round(sum(times.values()), 2), "span_ms": round(span, 2), "kernels": table}


def graph_times(base: BaseWeights, options: argparse.Namespace) -> dict[str, Any]:
    """Forward and backward of the few layers, with each recomputed."""
    policy = Policy(base, Lora(r=16, lora_alpha=32), seed=0)
    shared.randomize_adapter(policy)
    policy.recompute_layers("layer")
    policy.model.train()
    call = micro_batch(policy, options)
    times = milliseconds(call, 3)
    return {"layers": options.layers, "ms": [round(each, 2) for each in times]} | by_kernel(call)


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", default="30b_a3b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    tiny = options.device == "cpu"
    options.generations, options.prompt, options.completion = (4, 8, 8) if tiny else (GENERATIONS, PROMPT, COMPLETION)
    device = torch.device(options.device)
    source = FewLayers(options.shape, device, options.layers)
    model = Model(name="random", load_in_4bit=True)
    base = BaseWeights(source, model, device=device, dtype=torch.bfloat16)
    free_memory()
    stack = next(iter(base.experts.values()))
    experts, top_k = stack.experts, stack.routing.top_k
    lora = adapters_of(experts)
    result: dict[str, Any] = {"benchmark": "experts_training", "shape": options.shape}

    def note(name: str, found: Any) -> None:
        result[name] = found
        write_result(options.out, result)
        print(name, {key: value for key, value in found.items() if key != "kernels"}, flush=True)

    for name, each in (("errors", None), ("errors_with_adapters", lora)):
        note(name, tried(lambda each=each: errors(experts, top_k, each)))
    for tokens in (64,) if tiny else (8448, 16896):
        note(f"layer_{tokens}", tried(lambda tokens=tokens: layer_times(experts, top_k, lora, tokens)))
    note("graph", tried(lambda: graph_times(base, options)))
    for row in result["graph"].get("kernels", ())[:40]:
        print(f"{row['ms']:9.3f} ms {row['calls']:6}x  {row['kernel'][:100]}")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
