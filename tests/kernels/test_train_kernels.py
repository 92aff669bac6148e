"""kernels/rms_norm.py, glu.py and rope.py: forward and backward against autograd in float64.

Every test runs three times: on the CPU, where the torch forms are taken, on the CPU in Triton's interpreter (a process
of its own, `test_kernels_in_the_interpreter`), and on a GPU where there is one. test_lora_kernels.py has the products.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grpo.kernels.glu import ACTIVATIONS, glu, glu_backward, glu_forward
from grpo.kernels.launch import interpreter_enabled
from grpo.kernels.rms_norm import Norm, rms_norm
from grpo.kernels.rope import rope, rotate
from tests.helpers.paths import ROOT
from tests.helpers.train_kernels import (
    DEVICES,
    DTYPES,
    EPS,
    angles,
    assert_close,
    glu_reference,
    norm_reference,
    randn,
    rope_reference,
    wide,
)

pytestmark = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# Norm


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("shape", [(5, 128), (18, 200), (3, 5, 72)])
def test_norm_and_its_gradient_equal_autograd(shape, unit_offset, dtype, device):
    x = randn(*shape, dtype=dtype, device=device).requires_grad_()
    norm = Norm(randn(shape[-1], dtype=dtype, device=device), EPS, unit_offset)
    grad = randn(*shape, dtype=dtype, device=device)
    result, reference_x = rms_norm(x, norm), wide(x)
    expected = norm_reference(reference_x, norm)
    assert_close(result, expected, dtype)
    result.backward(grad)
    expected.backward(grad.double())
    assert_close(x.grad, reference_x.grad, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("unit_offset", [False, True])
def test_norm_of_a_sum_that_is_not_rounded(unit_offset, dtype, device):
    x = randn(18, 200, dtype=torch.float32, device=device).requires_grad_()
    norm = Norm(randn(200, dtype=dtype, device=device), EPS, unit_offset)
    grad, other = randn(18, 200, dtype=dtype, device=device), randn(18, 200, dtype=torch.float32, device=device)
    result, reference_x = rms_norm(x, norm), wide(x)
    expected = norm_reference(reference_x, norm)
    assert result.dtype == dtype
    assert_close(result, expected, dtype)
    result.backward(grad)
    expected.backward(grad.double())
    assert x.grad.dtype == torch.float32
    assert_close(x.grad, reference_x.grad, torch.float32)
    both = norm.backward(grad, x.detach(), other)
    assert_close(both, reference_x.grad + other.double(), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_norm_rounds_as_transformers_does(family, dtype, device):
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    module = (LlamaRMSNorm if family == "llama" else Gemma2RMSNorm)(192, eps=EPS).to(device, dtype)
    module.weight.data.copy_(randn(192))
    x = randn(40, 192, dtype=dtype, device=device)
    result = Norm(module.weight.data, EPS, family == "gemma2").forward(x)
    same = (result == module(x)).float().mean()
    assert same > 0.995, f"{same:.3%} of the values have the same bits"


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_of_strided_heads_in_place_with_a_second_gradient(dtype, device):
    norm = Norm(randn(40, dtype=dtype, device=device), EPS)
    stacked = randn(7, 6 * 40, dtype=dtype, device=device).view(7, 6, 40)
    x, untouched = stacked[:, 1:5], stacked[:, 5:].clone()
    reference = wide(x).requires_grad_()
    expected = norm_reference(reference, norm)
    grad, residual_grad = randn(7, 4, 40, dtype=dtype, device=device), randn(7, 4, 40, dtype=dtype, device=device)
    expected.backward(grad.double())
    result = norm.backward(grad, x, residual_grad=residual_grad, out=grad)
    assert_close(result, reference.grad + residual_grad.double(), dtype)
    assert_close(norm.forward(x, out=x), expected, dtype)
    assert torch.equal(stacked[:, 5:], untouched)


# Gated activations


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(3, 96), (5, 2 * 2100)])
def test_glu_and_its_gradient_equal_autograd(shape, activation, dtype, device):
    gate_up = (randn(*shape) * 3).to(dtype).to(device).requires_grad_()
    reference = wide(gate_up)
    result, expected = glu(gate_up, activation), glu_reference(reference, activation)
    assert_close(result, expected, dtype, 2)  # two roundings: the activation, the product
    grad = randn(*result.shape, dtype=dtype, device=device)
    result.backward(grad)
    expected.backward(grad.double())
    assert_close(gate_up.grad, reference.grad, dtype)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_glu_saturates_without_overflow(activation, device):
    gate = torch.tensor([[-1e4, -90.0, 0.0, 90.0, 1e4]], device=device)
    gate_up = torch.cat([gate, torch.ones_like(gate)], -1)
    assert glu_forward(gate_up, activation).tolist() == [[0, 0, 0, 90, 1e4]]
    slope = torch.empty_like(gate_up)
    glu_backward(torch.ones_like(gate), gate_up, activation, torch.empty_like(gate), slope)
    assert slope[0, :5].tolist() == [0, 0, 0.5, 1, 1]


def test_beyond_their_limits_gate_and_up_get_no_gradient(device):
    gate_up = torch.tensor([[8.0, 7.0, -1e4, 1.0, 1.0, 1e4, -7.5, -7.0]], device=device)
    assert glu_forward(gate_up[:, 3:5].contiguous(), "clamped_silu").item() == pytest.approx(2 / (1 + math.exp(-1.702)))
    slope = torch.empty_like(gate_up)
    glu_backward(torch.ones(1, 4, device=device), gate_up, "clamped_silu", torch.empty(1, 4, device=device), slope)
    assert (slope[0] == 0).tolist() == [True, False, True, False, False, True, True, False]
    gate_up = torch.tensor([[1e4, -1e4, 1e4, -1e4]], device=device)
    assert glu_forward(gate_up, "clamped_silu").tolist() == [[pytest.approx(56, rel=1e-4), 0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_glu_backward_may_overwrite_its_inputs(activation, dtype, device):
    wider = randn(6, 130, dtype=dtype, device=device)
    gate_up, grad = wider[:, :120], randn(6, 60, dtype=dtype, device=device)
    expected_product, expected = torch.empty_like(grad), torch.empty_like(gate_up)
    glu_backward(grad, gate_up, activation, expected_product, expected)
    assert torch.equal(expected_product, glu_forward(gate_up, activation))
    beside = wider[:, 120:].clone()
    glu_backward(grad, gate_up, activation, grad, gate_up)
    assert torch.equal(grad, expected_product) and torch.equal(gate_up, expected)
    assert torch.equal(wider[:, 120:], beside)


# Rotary embedding


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotated", [16, 12])
def test_rope_and_its_gradient_equal_transformers(rotated, dtype, device):
    x = randn(11, 3, 16, dtype=dtype, device=device).requires_grad_()
    cos, sin = angles(11, rotated, dtype, device)
    result, reference = rope(x, cos, sin), wide(x)
    expected = rope_reference(reference, cos.double(), sin.double())
    assert_close(result, expected, dtype)
    grad = randn(*x.shape, dtype=dtype, device=device)
    result.backward(grad)
    expected.backward(grad.double())
    assert_close(x.grad, reference.grad, dtype)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("rotated", [16, 8])
def test_rope_in_place_touches_its_heads_alone(rotated, inverse, device):
    cos, sin = (randn(9, rotated, device=device) for _ in range(2))  # halves differ: nothing may assume they agree
    stacked = randn(9, 5, 16, device=device)
    before = stacked.clone()
    expected = rotate(stacked[:, 1:3], cos, sin, inverse=inverse)
    rotate(stacked[:, 1:3], cos, sin, out=stacked[:, 1:3], inverse=inverse)
    assert torch.equal(stacked[:, 1:3], expected)
    assert torch.equal(stacked[:, 0], before[:, 0]) and torch.equal(stacked[:, 3:], before[:, 3:])


def test_rope_backward_is_the_transposed_map(device):
    cos, sin = (randn(4, 8, device=device) for _ in range(2))
    x, y = randn(4, 2, 10, device=device), randn(4, 2, 10, device=device)
    forward, backward = rotate(x, cos, sin), rotate(y, cos, sin, inverse=True)
    torch.testing.assert_close((forward * y).sum(), (x * backward).sum(), rtol=1e-5, atol=1e-5)


def test_expanded_gradients_are_taken(device):
    cos, sin = angles(5, 8, torch.float32, device)
    norm = Norm(randn(8, device=device), EPS)
    for function in (
        lambda x: rms_norm(x, norm),
        lambda x: rope(x[:, None], cos, sin),
        lambda x: glu(x, "silu"),
    ):
        x = randn(5, 8, device=device).requires_grad_()
        result = function(x)
        (expected,) = torch.autograd.grad(result, x, torch.ones_like(result), retain_graph=True)
        result.sum().backward()
        assert torch.equal(x.grad, expected)


# Refusals


def test_shapes_and_strides_that_the_kernels_do_not_take_are_refused(device):
    norm = Norm(torch.ones(8, device=device), EPS)
    with pytest.raises(ValueError, match="last stride"):
        norm.forward(torch.zeros(8, 4, device=device).t())
    with pytest.raises(ValueError, match="with a weight"):
        norm.forward(torch.zeros(4, 6, device=device))
    with pytest.raises(ValueError, match="shapes and types must agree"):
        norm.backward(torch.zeros(4, 8, device=device).half(), torch.zeros(4, 8, device=device))
    with pytest.raises(ValueError, match="half the columns"):
        glu_forward(torch.zeros(4, 7, device=device), "silu")
    with pytest.raises(ValueError, match="choose from silu, gelu_tanh"):
        glu_forward(torch.zeros(4, 8, device=device), "relu")
    with pytest.raises(ValueError, match="rope of"):
        rotate(torch.zeros(4, 2, 8, device=device), *torch.zeros(2, 4, 10, device=device))


def test_no_rows_give_no_rows(device):
    norm = Norm(torch.ones(8, device=device), EPS)
    assert norm.forward(torch.zeros(0, 8, device=device)).shape == (0, 8)
    assert glu_forward(torch.zeros(0, 8, device=device), "silu").shape == (0, 4)
    assert rotate(torch.zeros(0, 2, 8, device=device), *torch.zeros(2, 0, 8, device=device)).shape == (0, 2, 8)


@pytest.mark.slow
def test_kernels_in_the_interpreter(device):
    """Triton reads TRITON_INTERPRET when it is imported, hence a process of its own."""
    if device != "cpu" or interpreter_enabled():
        return
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    files = [__file__, *(str(Path(__file__).with_name(f"test_{name}.py")) for name in ("lora_kernels", "layouts"))]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "passed" in result.stdout and "skipped" not in result.stdout
