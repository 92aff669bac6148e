"""Model configurations that vLLM and the training graph would not compute alike, and tokens without a row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.helpers.bad_cases import Tables, case, edit_json, put
from tests.helpers.tiny import save_tiny

ALONE = {"vocab_size": 259, "num_hidden_layers": 4, "tie_word_embeddings": True}


def family(home: Path, name: str, **changes: Any) -> None:
    """A model of another family with the good one's tokenizer."""
    folder = home / "model"
    for file in ("config.json", "model.safetensors"):
        (folder / file).unlink()
    save_tiny(folder, name, **ALONE)
    edit_json(folder / "config.json", **changes)


@case("model/config.json: use_sliding_window = true: 2 of 4 layers", "Qwen2ForCausalLM gives it to all or to none")
def a_window_in_some_layers_of_qwen2(home: Path) -> None:
    kinds = ["full_attention"] * 2 + ["sliding_attention"] * 2
    family(home, "qwen2", use_sliding_window=True, sliding_window=64, max_window_layers=2, layer_types=kinds)


@case("model/config.json: use_sliding_window = true: 1 of 4 layers", "set it to false", "at most 64 tokens")
def a_window_in_one_layer_of_qwen3(home: Path) -> None:
    family(home, "qwen3", use_sliding_window=True, sliding_window=64, max_window_layers=3, layer_types=None)


@case('model/config.json: layer_types = ["full_attention", "chunked_attention"', "must be 'full_attention' or")
def layers_of_a_kind_that_is_not_served(home: Path) -> None:
    family(home, "gemma2", layer_types=["full_attention", "chunked_attention"] * 2)


@case("model/config.json: layer_types = [", "Phi3Config has the same attention in every layer")
def a_family_with_layer_types_of_another(home: Path) -> None:
    family(home, "phi3", sliding_window=64, layer_types=["full_attention", "sliding_attention"] * 2)


@case("model/config.json: rope_parameters.partial_rotary_factor = 0.5", "LlamaForCausalLM rotates whole heads")
def a_llama_that_rotates_half_a_head(home: Path) -> None:
    edit_json(home / "model" / "config.json", partial_rotary_factor=0.5)


@case("model/config.json: rope_parameters = {", "transformers finds no rotary frequencies in it")
def rotary_scaling_that_nobody_knows(home: Path) -> None:
    edit_json(home / "model" / "config.json", rope_scaling={"rope_type": "spiral"})


@case("model/config.json: rope_parameters = {", "rotary frequencies that follow are not finite")
def rotary_scaling_by_nothing(home: Path) -> None:
    edit_json(home / "model" / "config.json", rope_scaling={"rope_type": "linear", "factor": 0})


@case("model/config.json: rope_parameters.rope_theta = 0", "must be a number above 0")
def rotary_frequencies_of_base_zero(home: Path) -> None:
    edit_json(home / "model" / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 0})


@case('model/config.json: hidden_act = "relu"', "vLLM's LlamaForCausalLM computes 'silu' alone")
def an_activation_that_vllm_has_not(home: Path) -> None:
    edit_json(home / "model" / "config.json", hidden_act="relu")


@case("model/config.json: use_bidirectional_attention = true", "use a causal model")
def a_model_that_sees_ahead(home: Path) -> None:
    family(home, "gemma3_text", use_bidirectional_attention=True)


@case("model/config.json: final_logit_softcapping = 0.0", "must be a number above 0")
def logits_capped_at_nothing(home: Path) -> None:
    family(home, "gemma2", final_logit_softcapping=0.0)


@case("model/config.json: head_dim = 64", "vLLM's Qwen2ForCausalLM has heads of 32")
def heads_of_a_size_that_vllm_does_not_ask_for(home: Path) -> None:
    family(home, "qwen2", head_dim=64)


@case("model/config.json: pad_token_id = 259", "embedding has 259 rows")
def padding_beyond_the_embedding(home: Path) -> None:
    edit_json(home / "model" / "config.json", pad_token_id=259)


@case("model/config.json: eos_token_id = [1, 999]", "embedding has 259 rows")
def an_end_token_beyond_the_embedding(home: Path) -> None:
    edit_json(home / "model" / "config.json", eos_token_id=[1, 999])


def add_token(home: Path, token: str, **roles: str) -> None:
    """Let the tokenizer, and not the model, have one more token."""
    file = home / "model" / "tokenizer.json"
    values = json.loads(file.read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    values["added_tokens"].append({"id": 259, "content": token, "special": True, **flags})
    put(file, json.dumps(values))
    if roles:
        edit_json(home / "model" / "tokenizer_config.json", **roles)


@case("task 'table', training prompt 2: the token '<image>' has the number 259", "259 rows", "leave it out of the text")
def a_prompt_token_beyond_the_embedding(home: Path) -> Tables:
    add_token(home, "<image>")
    rows = [{"question": "What is 1 + 1?", "answer": "2"}, {"question": "<image> What is this?", "answer": "4"}]
    put(home / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return {"task": {"name": "table", "options": {"path": str(home / "rows.jsonl")}}}


@case("model: completions end with the tokenizer's eos_token", "the token '<end>' has the number 259")
def an_end_of_the_tokenizer_beyond_the_embedding(home: Path) -> None:
    add_token(home, "<end>", eos_token="<end>")


@case("model/config.json: tie_word_embeddings = false", "vLLM's Gemma2ForCausalLM is always the embedding")
def a_head_of_its_own_where_vllm_has_none(home: Path) -> None:
    family(home, "gemma2", tie_word_embeddings=False)


@case(
    "model/config.json: rope_parameters.full_attention = {", "LlamaConfig has rotary parameters for all layers at once"
)
def rotary_parameters_of_another_form(home: Path) -> None:
    whole = {"rope_type": "default", "rope_theta": 1e4, "full_attention": {"rope_type": "default", "rope_theta": 1e6}}
    edit_json(home / "model" / "config.json", rope_parameters=whole)


@case("model/config.json: per_layer_config", "layers that differ in shape are not served")
def layers_that_differ_in_shape(home: Path) -> None:
    edit_json(home / "model" / "config.json", per_layer_config={"0": {"intermediate_size": 64}})


@case("tensor model.layers.0.self_attn.q_proj.bias is missing", "pass a complete model")
def biases_that_are_not_there(home: Path) -> None:
    edit_json(home / "model" / "config.json", attention_bias=True)


@case(
    "sequences of 5128 tokens exceed the 2048 positions",
    "lower rollout.max_prompt_length or eval.max_completion_length",
)
def an_evaluation_beyond_the_positions(home: Path) -> Tables:
    return {"eval": {"every": 1, "max_completion_length": 5000}}
