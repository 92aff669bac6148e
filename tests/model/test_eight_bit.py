"""8-bit bases: every form of checkpoint is read exactly, held by arithmetic to the byte, and refused in a sentence."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.config.schema import Config, Lora, Model
from grpo.errors import UserError
from grpo.kernels import eight_bit
from grpo.kernels.stored_weight import dequantize
from grpo.memory.plan import weight_bytes
from grpo.memory.shapes import model_shape
from grpo.model.base_weights import BaseWeights
from grpo.model.fingerprint import Fingerprint
from grpo.model.source import open_source
from grpo.policy.policy import Policy
from tests.helpers.checkpoints import EIGHT_BIT_FORMS, edit_tensors, quantize_folder_8bit
from tests.helpers.tiny import save_tiny

CPU = torch.device("cpu")
Q_PROJ = "model.layers.0.self_attn.q_proj"


class Packed(BaseWeights):
    """Held on a CPU as a GPU holds it: codes and scales."""

    packed = property(lambda self: self.quantized, lambda self, value: None)  # type: ignore[assignment]


def load(folder: Path, kind: type[BaseWeights] = BaseWeights, dtype: torch.dtype = torch.float32, **keys: Any) -> Any:
    model = Model(name=str(folder), **{"load_in_8bit": True, **keys})
    return kind(open_source(model), model, device=CPU, dtype=dtype)


def parts(base: BaseWeights) -> dict[str, torch.Tensor]:
    """Weight's name -> its values as the training graph has them."""
    found = {}
    for linear in base.linears.values():
        for part in linear.parts:
            segment, _ = linear.part(part)
            out = torch.empty(segment.rows, segment.columns, dtype=segment.dtype)
            found[f"{part}.weight"] = dequantize(segment.weight, segment.absmax, segment.dtype, out)
    return found


