"""Qwen3.5-4B's shape with random weights on one GPU: the recurrent operators, both graphs on one NF4 copy, and speed.

    python -m benchmarks.hybrid --out benchmarks/results/hybrid.json
    python -m benchmarks.hybrid --tiny

- `operators`: the gated delta rule and the convolution over a packed row whose sequences share prompts, against the
  rule written out token by token in float64 on the CPU, with every gradient; then their time and memory at full size.
- `modules`: both graphs, what each kind of module alone differs by, what the stream between layers does by depth, and
  how far the training graph is from itself where the order of sums is another; with the adapter and without.
- `nf4`: one NF4 copy, an adapter on all linear layers that does something; sampled against trained logprobs (bar: a
  KL of 0.002), tokens a second, and whether prompts are reused.
- `bf16`: tokens a second of the same classes without quantisation and without an adapter; NF4's have to be as many.

Each part has a process of its own. Prints a table; the last line is one JSON object. How training's memory compares
with its plan: `python -m benchmarks.memory_plan --shapes qwen3.5-4b`.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from benchmarks.common import rows
from benchmarks.common.rows import Job, Row

if TYPE_CHECKING:
    import torch

    from grpo.kernels.recurrence import Recurrence

MISMATCH_BAR, SPEED_BAR = 0.002, 1.0
PROMPT = 512


def jobs_of(options: argparse.Namespace) -> list[Job]:
    return [[{"part": part}] for part in options.parts]


def measurer(options: argparse.Namespace) -> Callable[[Row], Row]:
    parts = {"operators": operators, "modules": modules, "nf4": served, "bf16": served}
    return lambda row: row | parts[row["part"]](row, options)


# Operators


def tree(options: argparse.Namespace, prompts: int, prompt: int, completions: int, completion: int) -> Recurrence:
    """A row of prompts, each with its completions after it."""
    import torch

    from grpo.kernels.recurrence import Recurrence
    from grpo.policy.packing import PackedRow

    row = PackedRow()
    for number in range(prompts):
        row.append([0] * prompt, 0, number)
        shared = row.spans[-1]
        for _ in range(completions):
            row.append([0] * completion, prompt, number, shared)
    return Recurrence(row.spans, torch.device(options.device))


def drawn(recurrence: Recurrence, heads: tuple[int, int], dim: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """query, key, value, decay, beta of a row."""
    import torch

    generator = torch.Generator().manual_seed(0)
    tokens, (key_heads, value_heads) = recurrence.tokens, heads

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    parts = [normal(tokens, key_heads, dim), normal(tokens, key_heads, dim), normal(tokens, value_heads, dim)]
    parts = [part.to(dtype) for part in parts]
    decay = -torch.rand(tokens, value_heads, generator=generator) * torch.logspace(-4, 0.5, value_heads)
    return [
        part.to(recurrence.device) for part in (*parts, decay, torch.sigmoid(normal(tokens, value_heads)).to(dtype))
    ]


def written_out(parts: list[torch.Tensor], recurrence: Recurrence) -> torch.Tensor:
    """The gated delta rule token by token."""
    import torch

    from grpo.kernels.gated_delta import unit

    query, key, value, decay, beta = parts
    shared = value.shape[1] // key.shape[1]
    query, key = (unit(part).repeat_interleave(shared, 1) for part in (query, key))
    states: dict[int, torch.Tensor] = {}
    outputs = []
    for span in recurrence.spans:
        empty = value.new_zeros(value.shape[1], key.shape[2], value.shape[2])
        state = states[span.prefix_start] if span.prefix_length else empty
        for token in range(span.start, span.start + span.length):
            state = state * decay[token].exp()[:, None, None]
            news = (value[token] - (state * key[token][:, :, None]).sum(1)) * beta[token][:, None]
            state = state + key[token][:, :, None] * news[:, None]
            outputs.append((state * query[token][:, :, None]).sum(1) * key.shape[2] ** -0.5)
        states[span.start] = state
    return torch.stack(outputs)


def errors(options: argparse.Namespace, dtype: torch.dtype, form: str) -> dict[str, float]:
    """Relative differences of result and gradients from the rule written out in float64, of the form that is named."""
    import torch

    from grpo.kernels.gated_delta import FORMS

    recurrence = tree(options, 2, 150, 2, 70)
    ours = [part.requires_grad_() for part in drawn(recurrence, (1, 2), 32 if options.tiny else 128, dtype)]
    exact = [part.detach().cpu().double().requires_grad_() for part in ours]
    result, expected = FORMS[form].apply(recurrence, *ours), written_out(exact, recurrence)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = torch.autograd.grad(result, ours, weight.to(result))
    wanted = torch.autograd.grad((expected * weight.to(dtype).double()).sum(), exact)
    pairs = zip(("y", "query", "key", "value", "decay", "beta"), (result, *grads), (expected, *wanted), strict=True)
    return {
        name: float((one.detach().cpu().double() - other).norm() / other.detach().norm()) for name, one, other in pairs
    }


def operators(row: Row, options: argparse.Namespace) -> Row:
    import torch

    from benchmarks.common.timing import measure, tried
    from grpo.kernels.gated_delta import FORMS
    from grpo.kernels.launch import disable_reduced_precision
    from grpo.kernels.short_conv import short_conv

    disable_reduced_precision()
    found: Row = {}
    forms = ["torch"] if options.device == "cpu" else list(FORMS)
    for form, dtype in itertools.product(forms, (torch.float32, torch.bfloat16)):
        if form == "torch" or dtype == torch.bfloat16:
            name = f"errors {form} {str(dtype).removeprefix('torch.')}"
            found[name] = tried(lambda dtype=dtype, form=form: errors(options, dtype, form))
            rows.tell(row | found)
    recurrence = tree(options, *((1, 20, 2, 10) if options.tiny else (4, 512, 8, 192)))
    heads, dim, channels = ((1, 2), 32, 128) if options.tiny else ((16, 32), 128, 8192)
    parts = [part.requires_grad_() for part in drawn(recurrence, heads, dim, torch.bfloat16)]
    x = torch.randn(recurrence.tokens, channels, device=recurrence.device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(channels, 4, device=recurrence.device, dtype=torch.bfloat16)
    calls: dict[str, tuple[Callable[[], torch.Tensor], list[torch.Tensor]]] = {
        **{f"delta {form}": (lambda form=form: FORMS[form].apply(recurrence, *parts), parts) for form in forms},
        "conv": (lambda: short_conv(x, weight, None, recurrence, silu=True), [x]),
    }
    for name, (call, leaves) in calls.items():

        def both(call: Any = call, leaves: Any = leaves) -> None:
            result = call()
            torch.autograd.grad(result, leaves, result.detach())

        found[f"{name} forward"] = tried(lambda call=call: measure(lambda: call().detach(), 5))
        found[f"{name} both"] = tried(lambda both=both: measure(both, 5))
        rows.tell(row | found)
    return found | {"tokens": recurrence.tokens}


# Both graphs


def modules(row: Row, options: argparse.Namespace) -> Row:
    """Where the two graphs differ."""
    import torch

    from benchmarks.common import module_differences, shared_model
    from benchmarks.common.random_model import RandomSource
    from benchmarks.common.timing import tried
    from grpo.config.schema import Lora, Model
    from grpo.model.base_weights import BaseWeights
    from grpo.policy.policy import Policy
    from grpo.rollout.engine import Engine, EngineSettings, SamplingSettings

    device, shape = torch.device(options.device), "tiny_hybrid" if options.tiny else options.shape
    model = Model(name="random", load_in_4bit=not options.sixteen_bit)
    base = BaseWeights(RandomSource(shape, device), model, device=device, dtype=torch.bfloat16)
    policy = Policy(base, Lora(r=options.rank, lora_alpha=2 * options.rank), seed=0)
    shared_model.randomize_adapter(policy)
    prompt, new = (48, 16) if options.tiny else (256, 128)
    engine = Engine(base, policy, EngineSettings(max_seq_length=prompt + new, max_num_seqs=16, enforce_eager=True))
    requests = shared_model.random_requests(1000, 8, prompt, seed=3)
    prompts = [request.prompt_ids for request in requests]
    found: Row = {"differences": tried(lambda: module_differences.differences(engine, policy, prompts[0], new))}
    rows.tell(row | found)
    found["agreement"] = tried(lambda: shared_model.agreement(engine, policy, prompts, new))

    def without() -> Any:
        done = list(engine.generate(requests, SamplingSettings(1.0, new), adapter=False))
        with policy.model.disable_adapter(), torch.no_grad():
            gaps = [
                policy.score([prompts[one.request_id]], [one.token_ids], temperature=1.0).logprobs.double().cpu()
                - torch.tensor(one.logprobs, dtype=torch.float64)
                for one in done
            ]
        return shared_model.mismatch(gaps, new)

    found["agreement without adapter"] = tried(without)
    rows.tell(row | found)
    completions = [ids[:new] for ids in prompts]
    found["own spread"] = tried(lambda: module_differences.own_spread(policy, prompts, completions))
    engine.close()
    return found


def served(row: Row, options: argparse.Namespace) -> Row:
    """One copy of the weights in both graphs, or vLLM's alone in 16 bit."""
    import torch

    from benchmarks.common import shared_model
    from benchmarks.common.random_model import RandomSource
    from benchmarks.common.timing import tried
    from grpo.config.schema import Lora, Model
    from grpo.model.base_weights import BaseWeights
    from grpo.policy.policy import Policy
    from grpo.rollout.engine import Engine, EngineSettings

    four_bit, device = row["part"] == "nf4", torch.device(options.device)
    shape, new = ("tiny_hybrid", 16) if options.tiny else (options.shape, options.new_tokens)
    prompt = 48 if options.tiny else PROMPT
    base = BaseWeights(
        RandomSource(shape, device), Model(name="random", load_in_4bit=four_bit), device=device, dtype=torch.bfloat16
    )
    policy = Policy(base, Lora(r=options.rank, lora_alpha=2 * options.rank), seed=0) if four_bit else None
    if policy is not None:
        shared_model.randomize_adapter(policy)
    settings = EngineSettings(
        max_seq_length=prompt + new, max_num_seqs=max(options.counts), release_kv_cache=True, seed=0
    )
    engine = Engine(base, policy, settings)
    found: Row = {"weights": base.nbytes(), "kv_cache": engine.kv_bytes()}
    rows.tell(row | found)
    if policy is not None:
        found["identity"] = tried(lambda: shared_model.identity(engine, policy))
        prompts = [request.prompt_ids for request in shared_model.random_requests(1000, 8, prompt, seed=3)]
        found["agreement"] = tried(lambda: shared_model.agreement(engine, policy, [*prompts, *prompts], new))
        engine.release_kv_cache()
        found["after release"] = tried(lambda: shared_model.agreement(engine, policy, prompts[:4], new))
        rows.tell(row | found)
    for count in options.counts:
        found[f"rollout {count}"] = tried(lambda count=count: shared_model.throughput(engine, count, prompt, new))
        rows.tell(row | found)
    if device.type == "cuda":
        found["memory"] = tried(lambda: shared_model.memory_parts(engine, policy))
    engine.close()
    return found


