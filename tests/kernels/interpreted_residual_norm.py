"""kernels/residual_norm.py in Triton's interpreter. test_residual_norm.py runs this file with TRITON_INTERPRET=1."""

import os

import pytest
import torch

from grpo.kernels.residual_norm import launch
from grpo.kernels.rms_norm import Norm

assert os.environ.get("TRITON_INTERPRET") == "1", "pytest tests/kernels/test_residual_norm.py runs this file"


@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("stream", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 64), (5, 576), (3, 3072)])
def test_sum_and_norm_have_the_bits_of_the_training_graphs(rows, columns, dtype, stream, unit_offset):
    wide = torch.randn(rows, columns + 8).to(dtype)
    x, weight = wide[:, :columns], torch.randn(columns).to(dtype)
    residual = torch.randn(rows, columns).to(stream or dtype)
    total = x + residual
    assert total.dtype == residual.dtype
    expected = Norm(weight, 1e-5, unit_offset).forward(total)
    guard = wide[:, columns:].clone()
    launch(x, residual, weight, 1e-5, unit_offset=unit_offset)
    assert torch.equal(residual, total) and torch.equal(x, expected) and torch.equal(wide[:, columns:], guard)