@pytest.mark.parametrize("form", EIGHT_BIT_FORMS)
def test_a_checkpoint_has_the_values_of_its_codes_and_scales(form: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    expected = quantize_folder_8bit(tmp_path, form)
    source = open_source(Model(name=str(tmp_path)))
    assert source.stored_as == ("int8" if "int8" in form or form == "bitsandbytes" else "FP8")
    packed = load(tmp_path, Packed)
    for base in (load(tmp_path), packed, load(tmp_path, load_in_8bit=False, load_in_4bit=False)):
        for name, values in parts(base).items():
            torch.testing.assert_close(values, expected[name], rtol=3e-7, atol=0)
    assert not any("scale" in name or name.endswith("SCB") for name in packed.layout.tensors)
    codes = {segment.weight.dtype for linear in packed.linears.values() for segment in linear.segments}
    assert codes == {torch.int8 if source.stored_as == "int8" else torch.float8_e4m3fn}
    assert packed.stored_as == source.stored_as


@pytest.mark.parametrize("form", EIGHT_BIT_FORMS)
def test_the_memory_plan_knows_the_bytes(form: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, "qwen2", num_hidden_layers=3)
    quantize_folder_8bit(tmp_path, form)
    model = Model(name=str(tmp_path), load_in_8bit=True, keep_16bit=["k_proj"])
    config = Config.model_validate({"model": model.model_dump(), "task": {"name": "arithmetic"}})
    shape = model_shape(model)
    base = load(tmp_path, Packed, torch.bfloat16, keep_16bit=["k_proj"])
    biases = sum(linear.bias.nbytes for linear in base.linears.values() if linear.bias is not None)
    for known in (shape, base.config):
        assert weight_bytes(config, known, 2, on_gpu=True) == base.nbytes() - biases


def test_weights_become_int8_as_bitsandbytes_makes_them(tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    model = save_tiny(tmp_path, "llama")
    base = load(tmp_path, Packed)
    for name, linear in base.linears.items():
        for part in linear.parts:
            codes, absmax, _ = functional.int8_vectorwise_quant(model.state_dict()[f"{part}.weight"].half())
            segment, _ = linear.part(part)
            assert segment.weight.equal(codes), (name, part)
            assert (segment.absmax * 127 - absmax[:, None]).abs().max() <= absmax.max() * 1e-7


def test_packed_and_dense_bases_give_the_same_bits(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    for form in (None, "qwen", "compressed-block"):
        if form is not None:
            save_tiny(tmp_path, "llama")
            quantize_folder_8bit(tmp_path, form)
        bases = [load(tmp_path, kind, torch.bfloat16) for kind in (BaseWeights, Packed)]
        dense, packed = (parts(base) for base in bases)
        assert all(dense[name].equal(packed[name]) for name in dense)
        scores = [Policy(base, Lora(r=2)).score([[5, 9, 33]], [[21, 64]], temperature=1.0).logprobs for base in bases]
        assert scores[0].equal(scores[1])


def test_a_layer_that_a_checkpoint_leaves_in_16_bit_becomes_int8_beside_the_others(tmp_path: Path) -> None:
    model = save_tiny(tmp_path, "llama")
    quantize_folder_8bit(tmp_path, "qwen")
    dense = model.state_dict()[f"{Q_PROJ}.weight"]
    name = Q_PROJ.replace(".", "__")
    edit_tensors(tmp_path, **{f"{name}__weight": dense, f"{name}__weight_scale_inv": None})
    linear = load(tmp_path, Packed).linears["model.layers.0.self_attn.qkv_proj"]
    assert [segment.weight.dtype for segment in linear.segments] == [torch.int8, torch.float8_e4m3fn]
    torch.testing.assert_close(
        parts(load(tmp_path))[f"{Q_PROJ}.weight"], dense, rtol=0, atol=float(dense.abs().max()) / 200
    )


def test_an_adapter_knows_its_base_in_other_forms(tmp_path: Path) -> None:
    forms = {}
    for form in (None, "bitsandbytes", "qwen"):
        folder = tmp_path / str(form)
        save_tiny(folder, "llama")
        if form is not None:
            quantize_folder_8bit(folder, form)
        forms[form] = Fingerprint.of(open_source(Model(name=str(folder))))
    assert all(one.admits(other) for one in forms.values() for other in forms.values())
    save_tiny(tmp_path / "other", "llama")
    down = {f"model.layers.{layer}.mlp.down_proj.weight": torch.randn(128, 192) for layer in range(2)}
    edit_tensors(tmp_path / "other", **down)
    assert not forms["qwen"].admits(Fingerprint.of(open_source(Model(name=str(tmp_path / "other")))))


def test_what_is_rounded_twice_or_not_used_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_tiny(tmp_path, "llama")
    quantize_folder_8bit(tmp_path, "modelopt")
    with caplog.at_level(logging.WARNING, "grpo"):
        load(tmp_path, load_in_8bit=False, load_in_4bit=True)
    assert "its weights, in FP8, are rounded a second time, to NF4; model.load_in_8bit = true keeps" in caplog.text
    assert "input_scale and 13 more, a scale for activations or the KV cache" in caplog.text


# What cannot be read


def refusal(folder: Path, **keys: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(folder, **keys)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message


GROUP = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "float-quantized"}


@pytest.mark.parametrize(
    ("said", "stored"),
    [
        ("weights quantised with 'awq' are not read", {"quant_method": "awq"}),
        ("FP8 weights of the kind 'e5m2' are not read", {"quant_method": "fp8", "fmt": "e5m2"}),
        ("ModelOpt's 'NVFP4' are not read", {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
        (
            "'compressed-tensors' as 'pack-quantized' of 4 bits are not read",
            {**COMPRESSED, "format": "pack-quantized", "config_groups": {"a": {"weights": {"num_bits": 4}}}},
        ),
        (
            "zero points (symmetric = false) are not read",
            {**COMPRESSED, "config_groups": {"a": {"weights": {"num_bits": 8, "symmetric": False}}}},
        ),
        (
            "rotated (transform_config)",
            {**COMPRESSED, "config_groups": {"a": GROUP}, "transform_config": {"config_groups": {"R1": {}}}},
        ),
        ("sparse weights ('sparse-24-bitmask')", {**COMPRESSED, "sparsity_config": {"format": "sparse-24-bitmask"}}),
    ],
)  # fmt: skip
def test_a_kind_that_is_not_read_is_named_before_any_weight(said: str, stored: dict[str, Any], tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": stored}))
    message = refusal(tmp_path)
    assert (
        said in message
        and str(file) in message
        and "use an int8, FP8, NF4, MXFP4 (of experts) or an unquantised" in message
    )


@pytest.mark.parametrize(
    "stored",
    [
        ["fp8"],
        3,
        {"quant_method": "fp8", "weight_block_size": [0, 128]},
        {"quant_method": "fp8", "weight_block_size": 7},
        {"quant_method": "fp8", "weight_block_size": [128]},
        {**COMPRESSED, "config_groups": [1]},
        {**COMPRESSED, "config_groups": {"a": {"weights": {"num_bits": 8, "group_size": "x"}}}},
        {"quant_method": "modelopt", "quantization": [1]},
    ],
    ids=str,
)  # fmt: skip
def test_a_description_that_says_nothing_is_refused_and_not_planned(stored: Any, tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": stored}))
    assert "quantization_config is not understood" in refusal(tmp_path)
    assert model_shape(Model(name=str(tmp_path))) is None


def test_modelopts_own_file_is_named(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "W4A16_AWQ"}}))
    assert "hf_quant_config.json: weights quantised by ModelOpt's 'W4A16_AWQ' are not read" in refusal(tmp_path)
    (tmp_path / "hf_quant_config.json").write_text("{")
    assert "hf_quant_config.json:1: not valid JSON" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("said", "changes"),
    [
        ("has values that are no numbers", {"weight": torch.full((128, 128), float("nan")).to(torch.float8_e4m3fn)}),
        ("does not fit a weight of shape", {"weight_scale_inv": torch.ones(3, 5)}),
        ("has values that are not finite", {"weight_scale_inv": torch.full((1, 1), float("inf"))}),
        ("is kept as F8_E4M3, without the scales", {"weight_scale_inv": None}),
        ("has scales twice, weight_scale_inv and weight_scale", {"weight_scale": torch.ones(1, 1)}),
        ("is torch.int32, not a float", {"weight_scale_inv": torch.ones(1, 1, dtype=torch.int32)}),
        ("weight_zero_point is not zero", {"weight_zero_point": torch.ones(1, 1)}),
        ("is kept as F8_E5M2", {"weight": torch.zeros(128, 128).to(torch.float8_e5m2)}),
    ],
)  # fmt: skip
def test_entries_that_do_not_belong_together_are_named(said: str, changes: dict[str, Any], tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    quantize_folder_8bit(tmp_path, "qwen")
    edit_tensors(tmp_path, **{f"{Q_PROJ}.{key}": value for key, value in changes.items()})
    message = refusal(tmp_path)
    assert said in message and Q_PROJ in message


def test_both_forms_at_once_and_auto_are_refused() -> None:
    with pytest.raises(ValueError, match="both true; set one of the two to false"):
        Model(name="m", load_in_4bit=True, load_in_8bit=True)
    with pytest.raises(ValueError, match="chooses for NF4"):
        Model(name="m", load_in_8bit=True, keep_16bit="auto")
    assert not Model(name="m", load_in_8bit=True).load_in_4bit


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 6).map(lambda n: 8 * n), columns=st.integers(1, 12).map(lambda n: 16 * n),
    tall=st.sampled_from([1, 3, 8, 24, 128]), wide=st.sampled_from([16, 32, 48, 128]), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_block_multiplies_its_own_codes(rows: int, columns: int, tall: int, wide: int, seed: int) -> None:
    from grpo.model.eight_bit_source import shared_scales

    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, generator=generator)
    stored = torch.rand(-(-rows // tall), -(-columns // wide), generator=generator) + 0.5
    scales = shared_scales(stored, codes, ((tall, wide),), "scales")
    by_hand = torch.tensor([[stored[i // tall, j // wide] for j in range(columns)] for i in range(rows)])
    assert eight_bit.dequantize(codes, scales, torch.float32).equal(codes.float() * by_hand)
