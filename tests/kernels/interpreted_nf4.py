"""The NF4 kernels in Triton's interpreter, on the CPU. test_nf4.py runs this file with TRITON_INTERPRET=1."""

import os

import pytest
import torch

from grpo.kernels import lora_sum, nf4, nf4_gemm
from grpo.kernels.dense_gemm import dense_gemm, split_of
from grpo.kernels.lora_factors import LowRank
from grpo.kernels.lora_shrink import launch_shrink
from grpo.kernels.lora_sum import round_sum
from grpo.kernels.nf4_tiles import Tile
from grpo.kernels.nf4_turing import launch_turing
from grpo.kernels.split_k import SHRINK_BYTES, workspace
from tests.helpers.rounding import share_rounded_more_than_once

assert os.environ.get("TRITON_INTERPRET") == "1", "pytest tests/kernels/test_nf4.py runs this file"

HALVES = [torch.bfloat16, torch.float16]
TOLERANCE = {torch.bfloat16: 3e-3, torch.float16: 4e-4}


def random_weight(rows, columns, dtype=torch.float32):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows + columns)) * 0.05
    weight[0, :64] = 0
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(8, 64), (72, 128), (136, 192)])
def test_quantise_kernel_writes_what_the_torch_form_writes(shape, source, dtype):
    weight = random_weight(*shape, source)
    expected, result = (
        nf4.allocate(shape[0] + 16, shape[1], dtype, "cpu"),
        nf4.allocate(shape[0] + 16, shape[1], dtype, "cpu"),
    )
    nf4.quantize_rows(*expected, 8, weight)
    nf4.launch_quantize(*result, 8, weight, interpreted=True)
    for mine, theirs in zip(result, expected, strict=True):
        whole = [
            tensor.as_strided((tensor.untyped_storage().size() // tensor.element_size(),), (1,))
            for tensor in (mine, theirs)
        ]
        assert torch.equal(*whole)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(8, 64), (72, 128), (136, 192)])
def test_dequantise_kernel_writes_what_the_torch_form_writes(shape, dtype):
    packed, absmax = nf4.allocate(*shape, dtype, "cpu")
    nf4.quantize_rows(packed, absmax, 0, random_weight(*shape))
    guarded = torch.full((shape[0] * shape[1] + 64,), 7.0, dtype=dtype)
    out = guarded[: shape[0] * shape[1]].view(shape)
    nf4.launch_dequantize(packed, absmax, out, interpreted=True)
    assert torch.equal(out.view(torch.int16), nf4.dequantize(packed, absmax).view(torch.int16))
    assert bool((guarded[-64:] == 7).all())


CASES = [
    # rows of x, N, K, tile, split, bias
    (1, 64, 128, Tile(64, 16, 4, 3, 1), 1, False),
    (2, 8, 64, Tile(64, 16, 4, 3, 2), 1, True),
    (16, 136, 320, Tile(64, 16, 4, 4, 1), 2, False),
    (17, 136, 576, Tile(128, 16, 4, 3, 2), 3, True),
    (33, 136, 192, Tile(128, 32, 8, 3, 1), 2, True),
    (64, 72, 640, Tile(128, 64, 4, 2, 2), 5, False),
    (129, 264, 256, Tile(256, 128, 8, 3, 1), 1, True),
    (300, 72, 512, Tile(128, 128, 8, 3, 2), 4, False),
]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("rows", "features", "columns", "tile", "split", "with_bias"), CASES)
def test_fused_product_equals_the_product_of_dequantised_weights(
    rows, features, columns, tile, split, with_bias, dtype
):
    packed, absmax = nf4.allocate(features, columns, dtype, "cpu")
    nf4.quantize_rows(packed, absmax, 0, random_weight(features, columns))
    wide = torch.randn(rows, columns + 8).to(dtype)
    wide[:, columns:] = float("nan")  # what lies beside a row of x must not be read into it
    x = wide[:, :columns]
    bias = torch.randn(features).to(dtype) if with_bias else None
    guarded = torch.full((rows + 1, features + 3), 7.0, dtype=dtype)
    out = guarded[:rows, :features]
    out.fill_(float("nan"))
    nf4_gemm.launch_gemm(x, packed, absmax, bias, out, tile, split, interpreted=True)
    expected = x.float() @ nf4.dequantize(packed, absmax).float().T + (bias.float() if with_bias else 0.0)
    assert (out.float() - expected).norm() <= TOLERANCE[dtype] * expected.norm()
    assert bool((guarded[rows:] == 7).all()) and bool((guarded[:, features:] == 7).all())
    assert not nf4_gemm.workspace(x.device)[1].any(), "the last program of a tile clears its counter"


