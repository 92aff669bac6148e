"""A model that was trained whole, as a folder in Hugging Face's format: written from the parameters, and read back into
them in place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import GenerationConfig

from grpo.errors import UserError
from grpo.model.architectures import causal_class
from grpo.model.base_weights import BaseWeights
from grpo.model.model_folder import Shards, companions, write_json
from grpo.model.weight_files import weights_entry


def save_model(folder: Path, base: BaseWeights, parameters: Mapping[str, nn.Parameter], tokenizer: Any) -> None:
    """Write `parameters`, by transformers' names, with what of the starting model stays true, to the empty `folder`."""
    shards = Shards(folder)
    for name, parameter in parameters.items():
        shards.add(name, parameter.detach().to("cpu", copy=True))
    shards.finish()
    write_json(folder / "config.json", config_values(base))
    if base.source_path.is_dir():
        for file in companions(base.source_path):
            shutil.copyfile(file, folder / file.name)
    else:
        GenerationConfig.from_model_config(base.config).save_pretrained(folder)
    if tokenizer is not None:  # with the run's chat template
        tokenizer.save_pretrained(folder)


def config_values(base: BaseWeights) -> dict[str, Any]:
    """config.json of the model that training began with, for weights as `base` holds them."""
    file = base.source_path / "config.json"
    values: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    if values.get("model_type") != base.config.model_type:
        values = json.loads(base.config.to_json_string())
    for stale in ("quantization_config", "auto_map", "_name_or_path", "torch_dtype"):
        values.pop(stale, None)
    return values | {
        "dtype": str(base.dtype).removeprefix("torch."),
        "tie_word_embeddings": base.config.tie_word_embeddings,
        "architectures": [causal_class(base.config.model_type)],
    }


@torch.no_grad()
def load_weights(folder: Path, parameters: Mapping[str, nn.Parameter]) -> None:
    """Copy the weights that `save_model` wrote to `folder` into `parameters`. Raises UserError for other ones."""
    missing = set(parameters)
    try:
        for file in weight_files(folder):
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (no mapping)
                    if name not in parameters or opened.get_slice(name).get_shape() != list(parameters[name].shape):
                        raise UserError(f"{file}: {name} is no weight of this model; name the model that was trained")
                    parameters[name].copy_(opened.get_tensor(name))
                    missing.discard(name)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: the weights cannot be read ({error}); take an earlier checkpoint") from None
    if missing:
        raise UserError(f"{folder}: {min(missing)} is missing; take an earlier checkpoint")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of the model in `folder`."""
    entry = weights_entry(folder, None)
    if entry.suffix == ".safetensors":
        return [entry]
    shards = json.loads(entry.read_text())["weight_map"].values()
    return [folder / name for name in sorted(set(shards))]
