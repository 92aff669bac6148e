"""Experts against what they are: a loop over tokens and their experts, in float64, with its gradients."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grpo.kernels import experts as module
from grpo.kernels import nf4, nf4_experts
from grpo.kernels.experts import ExpertMatrix, Experts, experts_mlp, group, route
from tests.helpers.paths import ROOT


def made(
    experts: int, inner: int, hidden: int, dtype: torch.dtype, packed: bool = False, biased: bool = False
) -> Experts:
    """Random experts, dense or in NF4; with biases, those of gpt-oss."""
    matrices = []
    for rows, columns in ((2 * inner, hidden), (hidden, inner)):
        weight, absmax = torch.randn(experts * rows, columns) * 0.2, None
        bias = torch.randn(experts, rows).to(dtype) if biased else None
        if packed:
            stored, absmax = nf4.allocate(experts * rows, columns, dtype, "cpu")
            nf4.quantize_rows(stored, absmax, 0, weight)
            matrices.append(ExpertMatrix(stored, absmax, experts, bias))
        else:
            matrices.append(ExpertMatrix(weight.to(dtype), None, experts, bias))
    return Experts(*matrices, activation="clamped_silu" if biased else "silu")


def by_token(x: Tensor, experts: Experts, chosen: Tensor, weights: Tensor) -> Tensor:
    """The sum over each token's experts, one at a time."""
    gate_up, down = experts.gate_up.dense().to(x.dtype), experts.down.dense().to(x.dtype)
    above, below = (
        torch.zeros(each.shape[:2], dtype=x.dtype) if each.bias is None else each.bias.to(x.dtype)
        for each in (experts.gate_up, experts.down)
    )
    rows = []
    for token in range(len(x)):
        total = torch.zeros_like(x[token])
        for place in range(chosen.shape[1]):
            expert = int(chosen[token, place])
            gate, up = (gate_up[expert] @ x[token] + above[expert]).chunk(2)
            if experts.activation == "clamped_silu":
                gate, up = gate.clamp(max=7), up.clamp(-7, 7) + 1
                inner = gate * torch.sigmoid(1.702 * gate) * up
            else:
                inner = torch.nn.functional.silu(gate) * up
            total = total + weights[token, place] * (down[expert] @ inner + below[expert])
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.slow
def test_kernels_in_the_interpreter() -> None:
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(here / "interpreted_experts.py")]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


sizes = {
    "tokens": st.integers(1, 20), "experts": st.integers(2, 9), "top_k": st.integers(1, 4),
    "packed": st.booleans(), "biased": st.booleans(), "pieces": st.booleans(), "seed": st.integers(0, 99),
}  # fmt: skip


