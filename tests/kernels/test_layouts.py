"""kernels/lora_factors.py, shared_keys.py and attention.py over shared prompts: against plain references.

As in test_train_kernels.py, which also runs this file in Triton's interpreter: on the CPU, and on a GPU.
"""

import pytest
import torch

from grpo.kernels import lora_factors, shared_keys
from grpo.kernels.attention import Packing, Span, packed_attention
from grpo.kernels.launch import interpreter_enabled
from grpo.kernels.lora_factors import Adapter, pack_lora
from grpo.kernels.shared_keys import gather_keys
from tests.helpers.hopper import compile_for_hopper

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SPANS = [Span(0, 5), Span(5, 3, 0, 5), Span(8, 2, 0, 5), Span(10, 4), Span(14, 6, 10, 4), Span(20, 7)]
"""Two prompts, one with two completions and one with one, and a sequence of its own."""

pytestmark = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# What a GPU would be given

KERNELS = {
    lora_factors._pack_lora_kernel: {"TILE": 64, "INTERPRETED": False},
    shared_keys._copy_kernel: {"COLUMNS": 1024},
    shared_keys._sum_kernel: {"COLUMNS": 1024, "INTERPRETED": False},
}
POINTERS = {
    "a0_ptr", "b0_ptr", "a1_ptr", "b1_ptr", "a2_ptr", "b2_ptr", "lora_a_ptr", "lora_b_ptr", "key_ptr", "value_ptr",
    "key_grad_ptr", "value_grad_ptr", "out_ptr",
}  # fmt: skip
SCALES = ("scale0", "scale1", "scale2")
INDICES = {"sources_ptr": "*i64", "bounds_ptr": "*i32", "order_ptr": "*i32"}


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__ if hasattr(kernel, "__name__") else "")
@pytest.mark.parametrize("element", ["bf16", "fp32"])
def test_kernels_compile_for_hopper(kernel, element, device):
    """The interpreter takes what the compiler refuses, such as branches that give one name two types."""
    if interpreter_enabled() or device != "cpu":
        return
    types = dict.fromkeys(POINTERS, f"*{element}") | INDICES | dict.fromkeys(SCALES, "fp32")
    assert ".target sm_90" in compile_for_hopper(kernel, KERNELS[kernel], types)["ptx"]


# Factors of adapters


def factors_of(parts, columns, device):
    """(adapters, factors) of (first row, rows, rank, scale) each."""
    adapters = [Adapter(first, rows, scale) for first, rows, _, scale in parts]
    factors = []
    for _, rows, rank, _ in parts:
        factors += [torch.randn(rank, columns, device=device), torch.randn(rows, rank, device=device)]
    return adapters, factors


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "parts",
    [
        [(0, 80, 4, 0.5)],
        [(0, 96, 16, 2.0), (136, 40, 16, 1.5)],
        [(0, 96, 5, 2.0), (96, 40, 70, 1.5), (136, 40, 3, 0.3)],
        [(0, 40, 2, 1.0), (40, 40, 2, 2.0), (80, 40, 2, 3.0), (120, 56, 2, 4.0)],
    ],
    ids=["one", "gap", "ranks", "four"],
)
def test_factors_lie_in_their_own_rows_and_columns_with_zeros_around(parts, dtype, device):
    rows, columns = 176, 136
    adapters, factors = factors_of(parts, columns, device)
    rank = sum(part[2] for part in parts)
    width = -(-rank // 64) * 64
    matrix = torch.full((rows + width, columns + width), torch.nan, dtype=dtype, device=device)
    lora_a, lora_b = matrix[rows:, :columns], matrix[:rows, columns:]
    pack_lora(adapters, factors, lora_a, lora_b)
    start = 0
    expected_down, expected_up = torch.zeros_like(lora_a), torch.zeros_like(lora_b)
    for (first, count, of_one, scale), a, b in zip(parts, factors[0::2], factors[1::2], strict=True):
        expected_down[start : start + of_one] = a.to(dtype)
        expected_up[first : first + count, start : start + of_one] = (b * scale).to(dtype)
        start += of_one
    assert torch.equal(lora_a, expected_down) and torch.equal(lora_b, expected_up)
    assert matrix[:rows, :columns].isnan().all() and matrix[rows:, columns:].isnan().all()


def test_one_launch_lays_out_three_adapters(device, monkeypatch):
    if device == "cpu" and not interpreter_enabled():
        return
    launched = []
    launch = lora_factors.launch_pack_lora
    monkeypatch.setattr(lora_factors, "launch_pack_lora", lambda *given: launched.append(launch(*given)))
    adapters, factors = factors_of([(0, 8, 2, 1.0), (8, 8, 2, 1.0), (16, 8, 2, 1.0)], 16, device)
    pack_lora(adapters, factors, torch.empty(6, 16, device=device), torch.empty(24, 6, device=device))
    assert len(launched) == 1


# Keys of shared prompts


def keys_and_values(heads, dim, dtype, device, tokens=27):
    """Views into one stacked product, as attention gets them, with the leaf that they are parts of."""
    stacked = torch.randn(tokens, 3 * heads, dim, device=device).to(dtype).requires_grad_()
    return stacked, stacked[:, heads : 2 * heads], stacked[:, 2 * heads :]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "dim"), [(2, 16), (1, 40)])
