"""What the tests of the training kernels share: random tensors, tolerances, and each kernel's formula in torch."""

import pytest
import torch
import torch.nn.functional as F

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
"""Relative error, in norm, of one rounding (bfloat16: 2^-9 on average per value) and of float32 sums."""
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
EPS = 1e-5


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
