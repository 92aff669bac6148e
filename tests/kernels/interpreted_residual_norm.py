"""kernels/residual_norm.py in Triton's interpreter. test_residual_norm.py runs this file with TRITON_INTERPRET=1."""

import os

import pytest
import torch

from grpo.kernels.residual_norm import add_to_stream, launch
from grpo.kernels.rms_norm import Norm

assert os.environ.get("TRITON_INTERPRET") == "1", "pytest tests/kernels/test_residual_norm.py runs this file"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 64), (5, 576), (3, 3072)])
def test_sum_and_norm_have_the_bits_of_the_training_graphs(rows, columns, dtype):
    wide = torch.randn(rows, columns + 8).to(dtype)
    x, residual, weight = wide[:, :columns], torch.randn(rows, columns).to(dtype), torch.randn(columns).to(dtype)
    total = x + residual
    expected = Norm(weight, 1e-5).forward(total)
    guard = wide[:, columns:].clone()
    launch(x, residual, weight, 1e-5)
    assert torch.equal(residual, total) and torch.equal(x, expected) and torch.equal(wide[:, columns:], guard)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [(1, 64), (5, 576), (3, 2880)])
def test_a_stream_in_float32_is_not_rounded(rows, columns, wide, dtype):
    x, weight = torch.randn(rows, columns).to(dtype), torch.randn(columns).to(dtype)
    residual = torch.randn(rows, columns).to(torch.float32 if wide else dtype)
    total = x.float() + residual.float()
    unit = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-5)
    launched = add_to_stream(x, residual, weight, 1e-5)
    assert torch.equal(launched, total) and (launched is residual) == wide
    expected = weight * unit.to(dtype)
    # Where a root falls on the border between two values of `dtype`, either is right.
    assert (x != expected).float().mean() < 0.01
    torch.testing.assert_close(x, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("wide", [True, False])
def test_a_stream_in_float32_has_the_bits_of_the_norm_alone(wide, unit_offset, dtype):
    x, weight = torch.randn(5, 576).to(dtype), torch.randn(576).to(dtype)
    residual = torch.randn(5, 576).to(torch.float32 if wide else dtype)
    total = x.float() + residual.float()
    expected = Norm(weight, 1e-5, unit_offset).forward(total)
    assert torch.equal(add_to_stream(x, residual, weight, 1e-5, unit_offset=unit_offset), total)
    assert torch.equal(x, expected)