def test_keys_are_copied_and_their_gradients_summed_once_rounded(heads, dim, dtype, device):
    packing = Packing(SPANS, torch.device(device))
    stacked, key, value = keys_and_values(heads, dim, dtype, device)
    found = gather_keys(key, value, packing.gather_index)
    sources = packing.key_positions.to(device)
    for result, given in zip(found, (key, value), strict=True):
        assert torch.equal(result, given[sources])
    gradients = [torch.randn(result.shape, device=device).to(dtype) for result in found]
    torch.autograd.backward(found, gradients)
    for gradient, given in zip(gradients, (slice(heads, 2 * heads), slice(2 * heads, 3 * heads)), strict=True):
        exact = torch.zeros(27, heads, dim, dtype=torch.float64, device=device)
        exact.index_add_(0, sources, gradient.double())
        rounded = exact.float().to(dtype).double()
        # A sum in float32 may lie on the other side of a boundary between two numbers of the narrow type.
        same = (stacked.grad[:, given].double() == rounded).double().mean()
        assert same > 0.99 or dtype == torch.float32
        torch.testing.assert_close(stacked.grad[:, given].double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_gradients_of_keys_have_the_same_bits_every_time(device):
    packing = Packing(SPANS, torch.device(device))
    stacked, key, value = keys_and_values(2, 16, torch.bfloat16, device)
    found = gather_keys(key, value, packing.gather_index)
    gradients = [torch.randn(result.shape, device=device).bfloat16() for result in found]
    first, again = (torch.autograd.grad(found, stacked, gradients, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)


def test_expanded_gradients_of_keys_are_taken(device):
    packing = Packing(SPANS, torch.device(device))
    stacked, key, value = keys_and_values(1, 8, torch.float32, device)
    gather_index = packing.gather_index
    sum(part.sum() for part in gather_keys(key, value, gather_index)).backward()
    counts = torch.bincount(packing.key_positions).float().to(device)
    torch.testing.assert_close(stacked.grad[:, 1:], counts[:, None, None].expand(27, 2, 8))


def test_keys_whose_heads_lie_apart_are_taken(device):
    """As transformers' own rotation leaves them: head after head."""
    packing = Packing(SPANS, torch.device(device))
    by_head = torch.randn(2, 3, 27, 8, device=device).requires_grad_()
    key, value = by_head.transpose(1, 2)
    found = gather_keys(key, value, packing.gather_index)
    for result, given in zip(found, (key, value), strict=True):
        assert torch.equal(result, given[packing.key_positions.to(device)])
    sum(part.sum() for part in found).backward()
    counts = torch.bincount(packing.key_positions).float().to(device)
    torch.testing.assert_close(by_head.grad, counts[:, None].expand(2, 3, 27, 8))
    with pytest.raises(AssertionError):
        shared_keys.launch_copy(key, value, packing.gather_index, torch.stack(found))


# Attention


def attention_reference(query, key, value, spans, scale):
    """softmax(q k^T) v in float64, span by span: [tokens, heads, dim]."""
    groups = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    outputs = []
    for span in spans:
        own = slice(span.start, span.start + span.length)
        prefix = slice(span.prefix_start, span.prefix_start + span.prefix_length)
        keys, values = (torch.cat([part[:, prefix], part[:, own]], 1) for part in (key, value))
        scores = scale * query[:, own] @ keys.transpose(1, 2)
        later = torch.ones(span.length, span.keys, dtype=torch.bool, device=query.device).triu(span.prefix_length + 1)
        outputs.append((scores.masked_fill(later, -torch.inf).softmax(-1) @ values).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_heads_that_share_keys_and_spans_that_share_a_prompt(key_heads, shared, device):
    dtype, dim = (torch.bfloat16, 64) if device == "cuda" else (torch.float32, 16)
    spans = SPANS if shared else [Span(span.start, span.length) for span in SPANS]
    stacked = torch.randn(27, (4 + 2 * key_heads), dim, device=device).to(dtype).requires_grad_()
    exact = stacked.detach().double().requires_grad_()
    grad = torch.randn(27, 4, dim, device=device).to(dtype)
    results = []
    for leaf in (stacked, exact):
        query, key, value = (part.transpose(0, 1) for part in leaf.split([4, key_heads, key_heads], 1))
        if leaf is stacked:
            result = packed_attention(query, key, value, Packing(spans, torch.device(device)), scale=dim**-0.5)
        else:
            result = attention_reference(query, key, value, spans, dim**-0.5)
        result.backward(grad.to(result.dtype))
        results.append(result)
    tolerance = 1e-5 if dtype == torch.float32 else 8e-3
    for found, expected in zip((results[0], stacked.grad), (results[1], exact.grad), strict=True):
        error = (found.double() - expected).norm() / expected.norm()
        assert error < tolerance, f"relative error {error:.1e}"
