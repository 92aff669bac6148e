"""kernels/decode_attention.py in Triton's interpreter. test_decode_attention.py runs this with TRITON_INTERPRET=1."""

import os

import pytest
import torch

from grpo.kernels import decode_attention
from grpo.kernels.decode_attention import Cut, _torch, launch_decode
from tests.helpers.decode_cases import case

assert os.environ.get("TRITON_INTERPRET") == "1", "pytest tests/kernels/test_decode_attention.py runs this file"


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(decode_attention, "CHUNK", 32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(6, 2, 64), (4, 4, 64), (5, 1, 128)])
@pytest.mark.parametrize("fused", [False, True])
def test_attention_is_that_of_the_torch_form(dtype, heads, kv_heads, size, fused):
    lengths = [1, 0, 16, 33, 50, 64, 79]
    query, cache, new = case(lengths, heads, kv_heads, size, dtype, "cpu")
    wanted_cache = cache._replace(keys=cache.keys.clone(), values=cache.values.clone())
    wanted, out = torch.full_like(query, 7.0), torch.full_like(query, 7.0)
    _torch(query, wanted_cache, size**-0.5, wanted, new if fused else None)
    launch_decode(query, cache, size**-0.5, out, new if fused else None, Cut(16), interpreted=True)
    for ours, theirs in zip(cache[:2], wanted_cache[:2], strict=True):
        assert torch.equal(ours, theirs), "what is written to the cache"
    bits = 8 if dtype == torch.bfloat16 else 11
    torch.testing.assert_close(out.float(), wanted.float(), rtol=0, atol=2.0 ** (2 - bits))
    assert torch.equal(out[1], torch.full_like(out[1], 7.0)), "a row without a sequence is left alone"


def test_a_sequence_has_the_same_bits_alone():
    lengths = [70, 3, 41, 64]
    query, cache, new = case(lengths, 6, 2, 64, torch.bfloat16, "cpu")
    out, alone = torch.zeros_like(query), torch.zeros_like(query)
    launch_decode(query, cache, 0.125, out, new, Cut(16), interpreted=True)
    for row in range(len(lengths)):
        one = slice(row, row + 1)
        of_row = cache._replace(pages=cache.pages[one], lengths=cache.lengths[one])
        its = new._replace(keys=new.keys[one], values=new.values[one])
        launch_decode(query[one], of_row, 0.125, alone[one], its, Cut(16), interpreted=True)
    assert torch.equal(out, alone)


def test_counters_are_zero_again():
    query, cache, _ = case([70, 64, 90], 6, 2, 64, torch.float16, "cpu")
    launch_decode(query, cache, 0.125, torch.zeros_like(query), None, Cut(16), interpreted=True)
    assert not decode_attention.workspace(query.device)[1].any()
