"""Time and peak memory of every training kernel against the torch modules that it replaces.

One layer of Llama-3.1-8B or 3.2-3B with NF4 weights and LoRA of rank 16, forward and backward together, over 16,384
tokens. The torch form is what `train.kernels = "torch"` runs: transformers' operations over the same weights.

    python -m benchmarks.train_kernels                       # a table, then one line of JSON
    python -m benchmarks.train_kernels --dry                 # tiny, on a CPU: tries the script
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from benchmarks.common.processes import write_result
from benchmarks.common.random_model import SHAPES, shape_config
from benchmarks.common.timing import free_memory, measure, tried
from grpo.kernels import nf4
from grpo.kernels.glu import glu
from grpo.kernels.lora_attention import QkvProjection, lora_qkv
from grpo.kernels.lora_factors import Adapter
from grpo.kernels.lora_linear import LinearGroup, lora_linear
from grpo.kernels.lora_mlp import GatedMlp, lora_mlp
from grpo.kernels.rms_norm import Norm, rms_norm
from grpo.kernels.rope import rope
from grpo.model.layout import fused_linears
from grpo.model.sizes import linear_shapes

Pair = dict[str, Callable[..., Any]]


class Bench:
    """Random weights and inputs of one layer."""

    def __init__(self, shape: str, tokens: int, rank: int, device: str):
        self.config, self.tokens, self.rank, self.device = shape_config(shape), tokens, rank, device
        self.hidden, self.inner = self.config.hidden_size, self.config.intermediate_size
        self.heads, self.shared = self.config.num_attention_heads, self.config.num_key_value_heads
        self.norm = LlamaRMSNorm(self.hidden).to(device, torch.bfloat16).requires_grad_(False)
        self.our_norm = Norm(self.norm.weight, self.norm.variance_epsilon)
        phase = torch.outer(torch.arange(tokens).float(), torch.logspace(0, -4, self.config.head_dim // 2))
        phase = torch.cat([phase, phase], -1).to(device)
        self.cos, self.sin = phase.cos().bfloat16(), phase.sin().bfloat16()
        self.groups = {name.rpartition(".")[2]: self.group(name, parts) for name, parts in
                       list(fused_linears(self.config).items())[:4]}  # fmt: skip

    def group(self, name: str, parts: list[str]) -> tuple[LinearGroup, list[Adapter], list[Tensor]]:
        sizes = linear_shapes(self.config)
        shapes = [sizes[part] for part in parts]
        rows, columns = sum(shape[0] for shape in shapes), shapes[0][1]
        stored = nf4.allocate(rows, columns, torch.bfloat16, self.device)
        nf4.quantize_rows(*stored, 0, torch.randn(rows, columns, dtype=torch.bfloat16, device=self.device) * 0.02)
        adapters, factors, first = [], [], 0
        for count, _ in shapes:
            adapters.append(Adapter(first, count, 2.0))
            a, b = torch.randn(self.rank, columns) * 0.02, torch.randn(count, self.rank) * 0.02
            factors += [factor.to(self.device).requires_grad_() for factor in (a, b)]
            first += count
        return LinearGroup((stored,)), adapters, factors

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16, device=self.device).requires_grad_()

    def plain(self, name: str, x: Tensor) -> list[Tensor]:
        """The group's outputs as the graph without kernels makes them, part by part."""
        group, adapters, factors = self.groups[name]
        outputs = []
        for index, adapter in enumerate(adapters):
            a, b = factors[2 * index], factors[2 * index + 1] * adapter.scale
            y = PlainLinear.apply(x, group, adapter)
            outputs.append(y + F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)))
        return outputs

    def pairs(self) -> dict[str, tuple[list[Tensor], Pair]]:
        """Name -> inputs, and what to run on them by form."""
        x = self.randn(self.tokens, self.hidden)
        return {
            "rms_norm": ([x], {"torch": self.norm, "triton": lambda x: rms_norm(x, self.our_norm)}),
            "rope": self.rope_pair(),
            "glu": (
                [self.randn(self.tokens, 2 * self.inner)],
                {
                    "torch": lambda y: F.silu(y[:, : self.inner]) * y[:, self.inner :],
                    "triton": lambda y: glu(y, "silu"),
                },
            ),
            "lora_linear (o)": (
                [self.randn(self.tokens, self.heads * self.config.head_dim), x],
                {
                    "torch": lambda a, x: x + self.plain("o_proj", a)[0],
                    "triton": lambda a, x: lora_linear(a, *self.groups["o_proj"]) + x,
                },
            ),
            "lora_qkv": self.qkv_pair(x),
            "lora_mlp": self.mlp_pair(x),
        }

    def rope_pair(self) -> tuple[list[Tensor], Pair]:
        q, k = (self.randn(self.tokens, heads, self.config.head_dim) for heads in (self.heads, self.shared))

        def torch_form(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
            turned = (part.transpose(0, 1)[None] for part in (q, k))
            return apply_rotary_pos_emb(*turned, self.cos[None], self.sin[None])

        return [q, k], {
            "torch": torch_form,
            "triton": lambda q, k: (rope(q, self.cos, self.sin), rope(k, self.cos, self.sin)),
        }

    def qkv_pair(self, x: Tensor) -> tuple[list[Tensor], Pair]:
        group, adapters, factors = self.groups["qkv_proj"]
        projection = QkvProjection(group, self.heads, self.shared, self.our_norm)

        def torch_form(x: Tensor) -> tuple[Tensor, ...]:
            q, k, v = (part.view(self.tokens, -1, self.config.head_dim).transpose(0, 1)[None]
                       for part in self.plain("qkv_proj", self.norm(x)))  # fmt: skip
            return (*apply_rotary_pos_emb(q, k, self.cos[None], self.sin[None]), v)

        return [x], {
            "torch": torch_form,
            "triton": lambda x: lora_qkv(x, self.cos, self.sin, projection, adapters, factors),
        }

    def mlp_pair(self, x: Tensor) -> tuple[list[Tensor], Pair]:
        (above, above_adapters, above_factors), (below, below_adapters, below_factors) = (
            self.groups["gate_up_proj"], self.groups["down_proj"],
        )  # fmt: skip
        mlp = GatedMlp(above, below, "silu", self.our_norm, residual=True)
        adapters, factors = (above_adapters, below_adapters), [*above_factors, *below_factors]

        def torch_form(x: Tensor) -> Tensor:
            gate, up = self.plain("gate_up_proj", self.norm(x))
            return x + self.plain("down_proj", F.silu(gate) * up)[0]

        return [x], {
            "torch": torch_form,
            "triton": lambda x: lora_mlp(x, mlp, adapters, factors, keep=True),
            "triton, gate and up again": lambda x: lora_mlp(x, mlp, adapters, factors, keep=False),
        }


class PlainLinear(torch.autograd.Function):
    """One part of a packed group by itself, dequantised in both directions."""

    @staticmethod
    def weight(group: LinearGroup, adapter: Adapter) -> Tensor:
        (packed, absmax) = group.segments[0]
        rows = slice(adapter.first, adapter.first + adapter.rows)
        assert absmax is not None
        return nf4.dequantize(packed[rows], absmax[rows])

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: LinearGroup, adapter: Adapter) -> Tensor:
        ctx.of = group, adapter
        return F.linear(x, PlainLinear.weight(group, adapter))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad @ PlainLinear.weight(*ctx.of), None, None


