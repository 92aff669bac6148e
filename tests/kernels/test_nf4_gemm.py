"""kernels/nf4_gemm.py: which way a product goes, and what the compiled kernel and the GPU make of it.

The kernel's arithmetic on the CPU is in interpreted_nf4.py.
"""

import re

import pytest
import torch
import torch.nn.functional as F

from grpo.kernels import cards, nf4, nf4_gemm, nf4_plans
from grpo.kernels.lora_factors import LowRank
from grpo.kernels.lora_shrink import lora_shrink
from grpo.kernels.nf4_tiles import Tile
from tests.helpers.hopper import compile_for_hopper


def stored(features, columns, dtype, device="cpu"):
    packed, absmax = nf4.allocate(features, columns, dtype, device)
    generator = torch.Generator().manual_seed(features + columns)
    nf4.quantize_rows(packed, absmax, 0, (torch.randn(features, columns, generator=generator) * 0.05).to(device))
    return packed, absmax


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_on_a_cpu_it_is_the_product_of_dequantised_weights(dtype, with_bias):
    weight = stored(24, 192, dtype)
    x = torch.randn(5, 192).to(dtype)
    bias = torch.randn(24).to(dtype) if with_bias else None
    expected = F.linear(x, nf4.dequantize(*weight), bias)
    torch.testing.assert_close(nf4_gemm.nf4_linear(x, *weight, bias), expected)
    out = torch.full((5, 24), float("nan"), dtype=dtype)
    assert nf4_gemm.nf4_linear(x, *weight, bias, out=out) is out
    torch.testing.assert_close(out, expected)
    assert nf4_gemm.nf4_linear(x[:0], *weight, bias).shape == (0, 24)


def test_dequantising_in_pieces_gives_every_column(monkeypatch):
    weight = stored(520, 192, torch.float32)
    x, bias = torch.randn(7, 192), torch.randn(520)
    monkeypatch.setattr(nf4_gemm, "LARGEST_PIECE", 256 * 192 * 4)
    for given in (None, bias):
        out = torch.full((7, 520), float("nan"))
        nf4_gemm.dequantized_linear(x, *weight, given, out)
        torch.testing.assert_close(out, F.linear(x, nf4.dequantize(*weight), given))


def test_wrong_input_is_refused():
    weight = stored(24, 192, torch.bfloat16)
    x = torch.randn(5, 192).bfloat16()
    for wrong in (x.float(), x[:, :128], torch.randn(192, 5).bfloat16().t()):
        with pytest.raises(ValueError, match="the weight takes torch.bfloat16"):
            nf4_gemm.nf4_linear(wrong, *weight)
    for wrong in (torch.empty(5, 16), torch.empty(5, 24), torch.empty(24, 5, dtype=torch.bfloat16).t()):
        with pytest.raises(ValueError, match="out must be"):
            nf4_gemm.nf4_linear(x, *weight, out=wrong)


def gemm_for_hopper(tile, split, element):
    """The kernel's TTGIR and PTX for sm_90a; needs no GPU."""
    constants = {
        "BN": tile.n, "BM": tile.m, "SPLIT": split, "WARPS": tile.warps, "STAGES": tile.stages, "DOTS": tile.dots,
        "RAGGED": True, "HALF_TAIL": False, "HAS_BIAS": False, "RANKS": 0,
        "BR": 16, "INTERPRETED": False, "FENCED": False, "PENDING": False,
    }  # fmt: skip
    pointers = dict.fromkeys(("x_ptr", "bias_ptr", "out_ptr", "x_lora_a_ptr", "b_ptr"), f"*{element}")
    pointers |= {"words_ptr": "*i32", "scales_ptr": "*i32", "partial_ptr": "*fp32", "counters_ptr": "*i32"}
    aligned = {*pointers, "features", "columns", "stride_x_m", "stride_out_m"}
    made = compile_for_hopper(nf4_gemm._gemm_kernel, constants, pointers, aligned=aligned, warps=tile.warps)
    return made["ttgir"], made["ptx"]


