"""A 16-bit linear with its adapter at a decoding step's rows: four ways, microseconds from cold memory on this GPU.

    cublas        x W^T alone, without an adapter
    twice         x W^T rounded, then the adapter added to it and rounded again, as peft and vLLM's LoRA do
    two launches  x W^T left in float32, then a kernel that adds the adapter and rounds (kernels/lora_sum.py)
    fused         one kernel (kernels/dense_gemm.py)

The linears of three models' layers, fused as vLLM fuses them, adapters of rank 16 (so 48 columns for q, k, v).

    python -m benchmarks.dense_gemm --out benchmarks/results/dense_gemm.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.nf4_weights import copies_for, microseconds, random_weight
from grpo.kernels.dense_gemm import MOST_ROWS, dense_gemm, split_of
from grpo.kernels.launch import disable_reduced_precision
from grpo.kernels.lora_factors import LowRank
from grpo.kernels.lora_sum import round_sum

SHAPES = {
    "0.5B": {"qkv": (1152, 896, 48), "o": (896, 896, 16), "gate_up": (9728, 896, 32), "down": (896, 4864, 16)},
    "3B": {"qkv": (5120, 3072, 48), "o": (3072, 3072, 16), "gate_up": (16384, 3072, 32), "down": (3072, 8192, 16)},
    "8B": {"qkv": (6144, 4096, 48), "o": (4096, 4096, 16), "gate_up": (28672, 4096, 32), "down": (4096, 14336, 16)},
}
ROWS = (1, 8, 16, 32, 64)
WAYS = ("cublas", "twice", "two launches", "fused")


def measure(features: int, columns: int, ranks: int, rows: int) -> dict[str, float]:
    """Microseconds of each way for W [features, columns], and the largest error of the fused one in units of y's."""
    weights = [random_weight(features, columns) for _ in range(copies_for(2 * features * columns))]
    x = torch.randn(rows, columns, dtype=torch.bfloat16, device="cuda")
    b = torch.randn(features, ranks, dtype=torch.bfloat16, device="cuda") * 0.01
    low_rank = LowRank(torch.randn(rows, ranks, dtype=torch.bfloat16, device="cuda"), b)
    out = x.new_empty(rows, features)
    calls = (
        lambda w: torch.mm(x, w.t(), out=out),
        lambda w: torch.mm(x, w.t(), out=out).addmm_(low_rank.x_lora_a, b.t()),
        lambda w: round_sum(torch.mm(x, w.t(), out_dtype=torch.float32), None, low_rank, out),
        lambda w: dense_gemm(x, w, None, low_rank, out),
    )
    times = {name: round(microseconds(weights, call, 4.0), 2) for name, call in zip(WAYS, calls, strict=True)}
    dense_gemm(x, weights[0], None, low_rank, out)
    exact = x.double() @ weights[0].double().t() + low_rank.x_lora_a.double() @ b.double().t()
    error = (out.double() - exact).abs() / exact.abs().clamp(min=exact.abs().mean())
    return times | {"largest error": round(error.max().item(), 5), "split": split_of(features, columns)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help=f"at most {MOST_ROWS}")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    disable_reduced_precision()
    found: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "models": {}}
    for model, shapes in SHAPES.items():
        for rows in map(int, options.rows.split(",")):
            layer = {name: measure(*shape, rows) for name, shape in shapes.items()}
            whole = {
                way: round(sum(part[way] for part in layer.values()), 1) for way in layer["qkv"] if way[0] in "ctf"
            }
            found["models"].setdefault(model, {})[str(rows)] = layer | {"layer": whole}
            print(model, rows, json.dumps(whole), {name: part["fused"] for name, part in layer.items()}, flush=True)
            if options.out:
                options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
