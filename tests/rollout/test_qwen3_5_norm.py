"""The norm of vLLM's decoder of Qwen 3.5: the residual stays float32, as in the training graph."""

import pytest
import torch
from torch import nn

pytest.importorskip("vllm")

from grpo.kernels.rms_norm import Norm as Reference  # noqa: E402
from grpo.rollout.vllm_qwen3_5 import Norm  # noqa: E402


def norm_of(weight: torch.Tensor) -> Norm:
    norm = Norm.__new__(Norm)
    nn.Module.__init__(norm)
    norm.weight, norm.variance_epsilon = nn.Parameter(weight, requires_grad=False), 1e-6
    return norm


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 600])
def test_a_sum_is_kept_as_it_is_and_normed(rows: int, first: bool, dtype: torch.dtype) -> None:
    weight = torch.randn(96).to(dtype)
    x, residual = torch.randn(rows, 96).to(dtype), torch.randn(rows, 96)
    residual = residual.to(dtype) if first else residual  # the embedding, as it is
    total = residual.float() + x.float()
    expected = Reference(weight, 1e-6, unit_offset=True).forward(total)
    normed, carried = norm_of(weight)(x, residual)
    assert carried.dtype == torch.float32 and torch.equal(carried, total)
    assert normed.dtype == dtype and torch.equal(normed, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_heads_are_normed_where_they_lie(dtype: torch.dtype) -> None:
    weight, stacked = torch.randn(32).to(dtype), torch.randn(5, 6 * 32).to(dtype)
    heads = stacked[:, :128].unflatten(1, (4, 32))
    expected = Reference(weight, 1e-6, unit_offset=True).forward(heads.contiguous())
    before = stacked.clone()
    assert torch.equal(norm_of(weight)(heads), expected) and torch.equal(stacked, before)
