"""kernels/gated_norm.py in Triton's interpreter, on the CPU. test_recurrence.py runs this with TRITON_INTERPRET=1."""

import os

import pytest
import torch
import torch.nn.functional as F

from grpo.kernels.gated_norm import gated_norm

assert os.environ.get("TRITON_INTERPRET") == "1", "pytest tests/kernels/test_recurrence.py runs this file"


def written_out(x, gate, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight * F.silu(gate)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(70, 3, 20), (5, 4, 128), (1, 1, 1)])
def test_the_result_and_both_gradients(dtype, shape):
    torch.manual_seed(0)
    wide = torch.randn(shape[0], shape[1], 2 * shape[2] + 3).to(dtype)
    x, gate = (wide[..., first : first + shape[2]].requires_grad_() for first in (1, shape[2] + 2))
    weight, grad = torch.randn(shape[2]).to(dtype), torch.randn(shape).to(dtype)
    y = gated_norm(x, gate, weight, 1e-6)
    exact = [part.detach().double().requires_grad_() for part in (x, gate)]
    expected = written_out(*exact, weight.double(), 1e-6)
    bound = 1e-6 if dtype == torch.float32 else 4e-3
    pairs = zip(
        (y, *torch.autograd.grad(y, (x, gate), grad)),
        (expected, *torch.autograd.grad(expected, exact, grad.double())), strict=True,
    )  # fmt: skip
    for ours, theirs in pairs:
        assert ours.dtype == dtype
        assert (ours.detach().double() - theirs.detach()).norm() <= bound * theirs.detach().norm() + 1e-6


def test_what_does_not_fit_is_refused():
    x = torch.randn(3, 2, 8)
    for gate, weight in ((torch.randn(3, 2, 7), torch.ones(8)), (x.transpose(0, 2), torch.ones(8)), (x, torch.ones(4))):
        with pytest.raises(ValueError, match="gated norm"):
            gated_norm(x, gate, weight, 1e-6)