def test_a_slice_of_rows_multiplies_like_the_whole():
    packed, absmax = nf4.allocate(48, 192, torch.bfloat16, "cpu")
    nf4.quantize_rows(packed, absmax, 0, random_weight(48, 192))
    x = torch.randn(5, 192).bfloat16()
    whole, part = torch.empty(5, 48, dtype=torch.bfloat16), torch.empty(5, 24, dtype=torch.bfloat16)
    nf4_gemm.launch_gemm(x, packed, absmax, None, whole, Tile(64, 16, 4, 3, 1), 1, interpreted=True)
    nf4_gemm.launch_gemm(x, packed[16:40], absmax[16:40], None, part, Tile(64, 16, 4, 3, 1), 1, interpreted=True)
    torch.testing.assert_close(part, whole[:, 16:40], rtol=8e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("rows", "columns", "ranks", "scale"), [(1, 64, 16, 1.0), (17, 576, 48, 1.0), (5, 1100, 32, 0.5)]
)
def test_shrink_kernel_equals_the_product(rows, columns, ranks, scale, dtype):
    wide = torch.randn(rows, columns + 8).to(dtype)
    wide[:, columns:] = float("nan")
    x, a = wide[:, :columns], torch.randn(ranks, columns).to(dtype)
    out = launch_shrink(x, a, torch.tensor(scale, dtype=dtype), interpreted=True)
    expected = x.float() @ a.float().T * scale
    assert (out.float() - expected).norm() <= TOLERANCE[dtype] * expected.norm()
    assert not workspace(x.device, SHRINK_BYTES)[1].any()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("split", "ranks", "columns"),
    [(1, 16, 192), (2, 48, 192), (3, 16, 512), (5, 48, 768), (6, 16, 256), (8, 16, 1152)],
)
def test_an_adapter_is_added_before_the_result_is_rounded(split, ranks, columns, dtype):
    """Also where the last parts of K, whose program adds it, are empty: their first column is behind the last one."""
    rows, features = 17, 72
    packed, absmax = nf4.allocate(features, columns, dtype, "cpu")
    nf4.quantize_rows(packed, absmax, 0, random_weight(features, columns))
    x, bias = torch.randn(rows, columns).to(dtype), torch.randn(features).to(dtype)
    x_lora_a, b = torch.randn(rows, ranks).to(dtype), torch.randn(features, ranks).to(dtype)
    out = torch.full((rows, features), float("nan"), dtype=dtype)
    tile = Tile(64, 16, 4, 3, 1)
    nf4_gemm.launch_gemm(x, packed, absmax, bias, out, tile, split, LowRank(x_lora_a, b), interpreted=True)
    expected = x.float() @ nf4.dequantize(packed, absmax).float().T + bias.float() + x_lora_a.float() @ b.float().T
    assert (out.float() - expected).norm() <= TOLERANCE[dtype] * expected.norm()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("has_dot", [True, False])
@pytest.mark.parametrize(
    ("rows", "features", "ranks", "bias"), [(1, 8, 4, True), (17, 136, 48, False), (20, 130, 80, True)]
)
def test_sum_kernel_adds_bias_and_adapter_and_rounds_once(rows, features, ranks, bias, has_dot, dtype, monkeypatch):
    monkeypatch.setattr(lora_sum, "has_dot", lambda tensor: has_dot)
    total = torch.randn(rows, features)
    given = torch.randn(features).to(dtype) if bias else None
    x_lora_a = torch.randn(rows, ranks).to(dtype)
    b = (torch.randn(ranks, features) * 1e-2).to(dtype).t()
    whole = torch.full((rows, features + 8), float("nan"), dtype=dtype)
    round_sum(total, given, LowRank(x_lora_a, b), whole[:, :features])
    exact = total.double() + x_lora_a.double() @ b.double().T + (0 if given is None else given.double())
    assert share_rounded_more_than_once(whole[:, :features], exact) <= 0.005
    assert whole[:, features:].isnan().all()


