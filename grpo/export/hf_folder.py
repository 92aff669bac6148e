"""A merged model as a folder in Hugging Face format: 16-bit, or 4-bit as bitsandbytes keeps it.

Weights are read, rounded and written one shard at a time, so the peak is one shard and one weight, whatever the size
of the model. Tokenizer, chat template and generation settings are the base's files, copied as they are. Where the
folder is put, and whether it computes what it should, is decided in `build.py`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo.errors import UserError
from grpo.export.bnb_format import packed_entries, quantization_config, unpacked
from grpo.export.merge import MergedSource
from grpo.kernels import nf4
from grpo.model.architectures import causal_class
from grpo.model.base_weights import matches_module
from grpo.model.layout import HEAD, Layout, fused_linears
from grpo.model.meta_graph import graph_tensors
from grpo.model.model_folder import SHARD_BYTES, Shards, companions, replace_template, write_json
from grpo.model.stored_form import stored_form
from grpo.model.vision import TOWER


def write_16bit(source: MergedSource, folder: Path, template: str | None, shard_bytes: int = SHARD_BYTES) -> None:
    """Write `source` to the empty `folder`, every tensor rounded once to the base's 16-bit type.

    template: a chat template that replaces the base's.
    """
    dtype = half_type(source)
    shards = Shards(folder, shard_bytes)
    float32 = Layout.of(source.config.get_text_config()).float32
    for name in sorted(source.names):
        weight = source.read(name)
        shards.add(source.stored_name(name), weight if name in float32 else rounded(weight, dtype, name))
    add_tower(source, shards, dtype)
    shards.finish()
    write_companions(source, folder, model_config(source, dtype), template)


def write_4bit(
    source: MergedSource, folder: Path, template: str | None, in_16bit: list[str], shard_bytes: int = SHARD_BYTES
) -> float:
    """Write `source` to the empty `folder` with its linear layers in NF4; ||NF4(W) - W|| / ||W|| over them all.

    in_16bit: layers that are not quantised, as `keep_16bit` of `[model]` names them; nor are embedding and head, and
    layers of which a row is no whole number of blocks.
    """
    dtype = half_type(source)
    linears, routers = packed_modules(source)
    float32 = Layout.of(source.config.get_text_config()).float32
    dense = [part for part in linears if stays_dense(source, part, in_16bit)]
    shards, lost, whole = Shards(folder, shard_bytes), 0.0, 0.0
    for name in sorted(source.names):
        weight = source.read(name)
        module = name.removesuffix(".weight")
        if module == name or module not in linears or module in dense:
            shards.add(source.stored_name(name), weight if name in float32 else rounded(weight, dtype, name))
            continue
        entries = packed_entries(name, weight, dtype)
        for key, entry in entries.items():
            shards.add(source.stored_name(name) + key.removeprefix(name), entry)
        lost += float((unpacked(name, entries) - weight.float()).square().sum(dtype=torch.float64))
        whole += float(weight.float().square().sum(dtype=torch.float64))
    add_tower(source, shards, dtype)
    shards.finish()
    plain = [source.stored_name(f"{name}.weight").removesuffix(".weight") for name in (*routers, *dense)]
    towers = [TOWER] if source.vision is not None else []
    config = model_config(source, dtype) | {
        "quantization_config": quantization_config(dtype, ["lm_head", *towers, *plain])
    }
    write_companions(source, folder, config, template)
    return (lost / whole) ** 0.5 if whole else 0.0


def add_tower(source: MergedSource, shards: Shards, dtype: torch.dtype) -> None:
    """The vision tower as the base has it, where the model takes images."""
    for entry in sorted(source.tower.values()):
        shards.add(source.stored_name(entry), rounded(source.read(entry), dtype, entry))


def packed_modules(source: MergedSource) -> tuple[list[str], list[str]]:
    """The linear layers of `source` and its experts, where they are a matrix each; and the routers of experts."""
    config = source.config.get_text_config()
    linears = [part for parts in fused_linears(config).values() for part in parts]
    form = stored_form(config)
    experts = [
        piece.name.removesuffix(".weight")
        for pieces in form.pieces.values()
        for piece in pieces
        if piece.expert is not None
    ]
    routers = [f"{experts.router}.weight" for experts in graph_tensors(config).experts.values()]
    return [*linears, *experts], [form.renamed.get(name, name).removesuffix(".weight") for name in routers]


def stays_dense(source: MergedSource, part: str, in_16bit: list[str]) -> bool:
    """Whether the linear layer `part` is left out of quantisation."""
    inside = part.partition(".experts.")[0] + ".experts"
    kept = any(matches_module(module, name) for name in in_16bit for module in (part, inside))
    return kept or source.shape(f"{part}.weight")[1] % nf4.BLOCK != 0


def half_type(source: MergedSource) -> torch.dtype:
    """The 16-bit type of the base: its weights', else its configuration's, else bfloat16."""
    for name in (source.stored_as, str(getattr(source.config, "dtype", "")).removeprefix("torch.")):
        if name in ("bfloat16", "float16"):
            return getattr(torch, name)
    return torch.bfloat16


def rounded(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """`tensor` in `dtype`. Raises UserError for a value beyond its range."""
    result = tensor.to(dtype)
    if dtype == torch.float16 and not result.isfinite().all():
        raise UserError(f"{name} has values that float16 cannot hold; export another format, bfloat16 holds them")
    return result


def model_config(source: MergedSource, dtype: torch.dtype) -> dict[str, Any]:
    """The base's config.json for weights in `dtype`, without its quantisation; of a model that takes images too, the
    decoder's."""
    file = source.path / "config.json"
    values = json.loads(file.read_text()) if file.is_file() else {}
    if values.get("model_type") != source.config.model_type and source.vision is None:
        values = json.loads(source.config.to_json_string())
    for stale in ("quantization_config", "auto_map", "_name_or_path"):
        values.pop(stale, None)
    values["torch_dtype" if "torch_dtype" in values else "dtype"] = str(dtype).removeprefix("torch.")
    values["tie_word_embeddings"] = HEAD not in source.names
    if source.vision is None:
        values["architectures"] = [causal_class(source.config.model_type)]
    elif isinstance(values.get("text_config"), dict):
        values["text_config"]["tie_word_embeddings"] = values["tie_word_embeddings"]
    return values


def write_companions(source: MergedSource, folder: Path, config: dict[str, Any], template: str | None) -> None:
    """Everything but the weights."""
    write_json(folder / "config.json", config)
    if source.path.is_dir():
        for file in companions(source.path, images=source.vision is not None):
            shutil.copyfile(file, folder / file.name)
    else:
        from transformers import GenerationConfig

        source.tokenizer().save_pretrained(folder)
        GenerationConfig.from_model_config(source.config).save_pretrained(folder)
    if template is not None:
        replace_template(folder, template)
