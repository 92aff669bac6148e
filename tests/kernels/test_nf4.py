"""kernels/nf4.py and nf4_lookup.py: bitsandbytes' bits in, the one definition of the value out."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grpo.kernels import nf4, nf4_lookup
from tests.helpers.paths import ROOT

bitsandbytes = pytest.importorskip("bitsandbytes.functional")

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(8, 64), (24, 128), (40, 192), (64, 576), (16, 1024)]


def random_weight(shape, dtype, seed=0):
    """Normal values with what quantisers get wrong: a block of zeros, tiny blocks, one outlier, a negative maximum."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    weight[0, :64] = 0
    weight[1, :64] *= 1e-6
    weight[2, 5] = -40.0
    weight[3, :64] = weight[3, :64].abs().neg()
    return weight.to(dtype)


def value_by_definition(codes, absmax, shape, dtype):
    """w = d(d(code) * d(absmax)) in float64, one element after the other in bitsandbytes' order."""
    nibbles = torch.stack([codes.reshape(-1) >> 4, codes.reshape(-1) & 15], 1).reshape(-1).long()
    code = torch.tensor(nf4.CODE).to(dtype).double()[nibbles]
    scale = absmax.reshape(-1).to(dtype).double().repeat_interleave(64)
    return (code * scale).to(dtype).view(shape)


def bits(tensor):
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


def stored(weight, dtype, device="cpu"):
    packed, absmax = nf4.allocate(*weight.shape, dtype, device)
    nf4.quantize_rows(packed, absmax, 0, weight)
    return packed, absmax


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_codes_and_absmax_are_those_of_bitsandbytes(shape, dtype):
    weight = random_weight(shape, dtype)
    codes, absmax = nf4.quantize(weight)
    expected, state = bitsandbytes.quantize_4bit(weight, quant_type="nf4", blocksize=64)
    assert torch.equal(codes, expected) and codes.shape == expected.shape
    assert torch.equal(absmax, state.absmax) and absmax.dtype == torch.float32


def test_a_tie_goes_to_the_lower_code_as_in_bitsandbytes():
    ties = torch.tensor(nf4.BOUNDS)
    above, below = torch.nextafter(ties, torch.tensor(2.0)), torch.nextafter(ties, torch.tensor(-2.0))
    weight = torch.zeros(8, 64)
    weight[:, 0] = 1.0  # absmax 1: the scaled values are the values
    weight[0, 1:16], weight[1, 1:16], weight[2, 1:16] = ties, above, below
    codes, absmax = nf4.quantize(weight)
    assert torch.equal(codes, bitsandbytes.quantize_4bit(weight, quant_type="nf4", blocksize=64)[0])
    nibbles = torch.stack([codes.view(8, 32) >> 4, codes.view(8, 32) & 15], 2).view(8, 64)
    assert nibbles[0, 1:16].tolist() == nibbles[2, 1:16].tolist() == list(range(15))
    assert nibbles[1, 1:16].tolist() == list(range(1, 16))


def test_quantising_in_pieces_changes_nothing(monkeypatch):
    weight = random_weight((40, 192), torch.bfloat16)
    whole = nf4.quantize(weight)
    monkeypatch.setattr(nf4, "_CHUNK", 128)
    pieces = nf4.quantize(weight)
    assert all(torch.equal(a, b) for a, b in zip(whole, pieces, strict=True))
    assert torch.equal(
        nf4.dequantize_bitsandbytes(*pieces, (40, 192), torch.bfloat16),
        value_by_definition(*whole, (40, 192), torch.bfloat16),
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_both_forms_dequantise_to_the_definition(shape, dtype):
    weight = random_weight(shape, torch.float32)
    codes, absmax = nf4.quantize(weight)
    expected = value_by_definition(codes, absmax, shape, dtype)
    assert torch.equal(bits(nf4.dequantize_bitsandbytes(codes, absmax, shape, dtype)), bits(expected))
    scratch = torch.full(shape, float("nan"), dtype=dtype)
    result = nf4.dequantize(*stored(weight, dtype), out=scratch)
    assert result is scratch and torch.equal(bits(result), bits(expected))


@pytest.mark.parametrize("shape", SHAPES)
def test_bitsandbytes_form_survives_the_stored_form(shape):
    codes, absmax = nf4.quantize(random_weight(shape, torch.float32))
    packed, scales = nf4.allocate(*shape, torch.float32, "cpu")
    nf4.pack_rows(packed, scales, 0, codes, absmax, shape)
    assert packed.shape == (shape[0], shape[1] // 2) and scales.shape == (shape[0], shape[1] // 64)
    back = nf4.unpack_rows(packed, scales)
    assert torch.equal(back[0], codes) and torch.equal(back[1], absmax)


@pytest.mark.parametrize("columns", [128, 192])
def test_parts_of_a_fused_layer_are_slices_of_its_storage(columns):
    parts = [random_weight((rows, columns), torch.bfloat16, seed) for seed, rows in enumerate((24, 8, 16))]
    packed, absmax = nf4.allocate(48, columns, torch.bfloat16, "cpu")
    start = 24
    for part in (parts[1], parts[2]):  # filled in any order, one tensor at a time
        nf4.quantize_rows(packed, absmax, start, part)
        start += len(part)
    assert not nf4.dequantize(packed[:24], absmax[:24]).any(), "rows not yet filled are zeros"
    nf4.pack_rows(packed, absmax, 0, *nf4.quantize(parts[0]), (24, columns))
    start = 0
    for part in parts:
        rows = slice(start, start + len(part))
        view, scales = packed[rows], absmax[rows]
        assert view.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr()
        assert torch.equal(nf4.dequantize(view, scales), nf4.dequantize(*stored(part, torch.bfloat16)))
        start += len(part)
    assert torch.equal(
        nf4.dequantize(packed, absmax), torch.cat([nf4.dequantize(*stored(p, absmax.dtype)) for p in parts])
    )


def test_storage_is_as_small_as_the_arithmetic():
    packed, absmax = nf4.allocate(64, 4096, torch.bfloat16, "cpu")
    assert packed.untyped_storage().nbytes() + absmax.untyped_storage().nbytes() == 64 * 4096 * 0.53125


def test_double_quantised_absmax_is_read_as_bitsandbytes_reads_it():
    weight = random_weight((72, 576), torch.bfloat16)
    _, state = bitsandbytes.quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=True)
    expected = bitsandbytes.dequantize_blockwise(state.absmax, state.state2) + state.offset
    mine = nf4.unnest_absmax(state.absmax, state.state2.absmax, state.state2.code, state.offset)
    assert mine.dtype == torch.float32 and torch.equal(mine, expected)


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="96 columns are not a multiple of 64"):
        nf4.quantize(torch.zeros(8, 96))
    with pytest.raises(ValueError, match="12 output features are not a multiple of 8"):
        nf4.allocate(12, 128, torch.bfloat16, "cpu")
    with pytest.raises(ValueError, match="takes a float matrix"):
        nf4.quantize(torch.zeros(8, 128, dtype=torch.int8))
    packed, absmax = nf4.allocate(16, 192, torch.bfloat16, "cpu")
    with pytest.raises(ValueError, match="multiple of 8"):
        nf4.dequantize(packed[4:12], absmax[4:12])
    with pytest.raises(ValueError, match="never a contiguous copy"):
        nf4.dequantize(packed.contiguous(), absmax.contiguous())
    with pytest.raises(ValueError, match="multiple of 8 within the storage"):
        nf4.quantize_rows(packed, absmax, 8, torch.zeros(16, 192))
    with pytest.raises(ValueError, match="does not hold 128 columns"):
        nf4.quantize_rows(packed, absmax, 0, torch.zeros(16, 128))
    with pytest.raises(ValueError, match="out must be"):
        nf4.dequantize(packed, absmax, out=torch.zeros(16, 192))


