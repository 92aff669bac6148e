"""kernels/sample.py: one token a row, drawn from the softmax. The kernels' arithmetic is in interpreted_sample.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grpo.kernels.sample import sample_tokens
from tests.helpers.paths import ROOT


def test_kernels_in_the_interpreter():
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(here / "interpreted_sample.py")]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_on_a_cpu_logprobs_are_those_of_the_tokens():
    logits, temperature = torch.randn(5, 40).bfloat16(), torch.full((5,), 0.8)
    tokens, logprobs = sample_tokens(logits, temperature, 3)
    expected = (logits.double() / 0.8).log_softmax(1).gather(1, tokens.long()[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(tokens, sample_tokens(logits, temperature, 3)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_the_gpu_draws_follow_the_softmax_and_logprobs_are_right(dtype):
    vocabulary, rows = 128256, 512
    row = (torch.randn(vocabulary, device="cuda") * 3).to(dtype)
    logits = row.expand(rows, vocabulary).contiguous()
    temperature = torch.full((rows,), 0.9, device="cuda")
    exact = (row.double() / 0.9).log_softmax(0)
    counts = torch.zeros(vocabulary, device="cuda", dtype=torch.float64)
    for seed in range(100):
        tokens, logprobs = sample_tokens(logits, temperature, seed)
        counts += torch.bincount(tokens.long(), minlength=vocabulary)
        torch.testing.assert_close(logprobs.double(), exact[tokens.long()], rtol=1e-5, atol=2e-5)
    expected = exact.exp() * rows * 100
    likely = expected > 8
    statistic = ((counts - expected)[likely] ** 2 / expected[likely]).sum() / likely.sum()
    assert abs(float(statistic) - 1) < 0.25, "chi-squared per degree of freedom"
    rare = expected[~likely].sum()
    assert abs(float(counts[~likely].sum() - rare)) < 5 * float(rare) ** 0.5