@pytest.mark.parametrize("element", ["bf16", "fp16"])
@pytest.mark.parametrize("tile", [Tile(128, 16, 4, 4, 1), Tile(128, 128, 8, 3, 2)])
def test_compiled_for_hopper_weights_stay_in_registers(tile, element):
    ttgir, ptx = gemm_for_hopper(tile, 2, element)
    blocks = re.split(r"^\$L__BB\d+_\d+:", ptx, flags=re.MULTILINE)
    products = [block for block in blocks if "wgmma.mma_async" in block]
    assert products, "the product is not on the tensor cores"
    for block in products:
        assert "st.shared" not in block and "stmatrix" not in block, "weights go through shared memory"
        assert "prmt.b32" in block
    # wgmma's first operand: a list of registers, not a descriptor in a 64-bit register
    operands = re.findall(r"wgmma\.mma_async\S+ \{[^}]*\}, (\S)", ptx)
    assert operands and set(operands) == {"{"}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2048, 1536), (4104, 1600), (960, 576), (28672, 4096)])
def test_on_the_gpu_products_are_right_and_rows_do_not_depend_on_the_batch(shape, dtype):
    features, columns = shape
    weight = stored(features, columns, dtype, "cuda")
    dense = nf4.dequantize(*weight).float()
    x = torch.randn(300, columns, device="cuda").to(dtype)
    bias = torch.randn(features, device="cuda").to(dtype)
    reference = x.float() @ dense.T + bias.float()
    plan = nf4_plans.find_plan(x.device, features, columns)
    fused = {}
    for rows in (1, 2, 7, 8, 16, 17, 32, 33, 64, 65, 100, 128, 129, 200, 256, 257, 300):
        out = torch.full((rows, features), float("nan"), device="cuda", dtype=dtype)
        nf4_gemm.nf4_linear(x[:rows], *weight, bias, out=out)
        error = (out.float() - reference[:rows]).norm() / reference[:rows].norm()
        assert error < {torch.bfloat16: 3e-3, torch.float16: 4e-4}[dtype]
        if plan is not None and plan.tile(rows) is not None:
            fused[rows] = out
    for rows, out in fused.items():
        assert torch.equal(out, fused[max(fused)][:rows]), rows
    assert not nf4_gemm.workspace(x.device)[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_cpu_an_adapter_is_added_to_the_product(dtype):
    weight = stored(24, 192, dtype)
    x, a, b = torch.randn(5, 192).to(dtype), torch.randn(16, 192).to(dtype), torch.randn(24, 16).to(dtype)
    on = torch.ones((), dtype=dtype)
    x_lora_a = lora_shrink(x, a, on)
    result = nf4_gemm.nf4_linear(x, *weight, low_rank=LowRank(x_lora_a, b))
    dense = nf4.dequantize(*weight).double() + b.double() @ a.double()
    expected = x.double() @ dense.T
    assert (result.double() - expected).norm() < {torch.float32: 1e-6, torch.bfloat16: 6e-3}[dtype] * expected.norm()
    off = nf4_gemm.nf4_linear(x, *weight, low_rank=LowRank(lora_shrink(x, a, torch.zeros_like(on)), b))
    torch.testing.assert_close(off, nf4_gemm.nf4_linear(x, *weight))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "ranks"), [((5120, 3072), 48), ((960, 576), 16), ((28672, 4096), 128)])
