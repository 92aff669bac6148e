"""Chunked log-probabilities against full logits and autograd: values, gradients, chunk sizes, memory."""

import os
import subprocess
import sys

import pytest
import torch

from grpo.kernels import logprob
from grpo.kernels.launch import interpreter_enabled
from grpo.kernels.logprob import selected_logprobs
from tests.helpers.paths import ROOT

VOCABULARY, HIDDEN, TOKENS = 37, 12, 11


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def full_logits(hidden, weight, targets, *, temperature=1.0, softcap=None):
    """The plain form: all logits, softmax by autograd, in the inputs' own dtype."""
    logits = hidden @ weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logs = torch.log_softmax(logits / temperature, -1)
    return logs[torch.arange(len(targets)), targets], -(logs.exp() * logs).sum(-1)


def example(dtype=torch.float32, tokens=TOKENS, vocabulary=VOCABULARY):
    hidden = torch.randn(tokens, HIDDEN, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, HIDDEN, dtype=dtype)
    return hidden, weight, torch.randint(0, vocabulary, (tokens,))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_equals_full_logits_in_float32(softcap, entropy_gradient):
    hidden, weight, targets = example()
    coefficients = torch.randn(2, TOKENS)
    logprobs, entropy = selected_logprobs(
        hidden,
        weight,
        targets,
        temperature=1.7,
        softcap=softcap,
        chunk_tokens=3,
        entropy_gradient=entropy_gradient,
    )
    expected_logprobs, expected_entropy = full_logits(hidden, weight, targets, temperature=1.7, softcap=softcap)
    torch.testing.assert_close(logprobs, expected_logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy, expected_entropy, atol=1e-5, rtol=0)

    def loss(logprobs, entropy):  # its gradient with respect to a logprob is different for every token
        total = (coefficients[0] * logprobs.exp() * logprobs).sum()
        return total + (coefficients[1] * entropy**2).sum() if entropy_gradient else total

    (gradient,) = torch.autograd.grad(loss(logprobs, entropy), hidden)
    (expected,) = torch.autograd.grad(loss(expected_logprobs, expected_entropy), hidden)
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=0)
    assert entropy.requires_grad == entropy_gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_tokens_out_of_reach_have_no_probability_and_pull_at_nothing(dtype):
    never = [0, 5, VOCABULARY - 1]
    hidden, weight, targets = example(dtype)
    targets[torch.isin(targets, torch.tensor(never))] = 1
    found = selected_logprobs(
        hidden, weight, targets, temperature=2.0, chunk_tokens=3, entropy_gradient=True, never=never
    )
    kept = [token for token in range(VOCABULARY) if token not in never]
    renumbered = torch.tensor([kept.index(target) for target in targets.tolist()])
    wide = torch.float32 if dtype == torch.float16 else dtype
    expected = full_logits(hidden.to(wide), weight[kept].to(wide), renumbered, temperature=2.0)
    close = {"atol": 2e-2 if dtype == torch.float16 else 1e-5, "rtol": 0}
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.to(theirs.dtype), theirs, **close)
    for ours, theirs in zip(found, expected, strict=True):
        gradient, wanted = (torch.autograd.grad(one.sum(), hidden, retain_graph=True)[0] for one in (ours, theirs))
        torch.testing.assert_close(gradient, wanted, **close)
    with pytest.raises(ValueError, match="cannot be left out under a softcap"):
        selected_logprobs(hidden, weight, targets, softcap=2.0, never=never)


def test_passes_gradcheck_in_float64():
    hidden, weight, targets = example(torch.float64, tokens=4)

    def function(hidden):
        return selected_logprobs(
            hidden, weight, targets, temperature=0.6, softcap=3.0, chunk_tokens=3, entropy_gradient=True
        )

    assert torch.autograd.gradcheck(function, hidden)


