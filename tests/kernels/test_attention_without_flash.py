"""kernels/attention.py where flash attention does not run: a GPU older than Ampere, and heads that it does not take."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.kernels import attention, attention_sinks
from grpo.kernels.attention import Packing, Span, packed_attention

CPU = torch.device("cpu")


def spans_of(groups: list[tuple[int, list[int]]]) -> list[Span]:
    """Prompts, each followed by the completions that share it, or alone."""
    nodes: list[tuple[int, int | None]] = []
    for prompt, completions in groups:
        nodes += [(prompt, None), *((length, len(nodes)) for length in completions)]
    return tree_of(nodes)


def tree_of(nodes: Sequence[tuple[int, int | None]]) -> list[Span]:
    """Spans of these (length, number of the one that is continued)."""
    spans: list[Span] = []
    place = 0
    for length, parent in nodes:
        spans.append(Span(place, length) if parent is None else spans[parent].continued(place, length))
        place += length
    return spans


@st.composite
def trees(draw) -> list[tuple[int, int | None]]:
    """Nodes of any trees, as `tree_of` takes them."""
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=9))
    return [(n, draw(st.none() | st.integers(0, index - 1)) if index else None) for index, n in enumerate(lengths)]


def seen_by(nodes, number):
    """The packed tokens before a node and its own, from the first of its sequence on."""
    length, parent = nodes[number]
    start = sum(length for length, _ in nodes[:number])
    return [*(seen_by(nodes, parent) if parent is not None else ()), *range(start, start + length)]


def reference(query, key, value, nodes, scale, window, sinks=None):
    """softmax(q k^T) v in float64, token by token: [tokens, heads, dim]. sinks [heads]: a score without a value."""
    groups = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    rows = []
    for number, (length, _) in enumerate(nodes):
        seen = seen_by(nodes, number)
        for end in range(len(seen) - length, len(seen)):
            keys = seen[: end + 1][-(window or len(seen)) :]
            scores = scale * key[:, keys] @ query[:, seen[end], :, None]
            if sinks is not None:
                scores = torch.cat([scores, sinks[:, None, None]], 1)
            weights = scores.softmax(1)[:, : len(keys)]
            rows.append((weights * value[:, keys]).sum(1))
    return torch.stack(rows)


@settings(max_examples=60, deadline=None)
@given(
    nodes=trees(),
    key_heads=st.sampled_from([1, 2, 4]),
    window=st.none() | st.integers(1, 14),
    seed=st.integers(0, 1000),
    form=st.sampled_from(["gathered", "written out", "masked"]),
    has_sinks=st.booleans(),
)
def test_outputs_and_gradients_are_those_of_the_definition(nodes, key_heads, window, seed, form, has_sinks):
    generator, tokens = torch.Generator().manual_seed(seed), sum(length for length, _ in nodes)
    leaf = torch.randn(4 + 2 * key_heads, tokens, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(tokens, 4, 8, generator=generator, dtype=torch.float64)
    sinks = 2 * torch.randn(4, generator=generator, dtype=torch.float64).requires_grad_() if has_sinks else None
    parts, found, leaves = leaf.split([4, key_heads, key_heads]), [], [leaf, sinks] if has_sinks else [leaf]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "without_scores", lambda query: form == "gathered")
        patch.setattr(attention, "PADDED_SCORES", 200)  # several batches
        patch.setattr(attention, "EXPLICIT_SCORES", 0 if form == "masked" else 1 << 22)
        packing = Packing(tree_of(nodes), CPU)
        for output in (
            packed_attention(*parts, packing, scale=8**-0.5, window=window, sinks=sinks),
            reference(*parts, nodes, 8**-0.5, window, sinks),
        ):
            found.append((output, *torch.autograd.grad((output * weight).sum(), leaves)))
    softmax_in_float32 = {"rtol": 1e-4, "atol": 1e-5} if form == "written out" else {}
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours, exact, **softmax_in_float32)


@given(st.integers(1, 20), st.integers(0, 1000))
def test_flash_attention_of_a_result_scaled_down_has_the_gradients_with_sinks(tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(1, 4, tokens, 8, generator=generator, dtype=torch.float64).requires_grad_() for _ in "qkv"]
    sinks = 2 * torch.randn(4, generator=generator, dtype=torch.float64)
    weight = torch.randn(tokens, 4, 8, generator=generator, dtype=torch.float64)
    named = {"dropout_p": 0.0, "is_causal": True, "scale": 0.3}
    plain, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*parts, **named)
    output, larger = attention_sinks.with_sinks(plain[0].transpose(0, 1), logsumexp[0], sinks)
    of_output, of_result = (each.transpose(0, 1)[None].contiguous() for each in (output, weight))
    ours = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        of_result, *parts, of_output, larger[None].contiguous(), **named
    )
    leaf = sinks.clone().requires_grad_()
    exact = reference(*(part[0] for part in parts), [(tokens, None)], 0.3, None, leaf)
    *wanted, of_sinks = torch.autograd.grad((exact * weight).sum(), [*parts, leaf])
    near = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(output, exact, **near)
    torch.testing.assert_close(attention_sinks.sinks_gradient(weight, output, larger, sinks), of_sinks, **near)
    for gradient, expected in zip(ours, wanted, strict=True):
        torch.testing.assert_close(gradient, expected, **near)


def test_nothing_of_the_size_of_scores_is_kept_without_a_window(monkeypatch):
    monkeypatch.setattr(attention, "without_scores", lambda query: True)
    spans, saved = spans_of([(256, [512, 512])]), []
    parts = [torch.randn(2, 1280, 16, requires_grad=True) for _ in range(3)]
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor.numel()) or tensor, lambda one: one
    ):
        packed_attention(*parts, Packing(spans, CPU), scale=0.25)
    # Gathered: two spans of 768 tokens, and one of 256 padded or apart.
    assert max(saved) <= 3 * 768 * 2 * 16


@pytest.mark.parametrize(("capability", "flash"), [((7, 5), False), ((8, 0), True), ((8, 6), True), ((12, 0), True)])
def test_flash_attention_is_left_to_ampere_and_later(monkeypatch, capability, flash):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    class OnGpu(torch.Tensor):
        is_cuda = True

    query = torch.empty(1, 4, 64, dtype=torch.float16).as_subclass(OnGpu)
    assert attention.flash_supports(query) is flash


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("window", [None, 300])
def test_on_a_gpu_it_agrees_with_flash_attention(dim, window, monkeypatch):
    device = torch.device("cuda")
    nodes = [(256, None), (512, 0), (512, 0), (300, 0), (40, None), (700, 4), (60, 1), (350, 6), (90, 6)]
    spans = tree_of(nodes)
    tokens = sum(span.length for span in spans)
    leaf = torch.randn(8 + 2 * 2, tokens, dim, device=device, dtype=torch.float16, requires_grad=True)
    weight = torch.randn(tokens, 8, dim, device=device, dtype=torch.float16)
    found = []
    for capability in ((8, 0), (99, 0)):
        monkeypatch.setattr(attention, "FLASH_CAPABILITY", capability)
        output = packed_attention(*leaf.split([8, 2, 2]), Packing(spans, device), scale=dim**-0.5, window=window)
        found.append((output, *torch.autograd.grad((output * weight).sum(), leaf)))
    for one, other in zip(*found, strict=True):
        assert (one.double() - other.double()).norm() < 5e-3 * one.double().norm()


@pytest.mark.gpu
@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("window", [None, 64])
def test_on_a_gpu_sinks_agree_with_the_definition(flash, window, monkeypatch):
    device, dim, scale = torch.device("cuda"), 64, 0.125
    nodes = [(70, None), (90, 0), (64, 0), (40, None), (30, 3), (20, 1), (1, None)]
    tokens = sum(length for length, _ in nodes)
    generator = torch.Generator().manual_seed(0)
    leaf = torch.randn(8 + 2 * 2, tokens, dim, generator=generator).to(device, torch.bfloat16).requires_grad_()
    sinks = torch.randn(8, generator=generator).to(device, torch.bfloat16).requires_grad_()
    weight = torch.randn(tokens, 8, dim, generator=generator).to(device, torch.bfloat16)
    monkeypatch.setattr(attention, "FLASH_CAPABILITY", (8, 0) if flash else (99, 0))
    ours = packed_attention(
        *leaf.split([8, 2, 2]), Packing(tree_of(nodes), device), scale=scale, window=window, sinks=sinks
    )
    exact, leaf_of_sinks = (each.detach().cpu().double().requires_grad_() for each in (leaf, sinks))
    expected = reference(*exact.split([8, 2, 2]), nodes, scale, window, leaf_of_sinks)
    grads = torch.autograd.grad((ours * weight).sum(), [leaf, sinks])
    wanted = torch.autograd.grad((expected * weight.cpu().double()).sum(), [exact, leaf_of_sinks])
    for one, other in ((ours, expected), *zip(grads, wanted, strict=True)):
        assert (one.detach().cpu().double() - other.detach()).norm() < 1e-2 * other.detach().norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_gpu_heads_of_512_agree_with_the_definition(dtype):
    device, dim = torch.device("cuda"), 512
    nodes = [(96, None), (130, 0), (64, 0), (40, None), (70, 3), (60, 1)]
    tokens = sum(length for length, _ in nodes)
    generator = torch.Generator().manual_seed(0)
    leaf = torch.randn(4 + 2, tokens, dim, generator=generator).to(device, dtype).requires_grad_()
    weight = torch.randn(tokens, 4, dim, generator=generator).to(device, dtype)
    exact = leaf.detach().cpu().double().requires_grad_()
    ours = packed_attention(*leaf.split([4, 1, 1]), Packing(tree_of(nodes), device), scale=dim**-0.5)
    expected = reference(*exact.split([4, 1, 1]), nodes, dim**-0.5, None)
    grad = torch.autograd.grad((ours * weight).sum(), leaf)[0]
    wanted = torch.autograd.grad((expected * weight.cpu().double()).sum(), exact)[0]
    bound = 1e-2 if dtype == torch.bfloat16 else 1e-4
    for one, other in ((ours, expected), (grad, wanted)):
        assert (one.detach().cpu().double() - other.detach()).norm() < bound * other.detach().norm()


@pytest.mark.gpu
def test_on_a_gpu_heads_of_512_keep_no_scores():
    device, dim, tokens, heads = torch.device("cuda"), 512, 16384, 4
    leaf = torch.randn(heads + 2, tokens, dim, device=device, dtype=torch.bfloat16, requires_grad=True)
    packing = Packing(tree_of([(tokens, None)]), device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    packed_attention(*leaf.split([heads, 1, 1]), packing, scale=dim**-0.5).sum().backward()
    assert torch.cuda.max_memory_allocated(device) - before < heads * tokens**2  # half of what scores take in 16 bit
