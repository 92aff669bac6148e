"""kernels/short_conv.py in Triton's interpreter, on the CPU. test_recurrence.py runs this with TRITON_INTERPRET=1."""

import os

import pytest
import torch
import torch.nn.functional as F

from grpo.kernels.attention import Packing
from grpo.kernels.recurrence import Recurrence
from grpo.kernels.short_conv import short_conv
from tests.kernels.test_recurrence import CPU, TREE, alone, conv_alone, spans_of

assert os.environ.get("TRITON_INTERPRET") == "1", "pytest tests/kernels/test_recurrence.py runs this file"


def check(spans, width, *, silu, biased, dtype=torch.float32, channels=150):
    recurrence = Recurrence.of(Packing(spans, CPU))
    torch.manual_seed(0)
    whole = torch.randn(recurrence.tokens, channels + 10).to(dtype)
    x = whole[:, 3 : channels + 3].requires_grad_()
    weight = torch.randn(channels, width).to(dtype)
    bias = torch.randn(channels).to(dtype) if biased else None
    result = short_conv(x, weight, bias, recurrence, silu=silu)
    exact = x.detach().double().requires_grad_()
    wide = weight.double(), None if bias is None else bias.double()
    expected = torch.cat([conv_alone(exact[alone(spans, span)], *wide)[-span.length :] for span in spans])
    expected = F.silu(expected) if silu else expected
    grad = torch.randn(result.shape).to(dtype)
    pairs = [
        (result, expected),
        (torch.autograd.grad(result, x, grad)[0], torch.autograd.grad(expected, exact, grad.double())[0]),
    ]
    bound = 1e-6 if dtype == torch.float32 else 3e-3
    for ours, theirs in pairs:
        assert ours.dtype == dtype
        assert (ours.detach().double() - theirs.detach()).norm() < bound * theirs.detach().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_tree_of_spans(dtype):
    check(TREE, 4, silu=True, biased=False, dtype=dtype)


@pytest.mark.parametrize(
    ("width", "silu", "biased"), [(1, True, True), (2, False, False), (3, False, True), (5, True, True)]
)
def test_widths_and_activations(width, silu, biased):
    check(TREE[:6], width, silu=silu, biased=biased, channels=20)


@pytest.mark.parametrize("seed", range(6))
def test_any_tree(seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (6,), generator=generator).tolist()
    parents = torch.randint(-2, 5, (6,), generator=generator).tolist()
    check(spans_of(lengths, parents), 4, silu=True, biased=False, channels=5)
