"""Exports of models that see: whole ones with their tower, and adapters under the names that whole models have.

Trained is the decoder of text, whose tensors are `model.layers...` here; in transformers' whole model they are
`model.language_model.layers...` and the tower's `model.visual...`. Other libraries bring the processor of images.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo.errors import UserError
from grpo.export.hf_folder import Shards, companions, half_type, replace_template, rounded, write_json
from grpo.export.merge import MergedSource
from grpo.model.adapter_config import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from grpo.model.layout import HEAD, Layout
from grpo.model.vision import TOWER
from grpo.model.weight_source import Source, dense
from grpo.policy.adapter_files import PEFT_PREFIX

INNER, OUTER = "model.", "model.language_model."
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
NOT_THE_TOWER = rf".*\b{TOWER}\..*"
"""Modules without an adapter, as peft's `exclude_modules`: a tower's layers are called as a decoder's are."""


def whole_name(name: str) -> str:
    """The name in the whole model of a tensor, or a module, of its decoder."""
    return OUTER + name.removeprefix(INNER) if name.startswith(INNER) else name


def write_whole(merged: MergedSource, seeing: Source, folder: Path, template: str | None) -> None:
    """Write the decoder `merged` and the tower of `seeing`, the same base, to the empty `folder`, in 16 bit."""
    dtype = half_type(merged)
    shards = Shards(folder)
    float32 = Layout.of(merged.config.get_text_config()).float32
    for name in sorted(merged.names):
        weight = merged.read(name)
        shards.add(whole_name(name), weight if name in float32 else rounded(weight, dtype, name))
    for name, entry in sorted(seeing.tower.items()):
        shards.add(f"{INNER}{TOWER}.{name}", rounded(dense(seeing.read(entry)), dtype, name))
    shards.finish()
    write_json(folder / "config.json", whole_config(merged, dtype))
    for file in [*companions(merged.path), *(merged.path / name for name in PROCESSORS)]:
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    if template is not None:
        replace_template(folder, template)


def whole_config(merged: MergedSource, dtype: torch.dtype) -> dict[str, Any]:
    """The base's config.json for weights in `dtype`, without its quantisation."""
    values: dict[str, Any] = json.loads((merged.path / "config.json").read_text())
    for stale in ("quantization_config", "auto_map", "_name_or_path"):
        values.pop(stale, None)
    kind, tied = str(dtype).removeprefix("torch."), HEAD not in merged.names
    for part in (values, values.get("text_config"), values.get("vision_config")):
        if isinstance(part, dict):
            part |= {key: kind for key in ("torch_dtype", "dtype") if key in part}
    values |= {"torch_dtype" if "torch_dtype" in values else "dtype": kind, "tie_word_embeddings": tied}
    return values


def rename_adapter(folder: Path) -> None:
    """Give the adapter in `folder` the names of the whole model's layers, and keep it off the tower."""
    from safetensors.torch import load_file, save_file

    def renamed(name: str) -> str:
        return PEFT_PREFIX + whole_name(name.removeprefix(PEFT_PREFIX))

    file = folder / ADAPTER_WEIGHTS
    tensors: dict[str, Tensor] = {renamed(name): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    config: Mapping[str, Any] = json.loads((folder / ADAPTER_CONFIG).read_text())
    if config.get("exclude_modules"):
        raise UserError(
            f"lora.exclude_modules = {config['exclude_modules']!r} cannot be written for the whole model, whose tower "
            "is excluded; export merged-16bit"
        )
    write_json(folder / ADAPTER_CONFIG, {**config, "exclude_modules": NOT_THE_TOWER})