@pytest.mark.parametrize(
    ("rows", "features", "columns", "tile", "split", "with_bias", "ranks"),
    [
        (1, 64, 128, Tile(64, 8, 4, 1, 1), 1, False, 0),
        (9, 72, 320, Tile(64, 8, 4, 1, 1), 3, True, 0),
        (17, 136, 192, Tile(128, 16, 4, 1, 1), 2, True, 16),
        (33, 72, 64, Tile(64, 32, 4, 1, 1), 1, False, 48),
    ],
)
def test_the_product_of_sm_75_equals_the_product_of_dequantised_weights(
    rows, features, columns, tile, split, with_bias, ranks
):
    dtype = torch.float16
    packed, absmax = nf4.allocate(features, columns, dtype, "cpu")
    nf4.quantize_rows(packed, absmax, 0, random_weight(features, columns))
    wide = torch.randn(rows, columns + 8).to(dtype)
    wide[:, columns:] = float("nan")
    x = wide[:, :columns]
    bias = torch.randn(features).to(dtype) if with_bias else None
    low_rank = LowRank(torch.randn(rows, ranks).to(dtype), torch.randn(features, ranks).to(dtype)) if ranks else None
    guarded = torch.full((rows + 1, features + 3), 7.0, dtype=dtype)
    out = guarded[:rows, :features]
    out.fill_(float("nan"))
    launch_turing(x, packed, absmax, bias, out, tile, split, low_rank, interpreted=True)
    expected = x.double() @ nf4.dequantize(packed, absmax).double().T + (bias.double() if with_bias else 0.0)
    if low_rank is not None:
        expected += low_rank.x_lora_a.double() @ low_rank.b.double().T
    assert (out.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()
    assert share_rounded_more_than_once(out, expected) <= 0.005
    assert bool((guarded[rows:] == 7).all()) and bool((guarded[:, features:] == 7).all())
    assert not nf4_gemm.workspace(x.device)[1].any()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("rows", "features", "columns", "ranks", "bias"),
    [(1, 8, 64, 16, True), (5, 136, 576, 48, False), (33, 72, 192, 20, True), (64, 130, 640, 0, True)],
)
def test_dense_kernel_adds_bias_and_adapter_and_rounds_once(rows, features, columns, ranks, bias, dtype):
    weight = random_weight(features, columns + 8, dtype)[:, :columns]
    x = torch.randn(rows, columns + 8).to(dtype)[:, :columns]
    given = torch.randn(features).to(dtype) if bias else None
    x_lora_a, b = torch.randn(rows, ranks).to(dtype), (torch.randn(ranks, features) * 1e-2).to(dtype).t()
    whole = torch.full((rows, features + 8), float("nan"), dtype=dtype)
    dense_gemm(x, weight, given, LowRank(x_lora_a, b) if ranks else None, whole[:, :features], 100_000)
    exact = x.double() @ weight.double().T + x_lora_a.double() @ b.double().T + (0 if given is None else given.double())
    assert share_rounded_more_than_once(whole[:, :features], exact) <= 0.005
    assert whole[:, features:].isnan().all()


def test_a_row_of_a_dense_product_has_the_same_bits_whatever_other_rows_there_are():
    assert split_of(72, 576) == 4
    weight, x = random_weight(72, 576, torch.bfloat16), torch.randn(40, 576).to(torch.bfloat16)
    low_rank = LowRank(torch.randn(40, 16).to(torch.bfloat16), torch.randn(72, 16).to(torch.bfloat16))
    together = torch.empty(40, 72, dtype=torch.bfloat16)
    dense_gemm(x, weight, None, low_rank, together, 100_000)
    for row in (0, 17, 39):
        alone = torch.empty(1, 72, dtype=torch.bfloat16)
        part = slice(row, row + 1)
        dense_gemm(x[part], weight, None, LowRank(low_rank.x_lora_a[part], low_rank.b), alone, 100_000)
        assert torch.equal(alone, together[part])
