"""kernels/rms_norm.py, glu.py, rope.py and lora_*.py: forward and backward against autograd in float64.

Every test runs three times: on the CPU, where the torch forms are taken, on the CPU in Triton's interpreter (a process
of its own, `test_kernels_in_the_interpreter`), and on a GPU where there is one.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from grpo.kernels import nf4
from grpo.kernels.glu import ACTIVATIONS, glu, glu_backward, glu_forward
from grpo.kernels.launch import interpreter_enabled
from grpo.kernels.lora_attention import QkvProjection, lora_qkv
from grpo.kernels.lora_factors import Adapter
from grpo.kernels.lora_linear import LinearGroup, lora_linear, row_tiles
from grpo.kernels.lora_mlp import GatedMlp, lora_mlp
from grpo.kernels.rms_norm import Norm, rms_norm
from grpo.kernels.rope import rope, rotate
from grpo.kernels.sizes import ADAPTER_COLUMNS, largest_tile
from tests.helpers.paths import ROOT

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
"""Relative error, in norm, of one rounding (bfloat16: 2^-9 on average per value) and of float32 sums."""
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
EPS = 1e-5

pytestmark = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def randn(*shape, dtype=torch.float32, device="cpu", scale=1.0):
    return (torch.randn(*shape) * scale).to(dtype).to(device)


def wide(tensor):
    return tensor.detach().double().requires_grad_(tensor.requires_grad)


def error(result, expected):
    expected = expected.detach().double().cpu()
    return float((result.detach().double().cpu() - expected).norm() / expected.norm().clamp(min=1e-12))


def assert_close(result, expected, dtype, factor=1.0):
    found = error(result, expected)
    assert found <= factor * TOLERANCE[dtype], f"relative error {found:.2e} in {dtype}"


def norm_reference(x, norm):
    unit = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps)
    return unit * (norm.weight.double() + norm.unit_offset)


def rope_reference(x, cos, sin):
    """transformers' half rotation of the first columns, for x [tokens, heads, dim]."""
    rotated = cos.shape[-1]
    first, second = x[..., :rotated].chunk(2, -1)
    turned = x[..., :rotated] * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]
    return torch.cat([turned, x[..., rotated:]], -1)


def glu_reference(gate_up, activation):
    gate, up = gate_up.chunk(2, -1)
    if activation == "clamped_silu":
        gate = gate.clamp(max=7.0)
        return gate * torch.sigmoid(1.702 * gate) * (up.clamp(-7.0, 7.0) + 1)
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up