def both_ways(form: Callable[..., Any], inputs: list[Tensor], leaves: list[Tensor]) -> Callable[[], None]:
    """A call that runs `form` on `inputs` and its backward with a fixed gradient, and drops the results."""
    with torch.no_grad():
        outputs = form(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = [torch.randn_like(output) * 0.01 for output in outputs]

    def call() -> None:
        found = form(*inputs)
        torch.autograd.backward(found if isinstance(found, tuple) else (found,), grads)
        for leaf in leaves:
            leaf.grad = None

    return call


def run(options: argparse.Namespace, figures: dict[str, Any], save: Callable[[], None]) -> None:
    """Name -> form -> figures, for one shape; saved after each."""
    bench = Bench(options.shape, options.tokens, options.rank, options.device)
    factors = [factor for _, _, factors in bench.groups.values() for factor in factors]
    for name, (inputs, forms) in bench.pairs().items():
        figures[name] = {}
        for form, function in forms.items():
            leaves = [*inputs, *factors]
            figures[name][form] = tried(
                lambda function=function, leaves=leaves, inputs=inputs: measure(
                    both_ways(function, inputs, leaves), options.repeats
                )
            )
        free_memory()
        save()


def show(figures: dict[str, Any]) -> None:
    for name, forms in figures.items():
        for form, entry in forms.items():
            if "ms" not in entry:
                print(f"{name:16} {form:26} {entry['error']}")
                continue
            ratio = forms["torch"]["ms"] / entry["ms"] if "ms" in forms["torch"] else float("nan")
            print(f"{name:16} {form:26} {entry['ms']:9.3f} ms  {entry['extra_bytes'] / 1e9:6.2f} GB  {ratio:5.2f}x")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="8b")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dry", action="store_true", help="tiny and on a CPU")
    parser.add_argument("--out", type=Path, help="write the result there too, as JSON")
    options = parser.parse_args()
    options.device = "cuda"
    if options.dry:
        options.shape, options.tokens, options.repeats, options.device = "tiny", 64, 2, "cpu"
    figures: dict[str, Any] = {}
    result = {
        "benchmark": "train_kernels",
        "settings": {"shape": options.shape, "tokens": options.tokens, "lora_rank": options.rank},
        "kernels": figures,
    }
    run(options, figures, lambda: write_result(options.out, result))
    show(figures)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
