"""Recurrent operators over packed rows against the same token by token: any tree of spans, every gradient."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grpo.kernels import delta_step, gated_delta
from grpo.kernels.attention import Packing, Span
from grpo.kernels.gated_delta import FORMS, gated_delta_rule, unit
from grpo.kernels.gated_norm import gated_norm
from grpo.kernels.recurrence import Recurrence
from grpo.kernels.short_conv import short_conv
from tests.helpers.paths import ROOT

CPU = torch.device("cpu")
TREE = [
    Span(0, 70), Span(70, 130, 0, 70), Span(200, 1, 0, 70), Span(201, 64, 0, 70), Span(265, 3), Span(268, 5, 265, 3),
    Span(273, 2, 265, 3), Span(275, 1, 273, 2, ((265, 3),)), Span(276, 80, 275, 1, ((265, 3), (273, 2))),
]  # fmt: skip
"""Chunks that are full, and not; a prompt of fewer tokens than a convolution looks back; sharing within sharing."""


def spans_of(lengths: list[int], parents: list[int]) -> list[Span]:
    """Each span continues an earlier one, or none (a negative number)."""
    spans: list[Span] = []
    start = 0
    for length, parent in zip(lengths, parents, strict=True):
        follows = parent >= 0 and spans
        spans.append(spans[parent % len(spans)].continued(start, length) if follows else Span(start, length))
        start += length
    return spans


TREES = st.integers(1, 6).flatmap(
    lambda count: st.builds(
        spans_of,
        st.lists(st.integers(1, 140), min_size=count, max_size=count),
        st.lists(st.integers(-2, 5), min_size=count, max_size=count),
    )
)


def alone(spans: list[Span], span: Span) -> Tensor:
    """The packed tokens of the whole sequence that ends with `span`."""
    return torch.cat([torch.arange(start, start + length) for start, length in span.ranges])


def written_out(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The rule for one sequence, as its docstring has it, and the state after it."""
    shared = value.shape[1] // key.shape[1]
    query, key = (unit(part).repeat_interleave(shared, 1) for part in (query, key))
    state = value.new_zeros(value.shape[1], key.shape[2], value.shape[2]) if state is None else state
    outputs = []
    for q, k, v, g, b in zip(query, key, value, decay, beta, strict=True):
        state = state * g.exp()[:, None, None]
        state = state + k[:, :, None] * ((v - (state * k[:, :, None]).sum(1)) * b[:, None])[:, None]
        outputs.append((state * q[:, :, None]).sum(1) * key.shape[2] ** -0.5)
    return torch.stack(outputs), state


def drawn(tokens: int, seed: int = 0) -> list[Tensor]:
    """query, key, value, decay, beta: two heads of keys, each for two of values."""
    torch.manual_seed(seed)
    sizes = [(tokens, 2, 8), (tokens, 2, 8), (tokens, 4, 6)]
    parts = [torch.randn(size, dtype=torch.float64) for size in sizes]
    return [*parts, -torch.rand(tokens, 4, dtype=torch.float64) * 3, torch.rand(tokens, 4, dtype=torch.float64)]


def check_delta(spans: list[Span], monkeypatch: Any = None) -> None:
    recurrence = Recurrence.of(Packing(spans, CPU))
    ours = [part.requires_grad_() for part in drawn(recurrence.tokens)]
    theirs = [part.detach().clone().requires_grad_() for part in ours]
    result = gated_delta_rule(*ours, recurrence)
    expected = [written_out(*(part[alone(spans, span)] for part in theirs))[0][-span.length :] for span in spans]
    torch.testing.assert_close(result, torch.cat(expected))
    weight = torch.randn(result.shape, dtype=torch.float64)
    grads, wanted = torch.autograd.grad(result, ours, weight), torch.autograd.grad(torch.cat(expected), theirs, weight)
    for one, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_the_delta_rule_over_a_tree_of_spans() -> None:
    check_delta(TREE)


def test_heads_that_do_not_fit_together_are_computed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gated_delta, "DELTA_RULE_BYTES", 1)
    check_delta(TREE)


@pytest.mark.wide
@settings(max_examples=25, deadline=None, derandomize=True)
@given(TREES)
def test_the_delta_rule_over_any_tree(spans: list[Span]) -> None:
    check_delta(spans)


