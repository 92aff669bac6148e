"""LoRA as peft, vLLM and their users add it: to a product that was already rounded. For comparison in benchmarks alone.

`two_roundings()` makes both graphs of this process do so from then on. Nothing of the project can be set to it.

    python -m benchmarks.two_roundings CONFIG ...      # python -m grpo.train CONFIG ... that way
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from grpo.kernels import lora_linear, lora_sum, nf4_gemm
from grpo.kernels.lora_factors import LowRank
from grpo.kernels.lora_linear import LoraMatmul
from grpo.policy import lora_linear as policy_linear
from grpo.rollout import vllm_model as engine_model


def two_roundings() -> None:
    """Add adapters to rounded outputs from now on, in the training graph and in the rollout."""
    for module in (policy_linear, engine_model, lora_linear):
        module.dense_linear = rounded_dense_linear
    engine_model.nf4_linear = rounded_nf4_linear
    LoraMatmul.forward = rounded_forward


once = lora_sum.dense_linear


def rounded_dense_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, low_rank: LowRank | None, out: Tensor | None = None
) -> Tensor:
    y = once(x, weight, bias, None, out)
    return y if low_rank is None else y.addmm_(low_rank.x_lora_a, low_rank.b.t())


def rounded_nf4_linear(
    x: Tensor, packed: Tensor, absmax: Tensor, bias: Tensor | None, out: Tensor, low_rank: LowRank | None = None
) -> Tensor:
    nf4_gemm.nf4_linear(x, packed, absmax, bias, out)
    return out if low_rank is None else out.addmm_(low_rank.x_lora_a, low_rank.b.t())


def rounded_forward(matmul: LoraMatmul, x: Tensor, out: Tensor) -> None:
    k, bias = matmul.group.in_features, matmul.group.bias
    once(x[:, :k], matmul.weight, bias, None, out)
    if matmul.adapters:
        out.addmm_(torch.mm(x[:, :k], matmul.down.t()), matmul.up.t())


if __name__ == "__main__":
    from grpo import train

    two_roundings()
    sys.exit(train.main(sys.argv[1:]))
