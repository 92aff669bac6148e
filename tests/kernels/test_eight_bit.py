"""kernels/eight_bit.py and eight_bit_gemm.py: bitsandbytes' codes, one definition of the value, products of it."""

import os
import re
import subprocess
import sys

import pytest
import torch

from grpo.kernels import eight_bit, eight_bit_gemm
from grpo.kernels.cards import SHARED_MEMORY, Card
from grpo.kernels.lora_factors import LowRank
from tests.helpers.hopper import compile_for_hopper
from tests.helpers.paths import ROOT
from tests.kernels.eight_bit_weights import KINDS, random_form

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(8, 64), (24, 100), (40, 576)])
def test_codes_and_absmax_are_those_of_bitsandbytes(shape, dtype):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    weight[0] *= 1e-3
    weight[2, 5] = -40.0
    codes, scales = eight_bit.quantize(weight.to(dtype))
    expected, absmax, _ = functional.int8_vectorwise_quant(weight.to(dtype).half())
    assert codes.equal(expected)
    assert scales.equal((absmax / 127)[:, None]) and scales.dtype == torch.float32


def test_a_row_of_zeros_and_one_beyond_float16_are_kept():
    weight = torch.tensor([[0.0, 0.0], [1e5, -2e5]])
    codes, scales = eight_bit.quantize(weight)
    assert codes.tolist() == [[0, 0], [64, -127]]
    assert eight_bit.dequantize(codes, scales, torch.float32)[0].tolist() == [0, 0]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", [(40, 192, 1, 1), (64, 320, 32, 3), (24, 96, 24, 1), (16, 576, 1, 5)])
def test_a_value_is_one_float32_product_rounded_once(form, kind, dtype):
    codes, scales = random_form(kind, *form)
    rows, columns, shared, groups = form
    width = eight_bit.group_width(columns, groups)
    scale = torch.stack([scales[:, column // width] for column in range(columns)], 1).repeat_interleave(shared, 0)
    expected = (codes.to(torch.float32) * scale).to(dtype)
    assert eight_bit.dequantize(codes, scales, dtype).equal(expected)
    out = torch.empty(rows, columns + 7, dtype=dtype)[:, :columns]
    assert eight_bit.dequantize(codes, scales, dtype, out) is out and out.equal(expected)


def test_rows_are_slices_where_scales_end():
    codes, scales = random_form(torch.int8, 64, 320, 32, 3)
    part = slice(32, 64)
    values = eight_bit.dequantize(codes[part], eight_bit.row_scales(scales, codes, part), torch.float32)
    assert values.equal(eight_bit.dequantize(codes, scales, torch.float32)[part])
    with pytest.raises(ValueError, match="rows 16 to 64: 32 of them share a scale"):
        eight_bit.row_scales(scales, codes, slice(16, 64))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_cpu_it_is_the_product_of_dequantised_weights(kind, dtype):
    codes, scales = random_form(kind, 96, 320, 32, 3)
    x, bias = torch.randn(5, 320).to(dtype), torch.randn(96).to(dtype)
    low_rank = LowRank(torch.randn(5, 16).to(dtype), torch.randn(96, 16).to(dtype))
    exact = x.double() @ eight_bit.dequantize(codes, scales, dtype).double().T + bias.double()
    exact += low_rank.x_lora_a.double() @ low_rank.b.double().T
    out = eight_bit_gemm.eight_bit_linear(x, codes, scales, bias, None, low_rank)
    torch.testing.assert_close(out, exact.to(dtype), atol=1e-4 if dtype == torch.float32 else 0.1, rtol=1e-2)
    assert eight_bit_gemm.eight_bit_linear(x[:0], codes, scales).shape == (0, 96)


@pytest.mark.parametrize("form", [(1040, 192, 1040, 1), (1040, 192, 1, 1), (768, 192, 128, 3), (1040, 192, 104, 1)])
def test_dequantising_in_pieces_gives_every_column(form, monkeypatch):
    codes, scales = random_form(torch.int8, *form)
    x, bias = torch.randn(7, form[1]), torch.randn(form[0])
    monkeypatch.setattr(eight_bit_gemm, "WORKSPACE_BYTES", 300 * form[1] * 4)
    weight = eight_bit.dequantize(codes, scales, torch.float32)
    for given in (None, bias):
        out = torch.full((7, form[0]), float("nan"))
        eight_bit_gemm.dequantized_linear(x, codes, scales, given, out)
        torch.testing.assert_close(out, torch.nn.functional.linear(x, weight, given), atol=1e-3, rtol=1e-4)


def test_wrong_input_is_refused():
    codes, scales = random_form(torch.int8, 24, 192, 1, 1)
    x = torch.randn(5, 192)
    for wrong in (x[:, :128], torch.randn(192, 5).t()):
        with pytest.raises(ValueError, match="the weight takes"):
            eight_bit_gemm.eight_bit_linear(wrong, codes, scales)
    with pytest.raises(ValueError, match="out must be"):
        eight_bit_gemm.eight_bit_linear(x, codes, scales, out=torch.empty(5, 16))


def test_tiles_decide_bits_by_the_weight_alone():
    codes, scales = random_form(torch.int8, 256, 4096, 1, 1)
    for architecture, words in ((80, False), (90, True), (120, False)):
        card = Card("a card", architecture, SHARED_MEMORY[architecture], 100, 1 << 20)
        tiles = [eight_bit_gemm.tile_for(card, codes, scales, rows) for rows in (1, 16, 33, 128)]
        assert len({(tile.k, tile.split, tile.words) for tile in tiles}) == 1 and tiles[0].words == words
        assert tiles[0].split > 1, "few rows of W do not fill a GPU"


@pytest.mark.parametrize("element", ["bf16", "fp16"])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("is_fp8", [False, True])
def test_compiled_for_hopper_decoded_weights_stay_in_registers(is_fp8, ordered, element):
    constants = {
        "groups": 1, "IS_FP8": is_fp8, "GROUPED": False, "BN": 64, "BM": 32 if ordered else 16, "BK": 128,
        "SPLIT": 1, "STAGES": 4, "EVEN": True, "HAS_BIAS": False, "RANKS": 0, "BR": 16, "WORDS": True,
        "ORDERED": ordered, "WARPS": 4, "INTERPRETED": False, "stride_b_r": 1,
    }  # fmt: skip
    pointers = dict.fromkeys(("x_ptr", "bias_ptr", "out_ptr", "x_lora_a_ptr", "b_ptr"), f"*{element}")
    pointers |= {"codes_ptr": "*i8", "scales_ptr": "*fp32", "partial_ptr": "*fp32", "counters_ptr": "*i32"}
    aligned = {*pointers, "features", "columns", "stride_x_m", "stride_codes_n", "stride_out_m"}
    ptx = compile_for_hopper(eight_bit_gemm._gemm_8bit_kernel, constants, pointers, aligned=aligned)["ptx"]
    blocks = re.split(r"^\$L__BB\d+_\d+:", ptx, flags=re.MULTILINE)
    loop = next(block for block in blocks if "wgmma.mma_async" in block)
    assert "shfl" not in loop and "st.shared" not in loop, "no value changes its lane"
    assert loop.count("ld.shared.v4.b32") == 4, "codes are read sixteen at once"
    assert (re.search(r"cp\.async\.\w+\.shared\.global \[[^\]]*\], \[[^\]]*\], 0x4", ptx) is None) == ordered


@pytest.mark.timeout(600)
def test_interpreted_kernels():
    file = ROOT / "tests" / "kernels" / "interpreted_eight_bit.py"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:]