def angles(tokens, columns, dtype, device):
    phase = torch.outer(torch.arange(tokens).double(), torch.logspace(0, -2, columns // 2).double())
    phase = torch.cat([phase, phase], -1)
    return phase.cos().to(dtype).to(device), phase.sin().to(dtype).to(device)


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


# LoRA


class Linear:
    """A frozen group, its adapters and their factors, and the same in float64."""

    def __init__(self, columns, parts, dtype, device, *, packed=(), adapted=None, bias=False, rank=4):
        self.factors, self.adapters, segments, row = [], [], [], 0
        for index, rows in enumerate(parts):
            weight = randn(rows, columns, scale=columns**-0.5)
            if index in packed:
                stored = nf4.allocate(rows, columns, dtype, device)
                nf4.quantize_rows(*stored, 0, weight.to(device))
                segments.append(stored)
            else:
                segments.append((weight.to(dtype).to(device), None))
            if adapted is None or index in adapted:
                self.adapters.append(Adapter(row, rows, 0.5 + index))
                self.factors += [
                    randn(rank, columns, device=device, scale=columns**-0.5).requires_grad_(),
                    randn(rows, rank, device=device, scale=0.3).requires_grad_(),
                ]
            row += rows
        bias = randn(row, dtype=dtype, device=device) if bias else None
        self.group = LinearGroup(tuple(segments), bias)
        self.dense = self.group.dense().double()
        self.wide = [wide(factor) for factor in self.factors]

    def reference(self, x):
        y = F.linear(x, self.dense, None if self.group.bias is None else self.group.bias.double())
        for index, adapter in enumerate(self.adapters):
            a, b = self.wide[2 * index : 2 * index + 2]
            update = adapter.scale * (x @ a.T @ b.T)
            y = y + F.pad(update, (adapter.first, y.shape[1] - adapter.first - adapter.rows))
        return y

    def assert_gradients(self, dtype, factor):
        for mine, theirs in zip(self.factors, self.wide, strict=True):
            assert mine.grad.dtype == torch.float32
            assert_close(mine.grad, theirs.grad, dtype, factor)


FORMS = {
    "dense": {},
    "packed": {"packed": (0, 1, 2)},
    "mixed": {"packed": (0, 2)},
    "bias": {"bias": True},
    "unadapted part": {"adapted": (0, 2)},
    "no adapter": {"adapted": ()},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_lora_linear_equals_autograd(form, dtype, device):
    linear = Linear(128, (16, 24, 8), dtype, device, **FORMS[form])
    x = randn(7, 128, dtype=dtype, device=device).requires_grad_()
    reference_x = wide(x)
    result = lora_linear(x, linear.group, linear.adapters, linear.factors)
    expected = linear.reference(reference_x)
    assert result.dtype == dtype
    assert_close(result, expected, dtype, 2)
    grad = randn(7, 48, dtype=dtype, device=device)
    result.backward(grad)
    expected.backward(grad.double())
    assert_close(x.grad, reference_x.grad, dtype, 2)
    linear.assert_gradients(dtype, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_norms", [False, True])
@pytest.mark.parametrize("unit_offset", [False, True])
def test_attention_inputs_equal_autograd(unit_offset, head_norms, dtype, device):
    heads, shared, dim, tokens = 3, 1, 16, 11
    linear = Linear(64, (heads * dim, dim, dim), dtype, device, packed=(0, 1, 2), bias=not head_norms)
    x = randn(tokens, 64, dtype=dtype, device=device).requires_grad_()
    cos, sin = angles(tokens, dim if head_norms else dim // 2, dtype, device)
    norm, q_norm, k_norm = (
        Norm(1 + 0.2 * randn(n, dtype=dtype, device=device), EPS, unit_offset) for n in (64, 16, 16)
    )
    extra = {"q_norm": q_norm, "k_norm": k_norm} if head_norms else {}
    projection = QkvProjection(linear.group, heads, shared, norm, tile=4, **extra)
    results = lora_qkv(x, cos, sin, projection, linear.adapters, linear.factors)

    reference_x = wide(x)
    stacked = linear.reference(norm_reference(reference_x, norm)).view(tokens, -1, dim)
    q, k, v = stacked.split([heads, shared, shared], 1)
    if head_norms:
        q, k = norm_reference(q, q_norm), norm_reference(k, k_norm)
    expected = [rope_reference(part, cos.double(), sin.double()) for part in (q, k)] + [v]
    grads = [randn(*part.shape, dtype=dtype, device=device) for part in results]
    for mine, theirs in zip(results, expected, strict=True):
        assert_close(mine, theirs, dtype, 3)
    torch.autograd.backward(results, grads)
    torch.autograd.backward(expected, [grad.double() for grad in grads])
    assert_close(x.grad, reference_x.grad, dtype, 3)
    linear.assert_gradients(dtype, 3)


def mlp_example(dtype, device, *, activation="silu", residual=True, normed=True, tile=4, packed=()):
    above = Linear(64, (64, 64), dtype, device, packed=packed)
    below = Linear(64, (64,), dtype, device, packed=packed[:1])
    norm = Norm(1 + 0.2 * randn(64, dtype=dtype, device=device), EPS, activation != "silu") if normed else None
    mlp = GatedMlp(above.group, below.group, activation, norm, residual, tile)

    def run(x, **options):
        adapters = (above.adapters, below.adapters)
        return lora_mlp(x, mlp, adapters, [*above.factors, *below.factors], **options)

    def reference(x):
        unit = norm_reference(x, norm) if normed else x
        result = below.reference(glu_reference(above.reference(unit), activation))
        return result + x if residual else result

    return run, reference, above, below


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"packed": (0, 1), "activation": "gelu_tanh", "residual": False},
        {"packed": (0,), "normed": False, "tile": 100},
        {"tile": 2, "tiles": 3},
    ],
    ids=str,
)
def test_mlp_equals_autograd(options, keep, dtype, device):
    tiles = options.get("tiles", 1)
    options = {name: value for name, value in options.items() if name != "tiles"}
    run, reference, above, below = mlp_example(dtype, device, **options)
    x = randn(11, 64, dtype=dtype, device=device).requires_grad_()
    reference_x = wide(x)
    result, expected = run(x, keep=keep, tiles=tiles), reference(reference_x)
    assert_close(result, expected, dtype, 3)
    grad = randn(11, 64, dtype=dtype, device=device)
    result.backward(grad)
    expected.backward(grad.double())
    assert_close(x.grad, reference_x.grad, dtype, 3)
    above.assert_gradients(dtype, 3)
    below.assert_gradients(dtype, 3)


@pytest.mark.parametrize("keep", [True, False])
def test_an_mlp_without_output_has_the_same_gradients(keep, device):
    run, _, above, below = mlp_example(torch.float32, device)
    grad, found = randn(11, 64, device=device), []
    for output in (True, False):
        x = randn(11, 64, device=device).fill_(0.3).requires_grad_()
        inputs = [x, *above.factors, *below.factors]
        found.append(torch.autograd.grad(run(x, keep=keep, output=output), inputs, grad))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*found, strict=True))