@pytest.mark.parametrize("shape", [(9, 3, 8), (2, 1, 1)])
def test_a_gated_norm_and_its_gradients(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    x, gate = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(shape[2], dtype=torch.float64)
    expected = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight * F.silu(gate)
    torch.testing.assert_close(gated_norm(x, gate, weight, 1e-6), expected)
    assert torch.autograd.gradcheck(lambda x, gate: gated_norm(x, gate, weight, 1e-6), (x, gate))


def conv_alone(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    width = weight.shape[1]
    padded = F.pad(x.t()[None], (width - 1, 0))
    return F.conv1d(padded, weight[:, None], bias, groups=len(weight))[0].t()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(TREES, st.integers(1, 5), st.booleans(), st.booleans())
def test_a_convolution_over_any_tree(spans: list[Span], width: int, silu: bool, biased: bool) -> None:
    recurrence = Recurrence.of(Packing(spans, CPU))
    torch.manual_seed(0)
    x = torch.randn(recurrence.tokens, 3, dtype=torch.float64, requires_grad=True)
    weight, bias = torch.randn(3, width, dtype=torch.float64), torch.randn(3, dtype=torch.float64) if biased else None
    result = short_conv(x, weight, bias, recurrence, silu=silu)
    expected = torch.cat([conv_alone(x[alone(spans, span)], weight, bias)[-span.length :] for span in spans])
    expected = F.silu(expected) if silu else expected
    torch.testing.assert_close(result, expected)
    grad = torch.randn_like(result)
    torch.testing.assert_close(torch.autograd.grad(result, x, grad)[0], torch.autograd.grad(expected, x, grad)[0])


def test_in_16_bit_the_state_is_float32_and_the_result_is_rounded_once() -> None:
    recurrence = Recurrence.of(Packing(TREE, CPU))
    parts = [part.to(torch.bfloat16) for part in drawn(recurrence.tokens)]
    parts[3] = parts[3].float()
    exact = gated_delta_rule(*(part.double() for part in parts), recurrence)
    torch.testing.assert_close(gated_delta_rule(*parts, recurrence), exact.bfloat16(), rtol=2**-7, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kernels", [["delta"], ["delta_step", "gated_norm", "short_conv"]], ids=str)
def test_kernels_in_the_interpreter(kernels: list[str]) -> None:
    run_in_the_interpreter(kernels)


@pytest.mark.wide
def test_more_trees_in_the_interpreter() -> None:
    run_in_the_interpreter(["delta"], "-m", "wide")


def run_in_the_interpreter(kernels: list[str], *options: str) -> None:
    """Triton reads TRITON_INTERPRET when it is imported, so this needs a process of its own."""
    files = [str(Path(__file__).with_name(f"interpreted_{name}.py")) for name in kernels]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, *options]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.gpu
@pytest.mark.parametrize("dims", [(128, 128), (64, 64), (64, 128), (32, 40)])
def test_kernels_on_a_gpu_are_the_rule(dims: tuple[int, int]) -> None:
    device, dtype = torch.device("cuda"), torch.bfloat16
    found = []
    recurrence = Recurrence(TREE, CPU)
    torch.manual_seed(0)
    sizes = [(recurrence.tokens, 2, dims[0])] * 2 + [(recurrence.tokens, 4, dims[1])] * 2
    *parts, weight = (torch.randn(size).to(dtype) for size in sizes)
    parts += [-torch.rand(recurrence.tokens, 4) * 3, torch.rand(recurrence.tokens, 4).to(dtype)]
    for form, where in (("kernels", Recurrence(TREE, device)), ("torch", recurrence)):
        given = [part.to(where.device, None if form == "kernels" else torch.float64) for part in parts]
        given = [part.requires_grad_() for part in given]
        result = FORMS[form].apply(where, *given)
        found.append((result, *torch.autograd.grad(result, given, weight.to(result))))
    bounds = [3e-3] * 4 + [1e-4, 3e-3]
    for one, exact, bound in zip(*found, bounds, strict=True):
        assert (one.detach().cpu().double() - exact.detach()).norm() < bound * exact.detach().norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_convolution_on_a_gpu_is_that_of_a_cpu(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(sum(span.length for span in TREE), 200).to(dtype), torch.randn(200, 4).to(dtype)
    found = []
    for device, kind in ((torch.device("cuda"), dtype), (CPU, torch.float64)):
        given = x.to(device, kind).requires_grad_()
        y = short_conv(given, weight.to(device, kind), None, Recurrence(TREE, device), silu=True)
        found.append((y, *torch.autograd.grad(y.square().sum(), given)))
    for one, exact in zip(*found, strict=True):
        bound = 1e-5 if dtype == torch.float32 else 1e-2
        assert (one.detach().cpu().double() - exact.detach()).norm() < bound * exact.detach().norm()


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(16, 2, 128, 128), (3, 1, 64, 40)])
def test_tokens_on_a_gpu_move_their_pages_on(sizes: tuple[int, int, int, int]) -> None:
    key_heads, shared, dim, value_dim = sizes
    heads, rows, pages = key_heads * shared, 7, 12
    keys, values = key_heads * dim, heads * value_dim
    torch.manual_seed(0)
    conv, x = torch.randn(pages, 3, 2 * keys + values).bfloat16(), torch.randn(rows, 2 * keys + values).bfloat16()
    states, ba = torch.randn(pages, heads, value_dim, dim), torch.randn(rows, 2 * heads).bfloat16()
    gate, slots = torch.randn(rows, values).bfloat16(), torch.tensor([3, 1, 11, 0, 7, 2, 9], dtype=torch.int32)
    parts = [torch.randn(x.shape[1], 4), torch.randn(heads), torch.randn(heads), torch.rand(value_dim)]
    weights = [part.bfloat16() for part in parts]
    on_gpu = [part.cuda() for part in (x, ba, gate, conv, states, slots)]
    made = delta_step.Weights(*(part.cuda() for part in weights), 1e-6, 1e-6, key_heads)
    out = torch.full_like(on_gpu[2], float("nan"))
    b, a = on_gpu[1].chunk(2, 1)
    delta_step.step(on_gpu[0], b, a, on_gpu[2], made, on_gpu[3], on_gpu[4], on_gpu[5], out)
    wide = [part.double() for part in weights]
    for row, slot in enumerate(slots.tolist()):
        taps = torch.cat([conv[slot], x[row : row + 1]])
        if not slot:
            assert not out[row].any() and torch.equal(on_gpu[3][0].cpu(), conv[0])
            continue
        mixed = F.silu((taps.double().t() * wide[0]).sum(1)).bfloat16().double()
        query, key, value = mixed.split([keys, keys, values])
        decay = -wide[1].exp() * F.softplus(ba[row, heads:].double() + wide[2])
        tensors = query.view(1, -1, dim), key.view(1, -1, dim), value.view(1, heads, -1)
        state = states[slot].double().transpose(1, 2)
        y, after = written_out(*tensors, decay[None], ba[row, :heads].double().sigmoid()[None], state)
        y = gated_norm(y.bfloat16().double(), gate[row].double().view(y.shape), wide[3], 1e-6)
        assert (out[row].cpu().double() - y.flatten()).norm() < 4e-3 * y.norm()
        assert (on_gpu[4][slot].cpu().double() - after.transpose(1, 2)).norm() < 2e-3 * after.norm()
        assert torch.equal(on_gpu[3][slot].cpu(), taps[1:])


@pytest.mark.gpu
def test_the_convolution_of_prompts_on_a_gpu_continues_pages() -> None:
    torch.manual_seed(0)
    lengths, begun = [1, 2, 130, 64], torch.tensor([True, False, True, True])
    ends = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    chunks = [(sequence, number) for sequence, length in enumerate(lengths) for number in range(-(-length // 64))]
    x, conv, weight = (
        torch.randn(197, 300).bfloat16(),
        torch.randn(9, 3, 300).bfloat16(),
        torch.randn(300, 4).bfloat16(),
    )
    slots = torch.tensor([4, 2, 8, 1], dtype=torch.int32)
    page = conv.cuda()
    sequences = delta_step.Sequences(*(part.cuda() for part in (ends, torch.tensor(chunks), slots, begun)))
    found = delta_step.convolve(x.cuda(), weight.cuda(), page, sequences, 64).cpu()
    for number, (length, slot) in enumerate(zip(lengths, slots.tolist(), strict=True)):
        own = slice(int(ends[number]), int(ends[number + 1]))
        before = conv[slot] if begun[number] else torch.zeros_like(conv[slot])
        taps = torch.cat([before, x[own]])
        expected = F.silu(conv_alone(taps.double(), weight.double(), None)[3:])
        assert len(expected) == length and (found[own].double() - expected).norm() < 4e-3 * expected.norm()
        assert torch.equal(page[slot].cpu(), taps[-3:])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gated_norm_on_a_gpu_is_that_of_a_cpu(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, gate, grad = (torch.randn(70, 3, 128).to(dtype) for _ in range(3))
    weight, found = torch.randn(128).to(dtype), []
    for device, kind in (("cuda", dtype), ("cpu", torch.float64)):
        leaves = [part.to(device, kind).requires_grad_() for part in (x, gate)]
        y = gated_norm(*leaves, weight.to(device, kind), 1e-6)
        found.append((y, *torch.autograd.grad(y, leaves, grad.to(device, kind))))
    for one, exact in zip(*found, strict=True):
        bound = 1e-5 if dtype == torch.float32 else 4e-3
        assert (one.detach().cpu().double() - exact.detach()).norm() < bound * exact.detach().norm()
