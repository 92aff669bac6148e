"""kernels/lora_*.py: a layer's products with its adapters, forward and backward against autograd in float64.

Every test runs three times, as those of test_train_kernels.py do; its `test_kernels_in_the_interpreter` runs these too.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from grpo.kernels import nf4
from grpo.kernels.lora_attention import QkvProjection, lora_qkv
from grpo.kernels.lora_factors import Adapter
from grpo.kernels.lora_linear import LinearGroup, lora_linear, row_tiles
from grpo.kernels.lora_mlp import GatedMlp, lora_mlp
from grpo.kernels.rms_norm import Norm
from grpo.kernels.sizes import ADAPTER_COLUMNS, largest_tile
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