def test_a_second_backward_over_used_up_memory_is_refused(device):
    run, *_ = mlp_example(torch.float32, device)
    result = run(randn(5, 64, device=device).requires_grad_(), keep=True)
    result.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("trained_input", [True, False])
def test_what_memory_held_before_shows_nowhere(trained_input, keep, dtype, device):
    """With NaN in all memory that is taken; 80 columns are no multiple of what a CPU's products take at once."""
    linear = Linear(80, (48, 16, 16), dtype, device, bias=True)
    above, below = Linear(80, (80, 80), dtype, device), Linear(80, (80,), dtype, device)
    x = randn(17, 80, dtype=dtype, device=device).requires_grad_(trained_input)
    cos, sin = angles(17, 16, dtype, device)
    norm = Norm(1 + 0.2 * randn(80, dtype=dtype, device=device), EPS, False)
    factors = [*linear.factors, *above.factors, *below.factors]
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills what `empty` takes
    try:
        projection = QkvProjection(linear.group, 3, 1, norm)
        results = lora_qkv(x, cos, sin, projection, linear.adapters, linear.factors)
        mlp = GatedMlp(above.group, below.group, "silu", norm, True)
        product = lora_mlp(x, mlp, (above.adapters, below.adapters), factors[6:], keep=keep)
        torch.autograd.backward([*results, product], [torch.ones_like(part) for part in (*results, product)])
    finally:
        torch.use_deterministic_algorithms(False)
    shown = [*results, product, *(part.grad for part in factors), *([x.grad] if trained_input else [])]
    assert all(part.isfinite().all() for part in shown)


def test_adapters_learn_where_the_input_needs_no_gradient(device):
    run, _, above, _ = mlp_example(torch.float32, device)
    run(randn(5, 64, device=device)).sum().backward()
    assert all(factor.grad is not None and factor.grad.norm() > 0 for factor in above.factors)


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


def test_what_an_mlp_keeps_is_its_input_and_what_was_asked_for(device):
    def kept_bytes(keep):
        run, _, above, below = mlp_example(torch.float32, device)
        x, sizes = randn(11, 64, device=device).requires_grad_(), {}
        known = {t.data_ptr() for t in [*above.factors, *below.factors]}

        def pack(tensor):
            if tensor.data_ptr() not in known and tensor.numel():
                sizes[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run(x, keep=keep)
        return sum(sizes.values())

    assert kept_bytes(False) == 11 * 64 * 4
    assert kept_bytes(True) == 11 * (64 + 128 + ADAPTER_COLUMNS) * 4


@given(rows=st.integers(0, 10_000), size=st.integers(1, 600))
def test_tiles_cover_the_rows_whole_but_for_the_last_or_even(device, rows, size):
    tiles = row_tiles(rows, size)
    lengths = [tile.stop - tile.start for tile in tiles]
    assert [tile.start for tile in tiles] == [sum(lengths[:index]) for index in range(len(tiles))]
    assert sum(lengths) == rows and (min(lengths) > 0 or rows == 0)
    assert max(lengths) <= largest_tile(size)
    assert set(lengths[:-1]) <= {size} or max(lengths) - min(lengths) <= 1


def test_a_small_rest_of_rows_is_no_tile_of_its_own(device):
    assert row_tiles(10, 4) == [slice(0, 4), slice(4, 8), slice(8, 10)]
    assert row_tiles(17, 8) == [slice(0, 8), slice(8, 17)] and row_tiles(9, 8) == [slice(0, 9)]
    assert row_tiles(8, 8) == [slice(0, 8)] and row_tiles(0, 8) == [slice(0, 0)]


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


def test_gradcheck_in_float64(device):
    """The torch forms compute float64 throughout; Triton's do not take it."""
    linear = nn.Linear(6, 10).double().to(device)
    group = LinearGroup(((linear.weight.detach(), None),), linear.bias.detach())
    down = LinearGroup(((randn(6, 5, dtype=torch.float64, device=device), None),))
    norm = Norm(randn(6, dtype=torch.float64, device=device), EPS, True)
    mlp = GatedMlp(group, down, "gelu_tanh", norm, residual=True, tile=2)
    sizes = [(3, 6), (2, 6), (10, 2), (2, 5), (6, 2)]
    inputs = [randn(*size, dtype=torch.float64, device=device).requires_grad_() for size in sizes]
    adapters = ([Adapter(0, 10, 0.7)], [Adapter(0, 6, 1.3)])
    assert torch.autograd.gradcheck(lambda x, *factors: lora_mlp(x, mlp, adapters, factors, keep=False), inputs)


@pytest.mark.slow
def test_kernels_in_the_interpreter(device):
    """Triton reads TRITON_INTERPRET when it is imported, hence a process of its own."""
    if device != "cpu" or interpreter_enabled():
        return
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    layouts = Path(__file__).with_name("test_layouts.py")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, str(layouts)],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "passed" in result.stdout and "skipped" not in result.stdout