def line(row: Row) -> str:
    figures = {name: value for name, value in row.items() if name not in ("part", "identity", "memory")}
    return f"{row['part']}: " + "; ".join(f"{name} {value}" for name, value in figures.items())


def conclude(measured: list[Row]) -> Row:
    """The bars."""
    by_part = {row["part"]: row for row in measured}
    nf4, bf16 = by_part.get("nf4", {}), by_part.get("bf16", {})
    ratios = {}
    for name in nf4.keys() & bf16.keys():
        both = [part[name].get("decode_tokens_per_second") for part in (nf4, bf16) if isinstance(part[name], dict)]
        if len(both) == 2 and all(both):
            ratios[name] = round(both[0] / both[1], 3)
    kl = nf4.get("agreement", {}).get("mismatch_kl")
    return {
        "benchmark": "hybrid", "nf4 over bf16": ratios, "mismatch_kl": kl,
        "within_bars": kl is not None and kl < MISMATCH_BAR and all(ratio >= SPEED_BAR for ratio in ratios.values()),
    }  # fmt: skip


def main() -> int:
    parser = rows.parser(__doc__, rank=16, chunk=1024)
    parser.add_argument("--shape", default="qwen3.5-4b")
    parser.add_argument("--parts", default="operators,modules,nf4,bf16", type=rows.words)
    parser.add_argument("--sixteen-bit", action="store_true", help="`modules` of a base that is not quantised")
    parser.add_argument("--counts", default="32,128", type=lambda text: [int(n) for n in rows.words(text)])
    parser.add_argument("--new-tokens", type=int, default=256)
    options = parser.parse_args()
    if options.tiny:
        options.device, options.counts = "cpu", [2, 3]
    return rows.run(options, jobs_of(options), measurer, line, conclude)


if __name__ == "__main__":
    sys.exit(main())
