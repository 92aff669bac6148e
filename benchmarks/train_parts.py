"""What the pieces of a training micro-batch cost by themselves, and what others in their place would.

Of one decoder layer of a shape, over random bf16 matrices:

    product    the wide products by rows: as the graph launches them (adapters beside each matrix), and plain
    thin       the products with adapters' factors alone
    attention  forward and backward of packed spans that share prompts
    dequant    of each NF4 matrix

    python -m benchmarks.train_parts --shape 3b --out /tmp/train_parts.json
    python -m benchmarks.train_parts --tiny
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.processes import write_result
from benchmarks.common.random_model import SHAPES, shape_config
from benchmarks.common.timing import free_memory, milliseconds, tried
from grpo.kernels import nf4
from grpo.kernels.attention import Packing, Span, packed_attention
from grpo.kernels.lora_linear import add_product

BESIDE = 64
"""Columns for adapters."""


def matrices(shape: str) -> dict[str, tuple[int, int]]:
    """Fused linear -> (out, in) features."""
    config = shape_config(shape)
    hidden, inner = config.hidden_size, config.intermediate_size
    dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    query, key = config.num_attention_heads * dim, config.num_key_value_heads * dim
    return {
        "qkv": (query + 2 * key, hidden), "o": (hidden, query), "gate_up": (2 * inner, hidden), "down": (hidden, inner)
    }  # fmt: skip


class Table:
    """Figures by name, written whenever there is a new one."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.result: dict[str, Any] = {"benchmark": "train_parts", "shape": options.shape, "figures": {}}

    def time(self, name: str, call: Callable[[], Any], *, flops: float = 0, moved: float = 0) -> None:
        """Time `call`, and say it in TFLOP/s or GB/s."""

        def measured() -> dict[str, Any]:
            ms = statistics.median(milliseconds(call, self.options.repeats, warmup=2))
            found: dict[str, Any] = {"ms": round(ms, 4)}
            if flops:
                found["tflops"] = round(flops / ms / 1e9, 1)
            if moved:
                found["gb_per_s"] = round(moved / ms / 1e6, 1)
            return found

        found = tried(measured)
        self.result["figures"][name] = found
        print(f"{name:70} {found}", flush=True)
        write_result(self.options.out, self.result)


def random(*shape: int, device: str) -> Tensor:
    return torch.randn(*shape, device=device, dtype=torch.bfloat16) * 0.02


def products(table: Table, device: str) -> None:
    for name, (n, k) in matrices(table.options.shape).items():
        matrix = random(n + BESIDE, k + BESIDE, device=device)
        plain = matrix[:n, :k].contiguous()
        turned = plain.t().contiguous()
        for rows in table.options.rows:
            flops = 2.0 * rows * n * k
            x, grad = random(rows, k + BESIDE, device=device), random(rows, n + BESIDE, device=device)
            plain_x, plain_grad = x[:, :k].contiguous(), grad[:, :n].contiguous()
            out = random(rows, n + BESIDE, device=device)[:, :n]
            place = f"{name}, {rows} rows"
            table.time(f"{place}: forward", lambda: torch.mm(x, matrix[:n].t(), out=out), flops=flops)  # noqa: B023
            table.time(f"{place}: forward, plain", lambda: plain_x @ plain.t(), flops=flops)  # noqa: B023
            table.time(f"{place}: input gradient", lambda: grad @ matrix[:, :k], flops=flops)  # noqa: B023
            table.time(f"{place}: input gradient, plain", lambda: plain_grad @ plain, flops=flops)  # noqa: B023
            table.time(f"{place}: input gradient, turned", lambda: plain_grad @ turned.t(), flops=flops)  # noqa: B023


