"""Which of vLLM's norms and activations are replaced for decoding batches, and that they compute the same."""

import pytest
import torch
from torch import nn

pytest.importorskip("vllm")

from vllm.model_executor.layers.activation import SiluAndMul  # noqa: E402
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm  # noqa: E402

from grpo.kernels.rms_norm import Norm  # noqa: E402
from grpo.rollout.decoding_layers import serve_between  # noqa: E402


class Marked(Exception):
    """vLLM's own forward was called."""


def theirs(*arguments):
    raise Marked


def plain_norm(columns=96):
    norm = RMSNorm.__new__(RMSNorm)
    nn.Module.__init__(norm)
    norm.has_weight, norm.variance_size_override, norm.variance_epsilon = True, None, 1e-5
    norm.weight = nn.Parameter(torch.randn(columns).bfloat16(), requires_grad=False)
    norm.forward = theirs
    return norm


def test_a_plain_norm_with_a_residual_is_ours():
    norm = plain_norm()
    assert serve_between(nn.Sequential(norm)) == 1
    x, residual = torch.randn(3, 96).bfloat16(), torch.randn(3, 96).bfloat16()
    total = x + residual
    expected = Norm(norm.weight, 1e-5).forward(total)
    y, carried = norm(x, residual)
    assert torch.equal(y, expected) and torch.equal(carried, total) and carried is residual


@pytest.mark.parametrize(
    ("rows", "dtype", "with_residual"),
    [(3, torch.bfloat16, False), (600, torch.bfloat16, True), (3, torch.float32, True)],
)
def test_the_rest_stays_with_vllm(rows, dtype, with_residual):
    norm = plain_norm()
    serve_between(nn.Sequential(norm))
    x = torch.randn(rows, 96).to(dtype)
    with pytest.raises(Marked):
        norm(x, x.clone() if with_residual else None)


def test_other_forms_and_a_cpu_stay_with_vllm():
    gemma, act, wide = (kind.__new__(kind) for kind in (GemmaRMSNorm, SiluAndMul, RMSNorm))
    for module in (gemma, act, wide):
        nn.Module.__init__(module)
        module.forward = theirs
    wide.has_weight, wide.variance_size_override = True, 64
    assert serve_between(nn.Sequential(gemma, act, wide)) == 1, "the activation alone"
    for module in (act, gemma):
        with pytest.raises(Marked):
            module(torch.randn(2, 8).bfloat16())