def run_ptx(text, inputs, outputs):
    """Interpret the few PTX instructions of the lookup on int lists; returns the 16-bit outputs."""
    registers = {f"${index}": value & 0xFFFFFFFF for index, value in inputs.items()}
    for line in re.sub(r"[{}]", "", text).split(";"):
        parts = [part.strip() for part in line.replace(",", " ").split()]
        if parts and parts[0] == "prmt.b32":
            target, a, b, selector = parts[1:]
            source = registers[a] | registers[b] << 32
            chosen = int(selector, 0) if selector.startswith("0x") else registers[selector]
            nibbles = [chosen >> 4 * i & 15 for i in range(4)]
            assert all(nibble < 8 for nibble in nibbles), "prmt would replicate a sign"
            registers[target] = sum((source >> 8 * nibble & 255) << 8 * i for i, nibble in enumerate(nibbles))
        elif parts and parts[0] == "mov.b32":
            low, high, source = parts[1:]
            registers[low], registers[high] = registers[source] & 0xFFFF, registers[source] >> 16
        else:
            assert not parts or parts[0] == ".reg", line
    return [registers[f"${index}"] for index in outputs]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_ptx_lookup_gives_the_codes_values_for_every_half_word(dtype):
    expected = bits(torch.tensor(nf4.CODE).to(dtype)).int().bitwise_and(0xFFFF).tolist()
    tables = {6 + index: word for index, word in enumerate(nf4_lookup.byte_tables(dtype))}
    for word in range(0, 1 << 16, 7):  # 7 is odd: every nibble takes every value beside every other
        low, choice = word & 0x7777, word >> 1 & 0x4444 | 0x3210
        nibbles = [word >> 4 * index & 15 for index in range(4)]
        values = run_ptx(nf4_lookup.PRMT.value, {4: low, 5: choice, **tables}, range(4))
        assert values == [expected[nibbles[index]] for index in (1, 0, 3, 2)]


@pytest.mark.slow
def test_kernels_in_the_interpreter():
    """interpreted_nf4.py needs TRITON_INTERPRET before Triton is imported, hence a process of its own."""
    folder = Path(__file__).parent
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(folder / "interpreted_nf4.py")],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "passed" in result.stdout and "skipped" not in result.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [*SHAPES, (1536, 8960), (4104, 1600)])
def test_triton_forms_equal_torch_forms_on_the_gpu(shape, dtype):
    for source in FLOATS:
        weight = random_weight(shape, source)
        expected = stored(weight, dtype)
        packed, absmax = stored(weight.cuda(), dtype, "cuda")
        assert torch.equal(packed.cpu(), expected[0]) and torch.equal(bits(absmax.cpu()), bits(expected[1]))
        dense = nf4.dequantize(packed, absmax, out=torch.full(shape, float("nan"), dtype=dtype, device="cuda"))
        assert torch.equal(bits(dense.cpu()), bits(nf4.dequantize(*expected)))
        rows = slice(8, shape[0])
        if shape[0] > 8:
            assert torch.equal(nf4.dequantize(packed[rows], absmax[rows]), dense[rows])
