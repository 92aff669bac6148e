"""kernels/mxfp4.py: the values of the specification, and the stored form, which loses nothing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo.kernels import mxfp4
from grpo.kernels.nf4_lookup import byte_tables


def random_form(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
    return codes, torch.randint(100, 140, (rows, columns // 32), generator=generator, dtype=torch.uint8)


def of_specification(code: int, exponent: int) -> float:
    """E2M1 with a bias of 1, and subnormals, times E8M0 with a bias of 127."""
    sign, power, mantissa = code >> 3, code >> 1 & 3, code & 1
    magnitude = mantissa * 0.5 if power == 0 else 2.0 ** (power - 1) * (1 + mantissa * 0.5)
    return math.copysign(magnitude, -1 if sign else 1) * 2.0 ** (exponent - 127)


@given(st.integers(0, 255), st.integers(*mxfp4.EXPONENTS), st.integers(0, 15))
def test_values_are_those_of_the_specification_in_bfloat16_and_float32(byte: int, exponent: int, place: int) -> None:
    codes, exponents = torch.zeros(1, 1, 16, dtype=torch.uint8), torch.tensor([[exponent]], dtype=torch.uint8)
    codes[0, 0, place] = byte
    for dtype in (torch.bfloat16, torch.float32):
        row = mxfp4.value(codes, exponents, dtype)[0].tolist()
        assert row[2 * place] == of_specification(byte & 15, exponent)
        assert row[2 * place + 1] == of_specification(byte >> 4, exponent)
    assert mxfp4.is_exact(codes, exponents)


def test_what_bfloat16_does_not_hold_is_told() -> None:
    codes = torch.zeros(1, 1, 16, dtype=torch.uint8)
    for exponent in (0, 252, 254):
        assert mxfp4.is_exact(codes, torch.tensor([[exponent]], dtype=torch.uint8))
        assert not mxfp4.is_exact(codes + 7, torch.tensor([[exponent]], dtype=torch.uint8))
    assert not mxfp4.is_exact(codes, torch.tensor([[255]], dtype=torch.uint8)), "no number"


@pytest.mark.parametrize(("rows", "columns"), [(8, 64), (24, 128), (16, 320)])
def test_storing_loses_nothing_and_rows_are_slices(rows: int, columns: int) -> None:
    codes, exponents = random_form(rows, columns)
    packed, scales = mxfp4.allocate(2 * rows, columns, "cpu")
    assert not mxfp4.dequantize(packed, scales).any()
    mxfp4.pack_rows(packed, scales, rows, codes, exponents)
    for ours, theirs in zip(mxfp4.unpack_rows(packed[rows:], scales[rows:]), (codes, exponents), strict=True):
        assert torch.equal(ours, theirs)
    dense = mxfp4.dequantize(packed[rows:], scales[rows:])
    assert torch.equal(dense, mxfp4.value(codes, exponents, torch.bfloat16))
    assert torch.equal(mxfp4.dequantize(packed[rows : rows + 8], scales[rows : rows + 8]), dense[:8])
    wide = torch.zeros(rows, columns + 8, dtype=torch.bfloat16)
    mxfp4.dequantize(packed[rows:], scales[rows:], wide[:, :columns])
    assert torch.equal(wide[:, :columns], dense) and not wide[:, columns:].any()
    assert packed.nbytes + scales.nbytes == 2 * rows * columns * 17 // 32


def test_a_lookup_table_has_the_sixteen_values() -> None:
    tables = torch.tensor(byte_tables(torch.bfloat16, mxfp4.VALUES), dtype=torch.int32).view(torch.uint8)
    bits = tables[:16].int() << 8 | tables[16:].int()
    assert bits.to(torch.uint16).view(torch.bfloat16).tolist() == list(mxfp4.VALUES)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "columns"), [(64, 128), (5760, 2880)])
def test_on_a_gpu_dequantising_gives_the_bits_of_the_torch_form(rows: int, columns: int) -> None:
    packed, scales = mxfp4.allocate(rows, columns, "cuda")
    codes, exponents = random_form(rows, columns)
    mxfp4.pack_rows(packed, scales, 0, codes.cuda(), exponents.cuda())
    ours = mxfp4.dequantize(packed, scales).cpu()
    assert torch.equal(ours.view(torch.int16), mxfp4.value(codes, exponents, torch.bfloat16).view(torch.int16))


@pytest.mark.gpu
def test_on_a_gpu_decoding_multiplies_it_as_it_is() -> None:
    from grpo.kernels import experts, nf4_experts

    def matrix(out: int, columns: int) -> experts.ExpertMatrix:
        packed, scales = mxfp4.allocate(32 * out, columns, "cuda")
        codes, exponents = random_form(32 * out, columns, seed=out)
        mxfp4.pack_rows(packed, scales, 0, codes.cuda(), (exponents.clamp(118, 122)).cuda())
        return experts.ExpertMatrix(packed, scales, 32, torch.randn(32, out).bfloat16().cuda())

    layer = experts.Experts(matrix(5760, 2880), matrix(2880, 2880), "clamped_silu")
    assert nf4_experts.find_tiles(layer, 4) is not None, "no tile computes what torch does"
    for tokens in (1, 8, 32, 128):
        x, logits = torch.randn(tokens, 2880).bfloat16().cuda() * 0.1, torch.randn(tokens, 32).bfloat16().cuda()
        weights, chosen = experts.route(logits, 4, True)
        wanted = experts.sampled_mlp(x, layer, chosen, weights).float()
        ours = nf4_experts.decode(x, logits, layer, 4, True).float()
        assert float((ours - wanted).norm() / wanted.norm()) < 0.01