@settings(max_examples=20)
@given(**sizes)
def test_values_and_gradients_are_those_of_a_loop(
    tokens: int, experts: int, top_k: int, packed: bool, biased: bool, pieces: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    top_k = min(top_k, experts)
    ours = made(experts, 64, 128, torch.float32, packed, biased)
    x = torch.randn(tokens, 128, requires_grad=True)
    logits = torch.randn(tokens, experts, requires_grad=True)
    weights, chosen = route(logits, top_k, renormalize=True)
    incoming = torch.randn(tokens, 128)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "EXPERTS_BYTES", (1 << 17) if pieces else module.EXPERTS_BYTES)
        result = experts_mlp(x, ours, chosen, weights)
        got = torch.autograd.grad((result * incoming).sum(), [x, logits], retain_graph=True)
    wide_x, wide_logits = (each.detach().double().requires_grad_() for each in (x, logits))
    expected = by_token(wide_x, ours, chosen, route(wide_logits, top_k, True, chosen)[0])
    wanted = torch.autograd.grad((expected * incoming.double()).sum(), [wide_x, wide_logits])
    torch.testing.assert_close(result.double(), expected, atol=2e-4, rtol=2e-4)
    for ours_grad, grad in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours_grad.double(), grad, atol=1e-3, rtol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(module.sampled_mlp(x, ours, chosen, weights), result, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_by_pieces_of_dequantised_experts_is_the_whole(transposed: bool, monkeypatch: Any) -> None:
    torch.manual_seed(0)
    matrix = made(7, 64, 128, torch.float32, packed=True).down
    chosen = torch.tensor([[0, 6], [6, 3], [3, 5]])  # some have no rows
    ends = group(chosen, 7).ends
    x = torch.randn(6, 128 if transposed else 64)
    whole = module.grouped(x, matrix, ends, transposed=transposed)
    monkeypatch.setattr(module, "EXPERTS_BYTES", 2 * 128 * 64 * 4)
    torch.testing.assert_close(module.grouped(x, matrix, ends, transposed=transposed), whole)


def test_a_row_has_the_same_bits_whatever_other_rows_there_are() -> None:
    torch.manual_seed(0)
    ours = made(8, 64, 128, torch.bfloat16)
    x, logits = torch.randn(9, 128).bfloat16(), torch.randn(9, 8).bfloat16()
    weights, chosen = route(logits, 2, True)
    together = experts_mlp(x, ours, chosen, weights)
    alone = torch.cat([experts_mlp(x[i : i + 1], ours, chosen[i : i + 1], weights[i : i + 1]) for i in range(9)])
    torch.testing.assert_close(together, alone, atol=0.02, rtol=0.02)


def on_gpu(experts: Experts) -> Experts:
    """The same on a GPU; what is packed keeps its layout."""
    moved = [
        ExpertMatrix(*(None if each is None else nf4_moved(each) for each in matrix[:2]), matrix.experts)
        for matrix in (experts.gate_up, experts.down)
    ]
    return Experts(*moved, experts.activation)


def nf4_moved(tensor: Tensor) -> Tensor:
    """A copy on the GPU with the same strides."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda").copy_(tensor)


@pytest.mark.gpu
@pytest.mark.parametrize("halves", [0, 1, 2])
def test_packed_products_by_shuffles_are_those_of_dequantised_experts(halves: int, monkeypatch: Any) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(nf4_experts, "SHUFFLED_HALVES", halves)
    monkeypatch.setattr(nf4_experts, "_shuffled", {})
    ours = on_gpu(made(16, 256, 512, torch.bfloat16, packed=True))
    for tile in (*nf4_experts.FEW[:1], *nf4_experts.MANY[:1]):
        assert nf4_experts.agrees(ours.gate_up, 4, tile, 16, ours.activation)
        assert nf4_experts.agrees(ours.down, 4, tile, 16)


@pytest.mark.gpu
def test_gradients_on_a_gpu_are_those_of_the_cpu() -> None:
    torch.manual_seed(0)
    ours = made(8, 128, 128, torch.bfloat16, packed=True)
    x, logits, incoming = torch.randn(300, 128), torch.randn(300, 8), torch.randn(300, 128)
    chosen = route(logits, 3, True)[1]
    found = []
    for device, experts, dtype in (("cuda", on_gpu(ours), torch.bfloat16), ("cpu", ours, torch.float32)):
        if device == "cpu":
            dense = [ExpertMatrix(each.dense().float().flatten(0, 1), None, 8) for each in (ours.gate_up, ours.down)]
            experts = Experts(*dense, ours.activation)
        leaves = [each.to(device).to(dtype).requires_grad_() for each in (x.bfloat16(), logits.bfloat16())]
        weights, _ = route(leaves[1], 3, True, chosen.to(device))
        result = experts_mlp(leaves[0], experts, chosen.to(device), weights)
        total = (result * incoming.bfloat16().to(device).to(dtype)).sum()
        found.append([each.double().cpu() for each in (result.detach(), *torch.autograd.grad(total, leaves))])
    for one, right in zip(*found, strict=True):
        assert float((one - right).norm() / right.norm()) < 0.02


@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 99))
def test_rows_are_sorted_by_expert_and_then_by_token(tokens: int, experts: int, seed: int) -> None:
    torch.manual_seed(seed)
    top_k = min(3, experts)
    chosen = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)])
    order, ends, place = group(chosen, experts)
    flat = chosen.reshape(-1)
    assert torch.equal(order[place], torch.arange(len(flat)))
    assert sorted(order.tolist()) == list(range(len(flat)))
    keys = [(int(flat[place]), int(place)) for place in order]
    assert keys == sorted(keys)
    assert ends.tolist() == [int((flat <= expert).sum()) for expert in range(experts)]
