"""Reading a saved LoRA adapter that nobody vouches for: peft's two files, checked before anything is believed.

Only safetensors are read; a pickled adapter is refused. For what becomes of the values see `policy.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from grpo.errors import UserError

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

ALTERS_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations after which the trained base is not the one on the disk."""
CHANGES_THE_FORMULA = ("use_dora", "alpha_pattern", "layer_replication", "use_qalora", "fan_in_fan_out")
"""Entries of adapter_config.json with which the update is no longer s B A of one rank rule."""
ONLY_IN_PEFT = (
    "rank_pattern", "layers_to_transform", "layers_pattern", "modules_to_save", "lora_bias", "target_parameters",
    "trainable_token_indices",
)  # fmt: skip
"""Entries with which an adapter is not one rank on the same modules of every layer, as training has it."""


def read_adapter(folder: Path, expected: Any, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
    """The tensors of the adapter in `folder`, by peft's names, on the CPU.

    expected: the LoraConfig that the adapter must fit in rank, scale and target modules. shapes: of every tensor.
    Raises UserError naming the file, and the key or tensor that does not fit.
    """
    check_adapter(folder, expected)
    file = Path(folder) / WEIGHTS_FILE
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: damaged safetensors ({error}); copy the adapter again") from None
    for name, shape in shapes.items():
        if name not in tensors:
            raise UserError(f"{file}: tensor {name} is missing; was the adapter trained on another base?")
        if tensors[name].shape != shape:
            raise UserError(
                f"{file}: {name} has shape {tuple(tensors[name].shape)}, on this base it has {tuple(shape)}; was the "
                "adapter trained on another base?"
            )
    if surplus := sorted(tensors.keys() - shapes.keys()):
        raise UserError(
            f"{file}: the adapter has weights that this model lacks, such as {surplus[0]}; was it trained on another "
            "base?"
        )
    return tensors


def check_adapter(folder: Path, expected: Any) -> None:
    """Raise UserError unless `folder` holds a LoRA adapter of the rank, scale and targets of `expected`."""
    file = Path(folder) / CONFIG_FILE
    if not file.is_file():
        raise UserError(f"{folder}: no {CONFIG_FILE}; pass the folder of a peft adapter")
    if not (Path(folder) / WEIGHTS_FILE).is_file():
        raise UserError(f"{folder}: no {WEIGHTS_FILE}; pickled adapters are never loaded, save it as safetensors")
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        targets = set(saved["target_modules"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{file}: not the configuration of a LoRA adapter ({error}); copy the adapter again") from None
    check_plain_lora(saved, file)
    for key in ONLY_IN_PEFT:
        if saved.get(key):
            raise UserError(
                f"{file}: {key} is set, and training takes one rank on the same modules of every layer; have peft "
                "merge it into the base, and train a new adapter on that"
            )
    if isinstance(saved["target_modules"], str):
        raise UserError(
            f"{file}: target_modules = {saved['target_modules']!r} is a pattern; have peft save it as a list of names"
        )
    for key in ("r", "lora_alpha", "use_rslora"):
        if saved.get(key) != getattr(expected, key):
            raise UserError(
                f"{file}: {key} = {saved.get(key)}, the configuration says {getattr(expected, key)}; "
                f"set lora.{key} = {saved.get(key)}"
            )
    if targets != set(expected.target_modules):
        raise UserError(
            f"{file}: target_modules = {sorted(map(str, targets))}, the configuration says "
            f"{sorted(expected.target_modules)}; set lora.target_modules as the adapter has them"
        )


def check_plain_lora(config: Mapping[str, Any], file: Path) -> None:
    """Raise UserError unless adapter_config.json says that every update is s B A on the base as it is on the disk."""
    if not isinstance(config.get("lora_alpha"), int | float):
        raise UserError(f"{file}: lora_alpha is missing; copy the adapter again")
    for key in CHANGES_THE_FORMULA:
        if config.get(key):
            raise UserError(
                f"{file}: {key} is set, and only plain LoRA is taken here; have peft merge it, or convert it to "
                "plain LoRA"
            )
    if config.get("init_lora_weights") in ALTERS_THE_BASE:
        raise UserError(
            f"{file}: init_lora_weights = {config['init_lora_weights']!r} trained a base other than the one on the "
            "disk; have peft convert it to plain LoRA first"
        )
