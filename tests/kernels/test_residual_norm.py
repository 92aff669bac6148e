"""kernels/residual_norm.py. The kernel's arithmetic is in interpreted_residual_norm.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grpo.kernels.residual_norm import add_and_norm, serves
from grpo.kernels.rms_norm import Norm
from tests.helpers.paths import ROOT


def test_the_kernel_in_the_interpreter():
    file = Path(__file__).parent / "interpreted_residual_norm.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
        env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("stream", [torch.bfloat16, torch.float32])
def test_on_a_cpu_sum_and_norm_are_those_of_the_training_graph(stream, unit_offset):
    x, residual, weight = torch.randn(4, 96).bfloat16(), torch.randn(4, 96).to(stream), torch.randn(96).bfloat16()
    total = x + residual
    expected = Norm(weight, 1e-6, unit_offset).forward(total)
    add_and_norm(x, residual, weight, 1e-6, unit_offset=unit_offset)
    assert torch.equal(residual, total) and torch.equal(x, expected)


def test_other_inputs_are_refused():
    x, weight = torch.randn(4, 96), torch.randn(96)
    assert not serves(x, x, weight) and not serves(x.bfloat16()[:0], x.bfloat16()[:0], weight.bfloat16())
    with pytest.raises(ValueError, match="norm of"):
        add_and_norm(x, x, weight, 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("stream", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("columns", [576, 3072, 4096])
def test_on_the_gpu_sum_and_norm_are_those_of_the_training_graph(columns, stream):
    x, residual = (torch.randn(200, columns, device="cuda").to(dtype) for dtype in (torch.bfloat16, stream))
    weight = torch.randn(columns, device="cuda").bfloat16()
    total = x + residual
    expected = Norm(weight, 1e-5).forward(total)
    add_and_norm(x, residual, weight, 1e-5)
    assert torch.equal(residual, total)
    torch.testing.assert_close(x, expected, rtol=1.6e-2, atol=1e-5)
