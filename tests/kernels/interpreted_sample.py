"""kernels/sample.py in Triton's interpreter, on the CPU. test_sample.py runs this file with TRITON_INTERPRET=1."""

import os

import pytest
import torch

from grpo.kernels import sample

assert os.environ.get("TRITON_INTERPRET") == "1", "pytest tests/kernels/test_sample.py runs this file"


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(sample, "PIECE", 64)
    monkeypatch.setattr(sample, "BLOCK", 16)


def test_tokens_are_drawn_with_the_softmax_probabilities():
    logits = torch.randn(1, 4, generator=torch.Generator().manual_seed(1))
    rows, temperature = 120, 0.7
    tokens, _ = sample.launch_sample(logits.expand(rows, 4), torch.full((rows,), temperature), 5)
    expected = (logits[0] / temperature).softmax(0) * rows
    counts = torch.bincount(tokens.long(), minlength=4)
    likely = expected > 8
    statistic = ((counts - expected)[likely] ** 2 / expected[likely]).sum() / likely.sum()
    assert statistic < 4, "chi-squared per degree of freedom"


def test_logprobs_are_those_of_the_tokens_that_were_drawn():
    logits = torch.randn(7, 150) * 4
    temperature = torch.linspace(0.5, 2.0, 7)
    tokens, logprobs = sample.launch_sample(logits, temperature, 9)
    expected = (logits.double() / temperature[:, None]).log_softmax(1).gather(1, tokens.long()[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_seed_decides_and_rows_draw_for_themselves():
    logits = torch.zeros(8, 70)
    ones = torch.ones(8)
    first, again = (sample.launch_sample(logits, ones, 3)[0] for _ in range(2))
    assert torch.equal(first, again) and len(set(first.tolist())) > 4
    assert not torch.equal(first, sample.launch_sample(logits, ones, 4)[0])
    assert torch.equal(first[:3], sample.launch_sample(logits[:3], ones[:3], 3)[0])


def test_a_token_without_probability_is_never_drawn_and_padding_is_not_read():
    wide = torch.full((12, 96), float("inf"))
    logits = wide[:, :70]
    logits.fill_(float("-inf"))
    logits[:, [3, 69]] = 0.0
    tokens, logprobs = sample.launch_sample(logits, torch.ones(12), 2)
    assert set(tokens.tolist()) == {3, 69}
    torch.testing.assert_close(logprobs, torch.full((12,), -0.6931472))


def test_every_block_of_a_row_has_its_own_random_numbers():
    tokens, _ = sample.launch_sample(torch.zeros(40, 128), torch.ones(40), 7)
    quarter = torch.bincount(tokens.long() // 32, minlength=4)
    assert quarter.min() > 2, "10 are expected in each"
