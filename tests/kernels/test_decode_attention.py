"""kernels/decode_attention.py. The kernel's arithmetic is in interpreted_decode_attention.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.kernels import cards, decode_attention
from grpo.kernels.decode_attention import CHUNK, MOST_CHUNKS, Cut, _torch, chunks_of, fits, launch_decode
from tests.helpers import card_launches
from tests.helpers.card_launches import BY_NAME, MODELS, hold, pretended
from tests.helpers.decode_cases import case
from tests.helpers.paths import ROOT


def test_the_kernel_in_the_interpreter():
    here = Path(__file__).parent
    file = here / "interpreted_decode_attention.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
        env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.parametrize("card", ["sm_80", "sm_90"])
def test_it_keeps_within_the_card_and_spills_nothing(card):
    with pretended(BY_NAME[card]) as collected:
        card_launches.decoding_attention(MODELS["Llama-3.1-8B"], torch.bfloat16)
        hold(BY_NAME[card], collected)
    assert collected.names == {"_decode_kernel"}


def test_on_a_cpu_each_sequence_attends_to_its_own_pages():
    lengths, size = [5, 0, 40], 64
    query, cache, _ = case(lengths, 4, 2, size, torch.bfloat16, "cpu")
    out = torch.zeros_like(query)
    decode_attention.decode_attention(query, cache, 0.3, out)
    for row, length in enumerate(lengths):
        places = [(int(cache.pages[row, token // 16]), token % 16) for token in range(length)]
        for head in range(4 if length else 0):
            keys, values = (torch.stack([part[place][head // 2].double() for place in places]) for part in cache[:2])
            weights = (keys @ query[row, head].double() * 0.3).softmax(0)
            torch.testing.assert_close(out[row, head].double(), weights @ values, rtol=1e-2, atol=1e-2)
    assert not out[1].any()


def test_a_layer_outside_the_kernel_is_refused():
    query, cache, _ = case([5], 4, 2, 64, torch.bfloat16, "cpu")
    with pytest.raises(ValueError, match="float32"):
        decode_attention.decode_attention(query.float(), cache, 1.0, query.float())
    with pytest.raises(ValueError, match="attention of"):
        decode_attention.decode_attention(query[..., :48], cache, 1.0, query[..., :48])


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 1 << 20), st.integers(1, 1024), st.sampled_from([(24, 8), (32, 8), (8, 1)]))
def test_chunks_cover_the_longest_sequence_and_what_fits_has_room(longest, sequences, heads):
    size, chunks = chunks_of(longest)
    assert size % CHUNK == 0 and chunks <= MOST_CHUNKS and (chunks - 1) * size < longest <= chunks * size
    if fits(sequences, *heads, 128, longest) and chunks > 1:
        assert 4 * sequences * heads[0] * chunks * 130 <= decode_attention.WORKSPACE_BYTES


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(24, 8, 128), (9, 3, 64), (8, 4, 256), (14, 2, 64)])
def test_on_the_gpu_attention_is_that_of_the_torch_form(dtype, heads, kv_heads, size):
    if dtype == torch.bfloat16 and not cards.card(torch.device("cuda")).dot_is_fast:
        pytest.skip("bfloat16")
    lengths = [1, 0, 512, 513, 700, 1024, 77, 1400] * 8
    query, cache, new = case(lengths, heads, kv_heads, size, dtype, "cuda", longest=1408)
    for given_new in (None, new):
        theirs = cache._replace(keys=cache.keys.clone(), values=cache.values.clone())
        wanted, first = torch.zeros_like(query), torch.zeros_like(query)
        _torch(query, theirs, size**-0.5, wanted, given_new)
        for attempt in range(5):
            out = first if attempt == 0 else torch.zeros_like(query)
            launch_decode(query, cache, size**-0.5, out, given_new, Cut())
            assert torch.equal(out, first), "the same bits every time"
        assert (first.float() - wanted.float()).norm() < 0.01 * wanted.float().norm()
        for ours, other in zip(cache[:2], theirs[:2], strict=True):
            torch.testing.assert_close(ours, other, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "page"),
    [
        (24, 8, 128, 16), (32, 8, 128, 64), (32, 32, 128, 16), (16, 1, 128, 16), (9, 3, 64, 16), (14, 2, 64, 128),
        (16, 16, 64, 16), (8, 4, 256, 16), (16, 2, 256, 32),
    ],
)  # fmt: skip
def test_on_the_gpu_every_length_page_and_group_is_right_in_each_row(dtype, heads, kv_heads, size, page):
    """Each head of each sequence by itself, by every way of going through tokens that is chosen, launched early and
    not; written keys are those of the torch form."""
    if dtype == torch.bfloat16 and not cards.card(torch.device("cuda")).dot_is_fast:
        pytest.skip("bfloat16")
    lengths = [1, 2, 15, 16, 17, 31, 33, 511, 512, 513, 1023, 1025, 2047, 2049, 4095, 4096, 0]
    query, cache, new = case(lengths, heads, kv_heads, size, dtype, "cuda", longest=4096, page=page)
    few, many = (decode_attention.cut_for(count, 1, size, cards.card(query.device)) for count in (1, 1 << 20))
    early = cards.card(query.device).architecture >= 90
    # An output rounded once from weights that were: in bfloat16 eight bits, in float16 eleven.
    limit = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-10
    for given_new in (None, new):
        theirs = cache._replace(keys=cache.keys.clone(), values=cache.values.clone())
        wanted = torch.zeros_like(query)
        _torch(query, theirs, size**-0.5, wanted, given_new)
        results = []
        for cut, overlapped in ((few, False), (many, False), (few, early)):
            out = torch.zeros_like(query)
            launch_decode(query, cache, size**-0.5, out, given_new, cut, overlapped=overlapped)
            results.append(out)
        difference = (results[0].float() - wanted.float()).norm(dim=-1)
        assert (difference <= limit * wanted.float().norm(dim=-1)).all(), (
            difference / wanted.float().norm(dim=-1)
        ).max()
        assert torch.equal(results[0], results[2]) and torch.equal(results[0], results[1])
        torch.testing.assert_close(cache.keys, theirs.keys, rtol=2.0**-7, atol=1e-2)
        assert torch.equal(cache.values, theirs.values)
