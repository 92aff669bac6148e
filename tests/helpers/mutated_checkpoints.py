"""Checkpoints of tiny models with tensors added, dropped, doubled, renamed, retied or kept in another type.

Whoever draws one expects transformers' logprobs or a sentence. Every change is one that somebody's file has had.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from tests.helpers.tiny import FAMILIES, tiny_model

Tensors = dict[str, Tensor]
Change = Callable[[Tensors, dict[str, Any]], None]

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SURPLUS = (
    "model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq", "vision_tower.blocks.0.weight",
    "model.visual.patch_embed.weight", "mtp.layers.0.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight",
    "model.layers.0.self_attn.q_proj.weight_scale", "model.layers.1.mlp.down_proj.weight_scale_inv",
    "model.layers.0.self_attn.q_proj.input_scale", "model.layers.0.mlp.gate_proj.SCB", "lm_head.bias", "score.weight",
    "model.layers.0.self_attn.k_proj.weight.absmax", "model.layers.0.self_attn.k_proj.weight.extra",
    "model.layers.0.self_attn.k_proj.lora_A.weight", "model.layers.1.self_attn.q_norm.weight", "model.norm.bias",
    "model.layers.0.mlp.experts.0.up_proj.weight", "base_model.model.model.norm.weight", "model.embed_tokens.bias",
)  # fmt: skip
BIASED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
TYPES = (
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8,
    torch.int32, torch.bool,
)  # fmt: skip
PREFIXES = (("model.", ""), ("model.", "model.model."), ("model.", "language_model.model."), ("", "module."),
            (".weight", ".base_layer.weight"), (".self_attn.", ".attention."))  # fmt: skip


def add(name: str, size: int) -> Change:
    return lambda tensors, config: tensors.setdefault(name, torch.full((size,), 2.0))


def add_bias(part: str, layers: list[int]) -> Change:
    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        for layer in layers:
            weight = tensors.get(f"model.layers.{layer}.{part}.weight")
            if weight is not None:
                tensors[f"model.layers.{layer}.{part}.bias"] = torch.linspace(-1, 1, len(weight))

    return change


def of_index(number: int, act: Callable[[Tensors, str], None]) -> Change:
    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        names = sorted(tensors)
        act(tensors, names[number % len(names)])

    return change


def drop(number: int) -> Change:
    return of_index(number, lambda tensors, name: tensors.__delitem__(name))


def convert(number: int, dtype: torch.dtype) -> Change:
    return of_index(number, lambda tensors, name: tensors.update({name: tensors[name].to(dtype)}))


def reshape(number: int) -> Change:
    return of_index(number, lambda tensors, name: tensors.update({name: tensors[name][:-1].contiguous()}))


def rename(number: int, old: str, new: str) -> Change:
    return of_index(number, lambda tensors, name: tensors.update({name.replace(old, new, 1): tensors.pop(name)}))


def rename_all(old: str, new: str) -> Change:
    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        for name in list(tensors):
            if name != HEAD:
                tensors[name.replace(old, new, 1)] = tensors.pop(name)

    return change


def double(number: int, old: str, new: str) -> Change:
    return of_index(
        number, lambda tensors, name: tensors.update({name.replace(old, new, 1): tensors[name].float() * 2})
    )


def retie(tied: bool, head: str) -> Change:
    """`head`: "same" as the embedding, "other", "near", "none"."""

    def change(tensors: Tensors, config: dict[str, Any]) -> None:
        config["tie_word_embeddings"] = tied
        tensors.pop(HEAD, None)
        embedding = tensors.get(EMBEDDING)
        if head == "none" or embedding is None:
            return
        tensors[HEAD] = embedding.flip(0).contiguous() if head == "other" else embedding.clone()
        if head == "near":
            other = embedding.to(torch.float32, copy=True)
            other[3] += 0.25
            tensors[HEAD] = other.to(embedding.dtype)

    return change


def configure(key: str, value: Any) -> Change:
    return lambda tensors, config: config.__setitem__(key, value)


NUMBER = st.integers(0, 40)
CHANGES: st.SearchStrategy[Change] = st.one_of(
    st.builds(add, st.sampled_from(SURPLUS), st.sampled_from([1, 64, 128])),
    st.builds(add_bias, st.sampled_from(BIASED), st.sampled_from([[0], [1], [0, 1]])),
    st.builds(drop, NUMBER),
    st.builds(convert, NUMBER, st.sampled_from(TYPES)),
    st.builds(reshape, NUMBER),
    st.sampled_from(PREFIXES).flatmap(lambda pair: st.builds(lambda n: rename(n, *pair), NUMBER)),
    st.sampled_from(PREFIXES).map(lambda pair: rename_all(*pair)),
    st.sampled_from(PREFIXES).flatmap(lambda pair: st.builds(lambda n: double(n, *pair), NUMBER)),
    st.builds(retie, st.booleans(), st.sampled_from(["same", "other", "near", "none"])),
    st.builds(configure, st.just("attention_bias"), st.booleans()),
    st.builds(configure, st.just("num_hidden_layers"), st.sampled_from([1, 3])),
    st.builds(configure, st.just("num_nextn_predict_layers"), st.just(1)),
)
LAYOUTS = ("whole", "shards", "whole and index", "shards and consolidated", "whole and consolidated", "odd name",
           "named", "shard beyond the index", "twice")  # fmt: skip
MUTATIONS = st.tuples(
    st.sampled_from(sorted(FAMILIES)), st.lists(CHANGES, max_size=3), st.sampled_from(LAYOUTS)
)  # fmt: skip


def save_mutated(folder: Path, family: str, changes: list[Change], layout: str) -> None:
    """A tiny model of `family` in `folder`, changed, its files laid out as `layout` says."""
    model = tiny_model(family)
    config = json.loads(model.config.to_json_string(use_diff=False)) | {"dtype": "float32"}
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        tensors.pop(HEAD)
    for change in changes:
        change(tensors, config)
    write_layout(folder, tensors, config, layout)
    (folder / "config.json").write_text(json.dumps(config))


def reversed_rows(tensor: Tensor) -> Tensor:
    """Other values in the shape and type of `tensor`, whatever that is."""
    return tensor.float().flip(0).to(tensor.dtype)


def write_layout(folder: Path, tensors: Tensors, config: dict[str, Any], layout: str) -> None:
    def write(name: str, held: Tensors) -> None:
        save_file({key: tensor.contiguous() for key, tensor in held.items()}, folder / name, metadata={"format": "pt"})

    def write_index(places: dict[str, str], name: str = "model.safetensors.index.json") -> None:
        (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": places}))

    names = sorted(tensors)
    files = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    first = {name: tensors[name] for name in names[::2]}
    second = {name: tensors[name] for name in names[1::2]}
    places = dict.fromkeys(first, files[0]) | dict.fromkeys(second, files[1])
    if layout == "twice":
        second[names[0]] = reversed_rows(tensors[names[0]])
    if layout == "shard beyond the index":
        places.pop(names[-1])
    if layout in ("shards", "shards and consolidated", "shard beyond the index", "twice"):
        write(files[0], first)
        write(files[1], second)
        write_index(places)
    elif layout == "odd name":
        write("weights.safetensors", tensors)
    elif layout == "named":
        write("weights.safetensors", tensors)
        write("model.safetensors", {name: reversed_rows(tensor) for name, tensor in tensors.items()})
        config["transformers_weights"] = "weights.safetensors"
    else:
        write("model.safetensors", tensors)
    if layout == "whole and index":
        write(files[0], {name: reversed_rows(tensor) for name, tensor in first.items()})
        write(files[1], {name: reversed_rows(tensor) for name, tensor in second.items()})
        write_index(places)
    if layout.endswith("consolidated"):
        write("consolidated.safetensors", {"norm.weight": torch.ones(3)} | first)
