"""One rounding: an adapter's term is in the sum before it is rounded, whatever multiplies.

Every case compares with float64, in halves of a unit in the last place: one rounding is at most one of them away. The
way that peft and vLLM's LoRA take, which adds to a rounded product, is checked to fail the same test.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from grpo.kernels import lora_sum, nf4
from grpo.kernels.lora_factors import Adapter, LowRank
from grpo.kernels.lora_linear import LinearGroup, lora_linear
from grpo.kernels.lora_sum import dense_linear, round_sum
from grpo.model.base_weights import FusedLinear, Segment
from grpo.rollout.lora_buffers import AdapterBuffers
from grpo.rollout.vllm_model import SharedLinearMethod
from tests.helpers.rounding import half_units, share_rounded_more_than_once

HALVES = [torch.bfloat16, torch.float16]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
NEARLY_NONE = 0.002
"""Share of elements that float32 sums may bring across the middle between two values."""


class Case:
    """x, W, b and an adapter whose term is around half a unit of y, as after a few steps of training."""

    def __init__(self, rows, columns, features, ranks, dtype, device, *, bias=True, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape, scale):
            return (torch.randn(shape, generator=generator) * scale).to(dtype).to(device)

        self.x = normal(rows, columns, scale=1.0)
        self.weight = normal(features, columns, scale=columns**-0.5)
        self.bias = normal(features, scale=3.0) if bias else None
        self.a = normal(ranks, columns, scale=columns**-0.5)
        self.b = normal(features, ranks, scale=3e-3)

    @property
    def low_rank(self) -> LowRank:
        return LowRank(F.linear(self.x, self.a), self.b)

    def exact(self, weight: Tensor | None = None) -> Tensor:
        weight = self.weight if weight is None else weight
        y = self.x.double() @ weight.double().T + self.low_rank.x_lora_a.double() @ self.b.double().T
        return y if self.bias is None else y + self.bias.double()


@settings(max_examples=40)
@given(
    rows=st.integers(1, 70),
    columns=st.sampled_from([64, 192, 576]),
    features=st.sampled_from([8, 96, 520]),
    ranks=st.sampled_from([16, 48, 128]),
    dtype=st.sampled_from(HALVES),
    bias=st.booleans(),
)
@example(rows=1, columns=576, features=520, ranks=16, dtype=torch.bfloat16, bias=True)
def test_a_dense_product_with_an_adapter_is_rounded_once(rows, columns, features, ranks, dtype, bias):
    case = Case(rows, columns, features, ranks, dtype, "cpu", bias=bias)
    result = dense_linear(case.x, case.weight, case.bias, case.low_rank)
    assert result.dtype == dtype
    assert share_rounded_more_than_once(result, case.exact()) <= NEARLY_NONE


@pytest.mark.parametrize("dtype", HALVES)
def test_adding_to_a_rounded_product_fails_the_same_comparison(dtype):
    case = Case(64, 576, 520, 16, dtype, "cpu")
    rounded = F.linear(case.x, case.weight, case.bias)
    twice = rounded.addmm(case.low_rank.x_lora_a, case.b.t())
    assert share_rounded_more_than_once(twice, case.exact()) > 0.1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rows", [1, 33, 300])
@pytest.mark.parametrize("float32_bytes", [0, 64 << 20], ids=["copied weight", "float32 sum"])
@pytest.mark.parametrize("strided", [False, True])
def test_either_way_of_a_dense_product_rounds_once(strided, float32_bytes, rows, dtype, device, monkeypatch):
    monkeypatch.setattr(lora_sum, "FLOAT32_BYTES", float32_bytes)
    monkeypatch.setattr(lora_sum, "PIECE_BYTES", 128 * 600 * 2)  # several pieces
    case = Case(rows, 576, 520, 48, dtype, device)
    whole = torch.full((rows, 1040), float("nan"), dtype=dtype, device=device)
    out = whole[:, 260:780] if strided else None
    result = dense_linear(case.x, case.weight, case.bias, case.low_rank, out)
    assert share_rounded_more_than_once(result, case.exact()) <= NEARLY_NONE
    if out is not None:
        assert result is out and whole[:, :260].isnan().all() and whole[:, 780:].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("rows", "features", "ranks"), [(1, 8, 4), (37, 1000, 24), (300, 576, 384)])
def test_the_rounding_kernel_adds_bias_and_adapter(rows, features, ranks, dtype):
    total = torch.randn(rows, features, device="cuda")
    bias, x_lora_a = torch.randn(features, device="cuda").to(dtype), torch.randn(rows, ranks, device="cuda").to(dtype)
    b = (torch.randn(ranks, features, device="cuda") * 1e-2).to(dtype).t()  # strides the other way round
    out = torch.empty(rows, features, device="cuda", dtype=dtype)
    round_sum(total, bias, LowRank(x_lora_a, b), out)
    exact = total.double() + bias.double() + x_lora_a.double() @ b.double().T
    assert half_units(out, exact).quantile(0.99) <= 1.03


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rows", [5, 700])
def test_the_fused_linear_of_the_training_graph_rounds_once(rows, packed, dtype, device):
    case = Case(rows, 192, 96, 16, dtype, device)
    weight, stored = case.weight, (case.weight, None)
    if packed:
        stored = nf4.allocate(96, 192, dtype, device)
        nf4.quantize_rows(*stored, 0, weight.float())
        weight = nf4.dequantize(*stored)
    group = LinearGroup((stored,), case.bias)
    result = lora_linear(case.x, group, [Adapter(0, 96, 1.0)], [case.a.float(), case.b.float()])
    assert share_rounded_more_than_once(result, case.exact(weight)) <= NEARLY_NONE


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("form", ["16 bit", "NF4", "both"])
@pytest.mark.parametrize("rows", [1, 32, 128, 256, 700])
def test_the_rollouts_linear_rounds_once_at_every_number_of_rows(rows, form, dtype, device):
    case = Case(rows, 576, 960, 48, dtype, device)
    layer, segments, dense = served_layer(case, form, device)
    result = SharedLinearMethod().apply(layer, case.x, case.bias)
    x_lora_a = LowRank(F.linear(case.x, case.a), case.b)  # by another kernel than the layer's, so rounded elsewhere
    exact = case.x.double() @ dense.double().T + case.bias.double() + x_lora_a.x_lora_a.double() @ x_lora_a.b.double().T
    assert share_rounded_more_than_once(result, exact) <= (0.02 if device == "cuda" else NEARLY_NONE)


def served_layer(case: Case, form: str, device: str) -> tuple[nn.Module, list[Segment], Tensor]:
    """vLLM's layer with storage attached as the loader does it, its segments, and the dense weight they hold."""
    bounds = {"16 bit": [(0, 960, False)], "NF4": [(0, 960, True)], "both": [(0, 576, True), (576, 384, False)]}[form]
    segments, dense = [], []
    for first, rows, packed in bounds:
        weight = case.weight[first : first + rows]
        if packed:
            stored = nf4.allocate(rows, 576, weight.dtype, device)
            nf4.quantize_rows(*stored, 0, weight.float())
            segments.append(Segment(first, rows, *stored))
            dense.append(nf4.dequantize(*stored))
        else:
            segments.append(Segment(first, rows, weight))
            dense.append(weight)
    layer = nn.Module()
    layer.shared = FusedLinear("qkv_proj", {"q_proj": (0, 960)}, 576, 960, segments=segments)
    layer.served_features = 960
    layer.begins_early = False
    layer.adapter = AdapterBuffers(case.a, case.b)
    layer.adapter_on = torch.ones((), dtype=case.x.dtype, device=device)
    return layer, segments, torch.cat(dense)
