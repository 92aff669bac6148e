"""Products with a matrix that is sent slice by slice: against whole products, and what is sent."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from grpo.kernels import host_matmul
from grpo.kernels.logprob import selected_logprobs


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let every matrix be elsewhere, and be sent in slices of 16 rows; the bytes that were."""
    bytes_sent: list[int] = []
    slices = host_matmul.slices

    def counted(weight: Tensor, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
        monkeypatch.setattr(host_matmul, "HEAD_SLICE_BYTES", 20 * weight.shape[1] * weight.itemsize)
        for rows, part in slices(weight, device):
            assert part.shape[0] <= 16 and part.data_ptr() != weight[rows].data_ptr()
            bytes_sent.append(part.nbytes)
            yield rows, part

    monkeypatch.setattr(host_matmul, "is_elsewhere", lambda weight, x: True)
    monkeypatch.setattr(host_matmul, "slices", counted)
    return bytes_sent


def test_a_head_sent_in_slices_gives_the_same_logprobs_and_gradients(
    sent: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 150 rows the last slice is a part of one, and each chunk of tokens reads the head once for each product."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(150, 24, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 150, (11,), generator=generator)

    def run() -> list[Tensor]:
        hidden = torch.randn(11, 24, generator=generator.manual_seed(1), dtype=torch.float64, requires_grad=True)
        results = selected_logprobs(hidden, weight, targets, temperature=0.7, chunk_tokens=4, entropy_gradient=True)
        (results[0] * 2 + results[1]).sum().backward()
        assert hidden.grad is not None
        return [*results, hidden.grad]

    in_slices = run()
    assert sum(sent) == 3 * 3 * weight.nbytes
    monkeypatch.setattr(host_matmul, "is_elsewhere", lambda weight, x: False)
    for ours, expected in zip(in_slices, run(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


def test_slices_are_added_up_without_rounding_in_between(sent: list[int]) -> None:
    x, weight = torch.full((3, 160), 2.0**-9).bfloat16(), torch.ones(160, 8).bfloat16()
    x[:, 0] = 1
    out = torch.empty(3, 8, dtype=torch.bfloat16)
    host_matmul.mm(x, weight, out)
    assert len(sent) == 10 and out.eq(torch.tensor(1 + 159 * 2.0**-9).bfloat16()).all()


@pytest.mark.gpu
def test_products_in_slices_equal_whole_ones_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the rounding of a 16-bit result."""
    generator = torch.Generator().manual_seed(0)
    host = torch.randn(32000, 512, generator=generator).bfloat16().pin_memory()
    x, logits = (torch.randn(100, width, generator=generator).bfloat16().cuda() for width in (512, 32000))
    monkeypatch.setattr(host_matmul, "HEAD_SLICE_BYTES", 1 << 20)
    for product, given, expected in (
        (host_matmul.mm_transposed, x, x.double() @ host.cuda().double().t()),
        (host_matmul.mm, logits, logits.double() @ host.cuda().double()),
    ):
        out = torch.empty(expected.shape, dtype=torch.bfloat16, device="cuda")
        product(given, host, out)
        rounding = float((expected.bfloat16().double() - expected).norm())
        assert float((out.double() - expected).norm()) < 1.05 * rounding
