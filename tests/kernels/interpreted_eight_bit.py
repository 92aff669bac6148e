"""The 8-bit kernels in Triton's interpreter, on the CPU. test_eight_bit.py runs this file with TRITON_INTERPRET=1."""

import os

import pytest
import torch

from grpo.kernels import eight_bit
from grpo.kernels.eight_bit_gemm import Tile, launch_fused
from grpo.kernels.lora_factors import LowRank
from tests.helpers.rounding import share_rounded_more_than_once
from tests.kernels.eight_bit_weights import KINDS, random_form

assert os.environ.get("TRITON_INTERPRET") == "1", "pytest tests/kernels/test_eight_bit.py runs this file"

TOLERANCE = {torch.bfloat16: 3e-3, torch.float16: 4e-4}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", [(40, 192, 1, 1), (64, 320, 32, 3), (24, 96, 24, 1)])
def test_dequantise_kernel_writes_what_the_torch_form_writes(form, kind, dtype):
    codes, scales = random_form(kind, *form)
    guarded = torch.full((codes.numel() + 64,), 7.0, dtype=dtype)
    out = guarded[: codes.numel()].view(codes.shape)
    eight_bit.launch_dequantize(codes, scales, out, interpreted=True)
    assert torch.equal(out.view(torch.int16), eight_bit.dequantize(codes, scales, dtype).view(torch.int16))
    assert bool((guarded[-64:] == 7).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("form", "tile"),
    [
        ((72, 256, 1, 1), Tile(64, 128, 1)),
        ((72, 320, 24, 3), Tile(64, 128, 2)),
        ((40, 96, 8, 3), Tile(64, 32, 1)),
        ((72, 256, 1, 1), Tile(64, 128, 2, words=True)),
        ((128, 256, 64, 2), Tile(128, 128, 1, words=True)),
    ],
)
def test_the_fused_product_is_that_of_dequantised_weights_rounded_once(form, tile, kind, dtype):
    codes, scales = random_form(kind, *form)
    generator = torch.Generator().manual_seed(3)
    x, bias = torch.randn(20, form[1], generator=generator), torch.randn(form[0], generator=generator)
    x, bias = x.to(dtype), bias.to(dtype)
    x_lora_a, b = (torch.randn(size, 16, generator=generator).to(dtype) for size in (20, form[0]))
    low_rank = LowRank(x_lora_a, b)
    exact = x.double() @ eight_bit.dequantize(codes, scales, dtype).double().T + bias.double()
    exact += low_rank.x_lora_a.double() @ low_rank.b.double().T
    out = torch.full((20, form[0]), float("nan"), dtype=dtype)
    launch_fused(x, codes, scales, bias, out, low_rank, tile, interpreted=True)
    assert (out.double() - exact).norm() / exact.norm() < TOLERANCE[dtype]
    assert share_rounded_more_than_once(out, exact) < 0.01
    few = torch.empty(3, form[0], dtype=dtype)  # so few that x is put in the order of words as it is loaded
    launch_fused(x[:3], codes, scales, bias, few, LowRank(low_rank.x_lora_a[:3], low_rank.b), tile, interpreted=True)
    assert few.equal(out[:3])