def thin(table: Table, device: str) -> None:
    for name, (n, k) in matrices(table.options.shape).items():
        matrix = random(n + BESIDE, k + BESIDE, device=device)
        for rows in table.options.thin_rows:
            x, grad = random(rows, k + BESIDE, device=device), random(rows, n + BESIDE, device=device)
            a, b, place = matrix[n:, :k], matrix[:n, k:], f"{name}, {rows} rows"
            rank = 48 if name == "qkv" else 32 if name == "gate_up" else 16
            half, inner = x[:, k : k + rank], grad[:, n : n + rank]
            of_x, of_grad = 2.0 * rows * k, 2.0 * rows * n
            cases: dict[str, tuple[Callable[[], Any], float]] = {
                "x A^T, 64 columns beside": (lambda: torch.mm(x[:, :k], a.t(), out=x[:, k:]), of_x),  # noqa: B023
                "dy sB, 64 columns beside": (lambda: torch.mm(grad[:, :n], b, out=grad[:, n:]), of_grad),  # noqa: B023
                "x A^T again, rank columns": (lambda: x[:, :k] @ a[:rank].t(), of_x),  # noqa: B023
                "dA = (dy sB)^T x": (lambda: add_product(None, inner.t(), x[:, :k]), of_x),  # noqa: B023
                "dB = dy^T (x A^T)": (lambda: add_product(None, grad[:, :n].t(), half), of_grad),  # noqa: B023
                "dB^T = (x A^T)^T dy": (lambda: add_product(None, half.t(), grad[:, :n]), of_grad),  # noqa: B023
                "dB^T, 64 columns": (
                    lambda: add_product(None, x[:, k:].t(), grad[:, :n]), of_grad  # noqa: B023
                ),
                "dB^T in bf16": (lambda: x[:, k:].t() @ grad[:, :n], of_grad),  # noqa: B023
            }  # fmt: skip
            for case, (call, moved) in cases.items():
                table.time(f"{place}: {case}", call, moved=moved)


def attention(table: Table, device: str) -> None:
    config = shape_config(table.options.shape)
    heads, keys = config.num_attention_heads, config.num_key_value_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    prompt, completion, members = table.options.prompt, table.options.completion, 8
    for groups, shared in ((table.options.groups, True), (table.options.groups, False)):
        spans: list[Span] = []
        for _ in range(groups):
            start = spans[-1].start + spans[-1].length if spans else 0
            if not shared:
                spans += [Span(start + i * (prompt + completion), prompt + completion) for i in range(members)]
                continue
            spans.append(Span(start, prompt))
            first = spans[-1]
            spans += [first.continued(start + prompt + i * completion, completion) for i in range(members)]
        packing = Packing(spans, torch.device(device))
        pairs = sum(s.length * (s.keys - s.length) + s.length * (s.length + 1) / 2 for s in spans)
        flops = 4.0 * heads * dim * pairs
        q, k, v = (
            random(packing.tokens, count, dim, device=device).transpose(0, 1).requires_grad_()
            for count in (heads, keys, keys)
        )
        run = lambda: packed_attention(q, k, v, packing, scale=dim**-0.5)  # noqa: B023, E731
        place = f"attention of {packing.tokens} tokens, {'shared' if shared else 'plain'}"
        with torch.no_grad():
            table.time(f"{place}: forward", run, flops=flops)
        output = run()
        grad = torch.randn_like(output)
        table.time(
            f"{place}: backward",
            lambda: torch.autograd.grad(output, [q, k, v], grad, retain_graph=True),  # noqa: B023
            flops=2.5 * flops,
        )


def dequantise(table: Table, device: str) -> None:
    for name, (n, k) in matrices(table.options.shape).items():
        packed, absmax = nf4.allocate(n, k, torch.bfloat16, device)
        out = random(n, k + BESIDE, device=device)[:, :k]
        table.time(f"dequantise {name}", lambda: nf4.dequantize(packed, absmax, out), moved=2.5 * n * k)  # noqa: B023


def head(table: Table, device: str) -> None:
    """The two products of a chunk of logits, by its rows."""
    config = shape_config(table.options.shape)
    weight = random(config.vocab_size, config.hidden_size, device=device)
    for rows in table.options.chunks:
        hidden, logits = random(rows, config.hidden_size, device=device), random(rows, config.vocab_size, device=device)
        flops = 2.0 * rows * weight.numel()
        table.time(f"head, {rows} rows: logits", lambda: torch.mm(hidden, weight.t(), out=logits), flops=flops)  # noqa: B023
        table.time(f"head, {rows} rows: gradient", lambda: logits @ weight, flops=flops)  # noqa: B023


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="3b")
    parser.add_argument("--rows", default="3622,4096,4216,25296", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--thin-rows", default="4216,25296", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--chunks", default="1408,2048,2816,4096", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--groups", type=int, default=6)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--completion", type=int, default=511)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tiny", action="store_true", help="small, on a CPU: tries the script")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = "cuda"
    if options.tiny:
        device, options.shape, options.rows, options.thin_rows = "cpu", "tiny", [24], [24]
        options.chunks, options.groups, options.prompt, options.completion, options.repeats = [16], 1, 8, 4, 1
    table = Table(options)
    for part in (attention, head, thin, dequantise, products):
        found = tried(lambda part=part: part(table, device) or {})
        if found:
            print(part.__name__, found, flush=True)
        free_memory()
    print(json.dumps(table.result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
