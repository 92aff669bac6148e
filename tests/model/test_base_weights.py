"""The one copy: fused rows, one dequantisation, a padded vocabulary, parts kept in 16 bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo.config.schema import Lora, Model
from grpo.errors import UserError
from grpo.model.base_weights import BaseWeights
from grpo.model.source import open_source
from grpo.policy.policy import Policy
from tests.helpers.tiny import VOCABULARY, save_tiny

CPU = torch.device("cpu")
QKV = "model.layers.0.self_attn.qkv_proj"


def load(folder: Path, dtype: torch.dtype = torch.float32, **keys: Any) -> BaseWeights:
    model = Model(name=str(folder), **{"load_in_4bit": False, **keys})
    return BaseWeights(open_source(model), model, device=CPU, dtype=dtype)


def dequantized(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight` after NF4 in blocks of 64 and back, with `dtype`'s rounding of code, scale and product."""
    from bitsandbytes.functional import get_4bit_type, quantize_4bit

    packed, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten().long()
    table = get_4bit_type("nf4", device="cpu").to(dtype)
    return (table[codes].view(-1, 64) * state.absmax.to(dtype)[:, None]).view(weight.shape)


def test_fused_layers_hold_their_parts_one_below_another(tmp_path: Path) -> None:
    state = save_tiny(tmp_path, "qwen2").state_dict()
    base = load(tmp_path)
    linear = base.linears[QKV]
    assert list(linear.parts) == [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    assert linear.segments[0].weight.equal(torch.cat([state[f"{part}.weight"] for part in linear.parts]))
    assert linear.bias.equal(torch.cat([state[f"{part}.bias"] for part in linear.parts]))
    for part, (first, rows) in linear.parts.items():
        view, bias = linear.part(part)
        assert view.weight.equal(state[f"{part}.weight"]) and bias.equal(state[f"{part}.bias"])
        assert view.weight.data_ptr() == linear.segments[0].weight[first].data_ptr()
        assert view.weight.shape[0] == rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_four_bit_base_has_one_value_per_weight_and_rounds_it_once(dtype: torch.dtype, tmp_path: Path) -> None:
    state = save_tiny(tmp_path, "llama").state_dict()
    base = load(tmp_path, dtype, load_in_4bit=True)
    for linear in base.linears.values():
        for part in linear.parts:
            assert linear.part(part)[0].weight.equal(dequantized(state[f"{part}.weight"], dtype)), part
    assert base.tensors["model.norm.weight"].equal(state["model.norm.weight"].to(dtype))
    assert base.tensors["lm_head.weight"][:VOCABULARY].equal(state["lm_head.weight"].to(dtype)), "only linears are NF4"


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_vocabulary_is_padded_with_zeros_and_a_tied_head_held_once(tied: bool, tmp_path: Path) -> None:
    model = save_tiny(tmp_path, "llama", tie_word_embeddings=tied)
    base = load(tmp_path)
    assert ("lm_head.weight" in base.tensors) != tied
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & base.tensors.keys():
        assert base.tensors[name].shape == (192, 128)
        assert not base.tensors[name][VOCABULARY:].any()
    head = Policy(base, Lora(r=2)).head_weight()
    assert head.equal(model.get_output_embeddings().weight)
    assert (head.data_ptr() == base.tensors["model.embed_tokens.weight"].data_ptr()) == tied


def test_parts_of_a_fused_layer_can_be_kept_in_16_bit(tmp_path: Path) -> None:
    state = save_tiny(tmp_path, "llama").state_dict()
    base = load(tmp_path, load_in_4bit=True, keep_16bit=["layers.0.self_attn.k_proj", "down_proj"])
    kept = {"model.layers.0.self_attn.k_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"}
    assert set(base.kept_16bit) == kept
    assert len(base.linears[QKV].segments) == 3
    assert [segment.first_row for segment in base.linears[QKV].segments] == [0, 128, 192]
    for linear in base.linears.values():
        for part in linear.parts:
            weight = state[f"{part}.weight"]
            expected = weight if part in kept else dequantized(weight, torch.float32)
            assert linear.part(part)[0].weight.equal(expected), part


def test_a_name_that_ends_alike_is_not_kept(tmp_path: Path) -> None:
    """ "proj" is no module's name, though every one ends so."""
    save_tiny(tmp_path, "llama")
    assert load(tmp_path, load_in_4bit=True, keep_16bit=["self_attn.k_proj"]).kept_16bit == [
        "model.layers.0.self_attn.k_proj",
        "model.layers.1.self_attn.k_proj",
    ]
    with pytest.raises(UserError, match="keep_16bit.*'proj'"):
        load(tmp_path, load_in_4bit=True, keep_16bit=["proj"])


def test_blocks_that_would_cross_rows_are_refused_with_the_remedy(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama", intermediate_size=96)
    load(tmp_path)
    with pytest.raises(UserError, match="down_proj has 96 inputs, not a multiple of 64.*load_in_4bit = false"):
        load(tmp_path, load_in_4bit=True)


def test_the_training_graph_owns_nothing_but_the_adapter(tmp_path: Path) -> None:
    save_tiny(tmp_path, "qwen2", tie_word_embeddings=False)
    base = load(tmp_path)
    graph = Policy(base, Lora(r=2)).decoder
    owned = {tensor.untyped_storage().data_ptr() for tensor in base.storages()}
    tensors = {**dict(graph.named_parameters()), **dict(graph.named_buffers())}
    own = {name for name, tensor in tensors.items() if tensor.untyped_storage().data_ptr() not in owned}
    assert own and all("lora_" in name or "inv_freq" in name for name in own)
    assert sum(tensor.untyped_storage().nbytes() for tensor in base.storages()) == base.nbytes()
