"""What bfloat16 weights keep of small AdamW steps: by the libraries, by Kahan's sum, and by the three forms.

A matrix of SmolLM2-135M takes steps whose gradients have one sign for each weight, so that every step adds to the last;
the truth is the same in float32. Of the change: `kept`, its projection on the true one as a share of it, and `error`,
its distance from it as a share; of the weights as the optimiser has them, and of those in bfloat16 that are served.

    python -m benchmarks.weight_update --out benchmarks/results/weight_update.json

Prints a table; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.cpu_workload import MODEL
from benchmarks.common.processes import write_result
from grpo.config.schema import Model, Train
from grpo.memory.full_finetuning import FORMS
from grpo.model.source import open_source
from grpo.model.weight_source import dense
from grpo.training.weight_optimizer import WeightOptimizer, joined

WEIGHT = "model.layers.10.mlp.down_proj.weight"
BETAS = (0.9, 0.99)

Values = Callable[[], Tensor]
"""The weights as an optimiser has them, in float32."""


def gradients(like: Tensor, step: int) -> Tensor:
    """Of one sign for each weight, and of sizes that differ by step."""
    sign = torch.randn(like.shape, generator=torch.Generator().manual_seed(1)).sign()
    return sign * torch.rand(like.shape, generator=torch.Generator().manual_seed(2 + step)).add_(0.5)


def library(kind: Any, weight: nn.Parameter, rate: float) -> tuple[torch.optim.Optimizer, Values]:
    """An optimiser of torch or bitsandbytes on the weight itself."""
    return kind([weight], lr=rate, betas=BETAS, weight_decay=0.0), lambda: weight.detach().float()


def ours(form: Any, eight_bit: bool, weight: nn.Parameter, rate: float) -> tuple[torch.optim.Optimizer, Values]:
    """This project's, and its weights with their lower halves."""
    optimizer = WeightOptimizer([weight], form, Train(learning_rate=rate, weight_decay=0.0), eight_bit=eight_bit)
    state = optimizer.state[weight]

    def values() -> Tensor:
        flat = weight.detach().flatten()
        return (joined(flat, state["low"]) if "low" in state else flat.float()).view(weight.shape)

    return optimizer, values


class Kahan(torch.optim.Optimizer):
    """AdamW in float32 on a copy, each step of which is added to the bfloat16 weight by Kahan's compensated sum."""

    def __init__(self, weight: nn.Parameter, rate: float):
        super().__init__([weight], {"lr": rate})
        self.weight, self.lost = weight, torch.zeros_like(weight)
        self.exact = nn.Parameter(weight.detach().float())
        self.inner = torch.optim.AdamW([self.exact], lr=rate, betas=BETAS, weight_decay=0.0)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        before = self.exact.detach().clone()
        assert self.weight.grad is not None
        self.exact.grad = self.weight.grad.float()
        self.inner.step()
        wanted = (self.exact - before) - self.lost.float()
        moved = (self.weight.float() + wanted).bfloat16()
        self.lost.copy_(((moved.float() - self.weight.float()) - wanted).bfloat16())
        self.weight.copy_(moved)


def kahan(weight: nn.Parameter, rate: float) -> tuple[torch.optim.Optimizer, Values]:
    optimizer = Kahan(weight, rate)
    return optimizer, lambda: weight.detach().float() - optimizer.lost.float()


def systems() -> dict[str, Callable[[nn.Parameter, float], tuple[torch.optim.Optimizer, Values]]]:
    """Name -> what makes the optimiser."""
    made: dict[str, Any] = {"torch AdamW": partial(library, torch.optim.AdamW)}
    try:
        from bitsandbytes.optim import AdamW8bit

        made["bitsandbytes AdamW8bit"] = partial(library, AdamW8bit)
    except ImportError as error:
        warnings.warn(f"bitsandbytes is left out: {error}", stacklevel=1)
    made["Kahan's sum"] = kahan
    for form in FORMS:
        made[form] = partial(ours, form, False)
        made[f"{form}, 8-bit moments"] = partial(ours, form, True)
    return made


def change(found: Tensor, start: Tensor, truth: Tensor) -> dict[str, float]:
    """How much of the true change is there, and how far from it what is there."""
    moved, true = (found - start).flatten(), (truth - start).flatten()
    return {
        "kept": round(float(moved @ true / (true @ true)), 5),
        "error": round(float((moved - true).norm() / true.norm()), 5),
    }


def trained(made: Any, start: Tensor, rate: float, steps: int) -> tuple[Tensor, Tensor]:
    """(the weights as the optimiser has them, those that are served) after `steps`."""
    weight = nn.Parameter(start.clone())
    optimizer, values = made(weight, rate)
    for step in range(steps):
        weight.grad = gradients(start, step).to(weight.grad_dtype or weight.dtype)
        optimizer.step()
    return values(), weight.detach().float()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rates", default="1e-6", type=lambda text: [float(n) for n in text.split(",")])
    parser.add_argument("--steps", default="20,200", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--rows", type=int, default=64, help="rows of the matrix")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    start = dense(open_source(Model(name=MODEL)).read(WEIGHT)).bfloat16()[: options.rows].contiguous()
    result: dict[str, Any] = {"benchmark": "weight_update", "weight": WEIGHT, "rows": []}
    for rate in options.rates:
        for steps in options.steps:
            truth, _ = trained(lambda w, r: library(torch.optim.AdamW, w, r), start.float(), rate, steps)
            for name, made in systems().items():
                held, served = trained(made, start, rate, steps)
                row = {"rate": rate, "steps": steps, "system": name, **change(held, start.float(), truth)}
                row["served"] = change(served, start.float(), truth)["kept"]
                result["rows"].append(row)
                print(
                    f"{rate:g} x {steps:4} {name:28} kept {row['kept']:8.4f}  error {row['error']:8.4f}  served "
                    f"{row['served']:8.4f}", flush=True,
                )  # fmt: skip
    write_result(options.out, result)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
