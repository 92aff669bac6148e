"""kernels/residual_norm.py. The kernel's arithmetic is in interpreted_residual_norm.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grpo.kernels.residual_norm import add_and_norm, add_to_stream, serves
from grpo.kernels.rms_norm import Norm
from tests.helpers.paths import ROOT


def test_the_kernel_in_the_interpreter():
    file = Path(__file__).parent / "interpreted_residual_norm.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
        env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_on_a_cpu_sum_and_norm_are_those_of_the_training_graph():
    x, residual, weight = torch.randn(4, 96).bfloat16(), torch.randn(4, 96).bfloat16(), torch.randn(96).bfloat16()
    total = x + residual
    expected = Norm(weight, 1e-6).forward(total)
    add_and_norm(x, residual, weight, 1e-6)
    assert torch.equal(residual, total) and torch.equal(x, expected)


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("rows", [4, 0])
def test_on_a_cpu_a_stream_in_float32_is_not_rounded(wide, rows):
    x, weight = torch.randn(rows, 96).bfloat16(), torch.randn(96).bfloat16()
    residual = torch.randn(rows, 96).to(torch.float32 if wide else torch.bfloat16)
    total = x.float() + residual.float()
    expected = weight * (total * torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-6)).bfloat16()
    stream = add_to_stream(x, residual, weight, 1e-6)
    assert torch.equal(stream, total) and torch.equal(x, expected) and (stream is residual) == wide


@pytest.mark.parametrize("unit_offset", [False, True])
def test_on_a_cpu_a_stream_in_float32_is_normed_as_the_training_graph_norms_it(unit_offset):
    x, residual, weight = torch.randn(4, 96).bfloat16(), torch.randn(4, 96), torch.randn(96).bfloat16()
    expected = Norm(weight, 1e-6, unit_offset).forward(x + residual)
    add_to_stream(x, residual, weight, 1e-6, unit_offset=unit_offset)
    assert torch.equal(x, expected)


@pytest.mark.parametrize(("of_x", "of_stream"), [(torch.float32, torch.float32), (torch.bfloat16, torch.float16)])
def test_a_stream_of_another_type_is_refused(of_x, of_stream):
    x, residual = torch.randn(4, 96).to(of_x), torch.randn(4, 96).to(of_stream)
    with pytest.raises(ValueError, match="norm of"):
        add_to_stream(x, residual, torch.randn(96).to(of_x), 1e-6)


def test_other_inputs_are_refused():
    x, weight = torch.randn(4, 96), torch.randn(96)
    assert not serves(x, x, weight) and not serves(x.bfloat16()[:0], x.bfloat16()[:0], weight.bfloat16())
    with pytest.raises(ValueError, match="norm of"):
        add_and_norm(x, x, weight, 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("columns", [576, 3072, 4096])
def test_on_the_gpu_sum_and_norm_are_those_of_the_training_graph(columns):
    x, residual = (torch.randn(200, columns, device="cuda").bfloat16() for _ in range(2))
    weight = torch.randn(columns, device="cuda").bfloat16()
    total = x + residual
    expected = Norm(weight, 1e-5).forward(total)
    add_and_norm(x, residual, weight, 1e-5)
    assert torch.equal(residual, total)
    torch.testing.assert_close(x, expected, rtol=1.6e-2, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "columns"), [(200, 2048), (8192, 2880)])
def test_on_the_gpu_a_stream_in_float32_is_that_of_the_training_graph(rows, columns):
    x, weight = (torch.randn(*size, device="cuda").bfloat16() for size in ((rows, columns), (columns,)))
    residual = torch.randn(rows, columns, device="cuda")
    total = x.float() + residual
    expected = weight * (total * torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-5)).bfloat16()
    assert torch.equal(add_to_stream(x, residual, weight, 1e-5), total)
    assert (x != expected).float().mean() < 0.01
    torch.testing.assert_close(x, expected, rtol=1.6e-2, atol=1e-5)
