"""kernels/delta_rule.py in Triton's interpreter, on the CPU. test_recurrence.py runs this with TRITON_INTERPRET=1."""

import os

import pytest
import torch

from grpo.kernels import gated_delta
from grpo.kernels.attention import Packing, Span
from grpo.kernels.gated_delta import FORMS
from grpo.kernels.recurrence import Recurrence
from tests.kernels.test_recurrence import TREE, alone, spans_of, written_out

assert os.environ.get("TRITON_INTERPRET") == "1", "pytest tests/kernels/test_recurrence.py runs this file"

CPU = torch.device("cpu")


def drawn(tokens, dims, dtype, alike=0.0):
    """query, key, value, decay, beta, and dL/dy. alike: how much of every key is the same."""
    torch.manual_seed(0)
    query, key, value, weight = (torch.randn(tokens, heads, dims[heads == 4]) for heads in (2, 2, 4, 4))
    key = key * (1 - alike) + alike * torch.ones(dims[0])
    decay = -torch.rand(tokens, 4) * torch.tensor([1e-3, 0.1, 1.0, 4.0])
    beta = torch.rand(tokens, 4) * (1 - alike) + alike
    return [part.to(dtype) for part in (query, key, value)] + [decay, beta.to(dtype), weight.to(dtype)]


def with_grads(call, parts, weight):
    leaves = [part.detach().clone().requires_grad_() for part in parts]
    result = call(leaves)
    return [result.detach(), *torch.autograd.grad(result, leaves, weight.to(result.dtype))]


def by_token(spans):
    """The rule token by token, each sequence by itself."""

    def call(parts):
        runs = [written_out(*(part[alone(spans, span)] for part in parts))[0][-span.length :] for span in spans]
        return torch.cat(runs)

    return call


def check(spans, parts, bounds):
    recurrence = Recurrence.of(Packing(spans, CPU))
    *inputs, weight = parts
    ours = with_grads(lambda leaves: FORMS["kernels"].apply(recurrence, *leaves), inputs, weight)
    exact = with_grads(by_token(spans), [part.double() for part in inputs], weight)
    for one, other, part, bound in zip(ours, exact, [inputs[2], *inputs], bounds, strict=True):
        assert one.dtype == part.dtype
        assert (one.double() - other).norm() <= bound * other.norm(), bound


FLOAT32 = [1e-5] * 6
BFLOAT16 = [3e-3] * 4 + [1e-4, 3e-3]
"""The gradient of the decays alone is not rounded to bfloat16."""


@pytest.mark.parametrize("dims", [(8, 6), (32, 40)])
def test_a_tree_of_spans_in_float32(dims):
    check(TREE, drawn(sum(span.length for span in TREE), dims, torch.float32), FLOAT32)


def test_a_tree_of_spans_in_bfloat16():
    check(TREE, drawn(sum(span.length for span in TREE), (24, 20), torch.bfloat16), BFLOAT16)


def test_keys_that_are_all_but_equal_and_wholly_overwritten():
    spans = [Span(0, 130)]
    check(spans, drawn(130, (16, 16), torch.float32, alike=0.98), [1e-4] * 6)


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.wide) for seed in range(2, 8))])
def test_any_tree(seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 140, (5,), generator=generator).tolist()
    parents = torch.randint(-2, 5, (5,), generator=generator).tolist()
    check(spans_of(lengths, parents), drawn(sum(lengths), (8, 8), torch.float32), FLOAT32)


def test_heads_that_do_not_fit_together_are_computed_apart(monkeypatch):
    monkeypatch.setattr(gated_delta, "DELTA_RULE_BYTES", 1)
    spans = [Span(0, 40), Span(40, 30, 0, 40)]
    check(spans, drawn(70, (8, 8), torch.float32), FLOAT32)


def test_tensors_as_they_lie_in_a_projection():
    tokens = 70
    mixed = torch.randn(tokens, 2 * 8 + 2 * 8 + 4 * 8)
    query, key, value = (part.unflatten(1, (-1, 8)) for part in mixed.split([16, 16, 32], 1))
    decay, beta = -torch.rand(tokens, 4), torch.rand(4, tokens).t()
    recurrence = Recurrence.of(Packing([Span(0, 40), Span(40, 30, 0, 40)], CPU))
    weight = torch.randn(4, tokens, 8).transpose(0, 1)
    results = []
    for form in FORMS.values():
        leaves = [part.detach().requires_grad_() for part in (query, key, value, decay, beta)]
        y = form.apply(recurrence, *leaves)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, weight)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