def test_on_the_gpu_an_adapter_is_added_and_rows_do_not_depend_on_the_batch(shape, ranks, dtype):
    features, columns = shape
    weight = stored(features, columns, dtype, "cuda")
    x = torch.randn(600, columns, device="cuda").to(dtype)
    a = (torch.randn(ranks, columns, device="cuda") * columns**-0.5).to(dtype)
    b = (torch.randn(features, ranks, device="cuda") * 0.3).to(dtype)
    on = torch.ones((), device="cuda", dtype=dtype)
    reference = x.float() @ nf4.dequantize(*weight).float().T + (x.float() @ a.float().T) @ b.float().T
    x_lora_a_whole, fused = lora_shrink(x[:512], a, on), {}
    plan = nf4_plans.find_plan(x.device, features, columns)
    for rows in (1, 3, 16, 33, 128, 200, 512, 600):
        x_lora_a = lora_shrink(x[:rows], a, on)
        out = nf4_gemm.nf4_linear(x[:rows], *weight, low_rank=LowRank(x_lora_a, b))
        error = (out.float() - reference[:rows]).norm() / reference[:rows].norm()
        assert error < {torch.bfloat16: 5e-3, torch.float16: 7e-4}[dtype], rows
        if rows <= 512:
            assert torch.equal(x_lora_a, x_lora_a_whole[:rows]), rows
        if plan is not None and plan.tile(rows) is not None:
            fused[rows] = out
    for rows, out in fused.items():
        assert torch.equal(out, fused[max(fused)][:rows]), rows
    assert not nf4_gemm.workspace(x.device)[1].any()


@pytest.mark.gpu
def test_every_tile_gives_the_same_bits():
    weight = stored(1024, 2048, torch.bfloat16, "cuda")
    x = torch.randn(256, 2048, device="cuda").bfloat16()
    results = {}
    for split in (1, 4):
        for tile in (
            Tile(64, 16, 4, 4, 1), Tile(64, 32, 4, 3, 2), Tile(128, 64, 4, 3, 1), Tile(128, 128, 8, 3, 2),
            Tile(256, 128, 8, 2, 1), Tile(128, 256, 8, 2, 1),
        ):  # fmt: skip
            out = torch.full((256, 1024), float("nan"), device="cuda", dtype=torch.bfloat16)
            nf4_gemm.launch_gemm(x, *weight, None, out, tile, split)
            assert torch.equal(out, results.setdefault(split, out)), (split, tile)


@pytest.mark.gpu
def test_every_tile_of_the_table_is_right_with_an_adapter_that_is_pending():
    """As sampling launches them: the compiler makes a wrong product of some tiles, with one split and an adapter."""
    device = torch.device("cuda", 0)
    for (features, columns), plan in nf4_plans.measured_shapes(cards.card(device)).items():
        weight = stored(features, columns, torch.bfloat16, "cuda")
        b = torch.randn(features, 32, device="cuda").bfloat16() * 0.02
        a, on = torch.randn(32, columns, device="cuda").bfloat16() * 0.02, torch.ones((), device="cuda").bfloat16()
        for rows, tile in plan.tiles:
            x = torch.randn(rows, columns, device="cuda").bfloat16()
            for early in (False, True):
                low_rank = LowRank(lora_shrink(x, a, on, overlapped=early), b, early)
                out, wanted = (torch.empty(rows, features, device="cuda", dtype=torch.bfloat16) for _ in range(2))
                nf4_gemm.launch_fused(x, *weight, None, out, tile, plan.split, low_rank)
                nf4_gemm.dequantized_linear(x, *weight, None, wanted, low_rank)
                error = (out.float() - wanted.float()).norm(dim=1) / wanted.float().norm(dim=1)
                assert error.max() < 0.01, (features, columns, rows, plan.split, tile, early)


@pytest.mark.gpu
def test_a_captured_graph_under_inference_mode_replays_the_same_bits():
    weight = stored(6144, 4096, torch.bfloat16, "cuda")
    nf4_gemm.prepare(torch.device("cuda", 0))
    for rows in (1, 64, 400):
        x = torch.randn(rows, 4096, device="cuda").bfloat16()
        with torch.inference_mode():
            expected = nf4_gemm.nf4_linear(x, *weight)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = nf4_gemm.nf4_linear(x, *weight)
            for _ in range(3):
                out.zero_()
                graph.replay()
                assert torch.equal(out, expected)