def test_chunk_and_block_sizes_change_nothing(monkeypatch):
    hidden, weight, targets = example(torch.float64)

    def run(chunk_tokens):
        logprobs, entropy = selected_logprobs(hidden, weight, targets, chunk_tokens=chunk_tokens)
        (gradient,) = torch.autograd.grad(logprobs.square().sum(), hidden)
        return logprobs, entropy, gradient

    expected = run(1000)
    for chunk_tokens in (1, 2, 5, TOKENS):
        torch.testing.assert_close(run(chunk_tokens), expected, atol=1e-13, rtol=1e-12)
    monkeypatch.setitem(logprob.BLOCK_BYTES, "cpu", 2 * VOCABULARY * 8)
    torch.testing.assert_close(run(5), expected, atol=1e-13, rtol=1e-12)
    monkeypatch.setattr(logprob, "CPU_CHUNK_BYTES", 3 * VOCABULARY * 8)
    torch.testing.assert_close(run(1000), expected, atol=1e-13, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_get_float32_softmax(dtype):
    hidden, weight, targets = example(dtype, tokens=64, vocabulary=501)
    logprobs, entropy = selected_logprobs(hidden, weight, targets, temperature=1.3, chunk_tokens=7)
    assert logprobs.dtype == entropy.dtype == torch.float32
    # The product is rounded to `dtype`, as vLLM's is; what follows must add nothing of that size.
    logs = torch.log_softmax((hidden @ weight.T).float() / 1.3, -1)
    torch.testing.assert_close(logprobs, logs[torch.arange(64), targets], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, -(logs.exp() * logs).sum(-1), atol=1e-5, rtol=1e-5)

    exact = hidden.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(full_logits(exact, weight.double(), targets, temperature=1.3)[0].sum(), exact)
    (gradient,) = torch.autograd.grad(logprobs.sum(), hidden)
    assert gradient.dtype == dtype
    error = (gradient.double() - expected).norm() / expected.norm()
    assert error < 4 * torch.finfo(dtype).eps


def test_a_confident_token_keeps_its_small_gradient():
    """1 - p of the target is formed before rounding: p = 1 - 1e-4 is 1 in bfloat16, its gradient is not 0."""
    weight = torch.eye(4, dtype=torch.bfloat16)
    hidden = torch.tensor([[10.5, 0.0, 0.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    logprobs, _ = selected_logprobs(hidden, weight, torch.tensor([0]))
    logprobs.sum().backward()
    expected = 1 - torch.softmax(torch.tensor([10.5, 0, 0, 0]), -1)[0]
    torch.testing.assert_close(hidden.grad[0, 0].float(), expected, rtol=1e-2, atol=0)


def test_grad_output_is_respected_and_zero_where_the_loss_is_masked():
    hidden, weight, targets = example()
    scale = torch.randn(TOKENS)
    scale[4] = 0.0
    logprobs, _ = selected_logprobs(hidden, weight, targets, chunk_tokens=3)
    logprobs.backward(scale, retain_graph=True)
    first = hidden.grad.clone()
    (expected,) = torch.autograd.grad(full_logits(hidden, weight, targets)[0], hidden, scale)
    torch.testing.assert_close(first, expected, atol=1e-5, rtol=0)
    assert not first[4].any()
    logprobs.backward(scale)  # what is saved survives a backward pass
    torch.testing.assert_close(hidden.grad, 2 * first)


def saved_sizes(function):
    """Numbers of elements of the tensors that `function` keeps for the backward pass."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: sizes.append(tensor.numel()) or tensor, lambda t: t):
        result = function()
    return sizes, result


def test_saves_one_hidden_sized_tensor_and_nothing_without_gradients():
    hidden, weight, targets = example()
    sizes, _ = saved_sizes(lambda: selected_logprobs(hidden, weight, targets))
    assert sizes == [TOKENS * HIDDEN]
    sizes, _ = saved_sizes(lambda: selected_logprobs(hidden, weight, targets, entropy_gradient=True))
    assert sizes == [TOKENS * HIDDEN] * 2
    sizes, (logprobs, entropy) = saved_sizes(lambda: selected_logprobs(hidden.detach(), weight, targets))
    assert sizes == [] and not logprobs.requires_grad and not entropy.requires_grad
    with torch.no_grad():
        sizes, (logprobs, _) = saved_sizes(lambda: selected_logprobs(hidden, weight, targets))
    assert sizes == [] and not logprobs.requires_grad


def test_logits_never_exist_for_more_than_a_chunk_nor_gradients_unasked(monkeypatch):
    hidden, weight, targets = example()
    seen, gradients = [], []
    original = logprob.softmax_stats_

    def spy(logits, *args, gradient, **kwargs):
        seen.append(tuple(logits.shape))
        gradients.append(gradient)
        return original(logits, *args, gradient=gradient, **kwargs)

    monkeypatch.setattr(logprob, "softmax_stats_", spy)
    selected_logprobs(hidden, weight, targets, chunk_tokens=4)
    assert seen == [(4, VOCABULARY), (4, VOCABULARY), (3, VOCABULARY)]
    assert gradients == [True] * 3
    with torch.no_grad():
        selected_logprobs(hidden, weight, targets)
    selected_logprobs(hidden.detach(), weight, targets)
    assert gradients[3:] == [False] * 2


def test_no_tokens_give_empty_results_and_a_zero_gradient():
    hidden, weight, targets = example(tokens=0)
    logprobs, entropy = selected_logprobs(hidden, weight, targets, entropy_gradient=True)
    assert logprobs.shape == entropy.shape == (0,)
    (logprobs.sum() + entropy.sum()).backward()
    assert hidden.grad.shape == (0, HIDDEN)


def test_targets_may_lie_apart():
    """As one of several draws of labels does."""
    hidden, weight, targets = example()
    apart = torch.stack([targets, targets.flip(0)], 1)[:, 0]
    assert apart.stride() == (2,)
    for found, expected in zip(
        selected_logprobs(hidden, weight, apart), selected_logprobs(hidden, weight, targets), strict=True
    ):
        assert torch.equal(found, expected)


def test_extreme_logits_stay_finite():
    weight = torch.tensor([[1.0], [-1.0], [0.0]])
    hidden = torch.tensor([[3e4], [-3e4], [0.0]], requires_grad=True)
    logprobs, entropy = selected_logprobs(hidden, weight, torch.tensor([0, 0, 2]), entropy_gradient=True)
    torch.testing.assert_close(logprobs, torch.tensor([0.0, -6e4, -torch.tensor(3.0).log()]))
    (logprobs.sum() + entropy.sum()).backward()
    assert torch.isfinite(hidden.grad).all()


def test_wrong_arguments_are_refused():
    hidden, weight, targets = example()
    with pytest.raises(ValueError, match="frozen"):
        selected_logprobs(hidden, weight.clone().requires_grad_(), targets)
    with pytest.raises(ValueError, match="targets must have shape"):
        selected_logprobs(hidden, weight, targets[:-1])
    with pytest.raises(ValueError, match="do not fit"):
        selected_logprobs(hidden, weight[:, :-1], targets)
    with pytest.raises(ValueError, match="must be positive"):
        selected_logprobs(hidden, weight, targets, temperature=0.0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("vocabulary", [1000, 128256])
def test_kernel_equals_the_torch_form_on_the_gpu(vocabulary, softcap, dtype):
    logits, targets = (torch.randn(33, vocabulary) * 3).to(dtype), torch.randint(0, vocabulary, (33,))
    second = torch.empty_like(logits)
    mine, mine_second = logits.cuda(), second.cuda()
    expected = logprob.softmax_stats_(logits, targets, 0.7, softcap, gradient=True, entropy_gradient=second)
    result = logprob.softmax_stats_(mine, targets.cuda(), 0.7, softcap, gradient=True, entropy_gradient=mine_second)
    for found, wanted in zip(result, expected, strict=True):
        torch.testing.assert_close(found.cpu(), wanted, atol=2e-5, rtol=1e-5)
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(mine.cpu(), logits, atol=1e-6, rtol=4 * unit + 1e-4)
    torch.testing.assert_close(mine_second.cpu(), second, atol=1e-5, rtol=4 * unit + 1e-3)


@pytest.mark.slow
def test_kernel_in_the_interpreter():
    """Triton reads TRITON_INTERPRET when it is imported, hence a process of its own."""
    if interpreter_enabled():
        return
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "passed" in result.stdout and "skipped" not in result.stdout
