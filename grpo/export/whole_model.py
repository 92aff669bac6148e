"""An adapter of the language model inside a model that takes images, named as peft and vLLM name that one's modules.

While training the language model stands alone; where the whole model is loaded its modules have a name more.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from grpo.model.adapter_config import ADAPTER_CONFIG, ADAPTER_WEIGHTS, NOT_THE_TOWER
from grpo.model.text_decoder import plain_name
from grpo.model.vision import TOWER, Vision, meta_model
from grpo.model.weight_source import Source
from grpo.policy.adapter_files import PEFT_PREFIX, AdapterFile


def write_for_whole_model(adapter: AdapterFile, base: Source, config: dict[str, Any], folder: Path) -> None:
    """Write `adapter` with `config`, its adapter_config.json, to `folder` for the whole model of `base`.

    Its modules are named by their ends, as before, and those of the tower left out; where they were named otherwise,
    each by its whole name.
    """
    assert base.vision is not None
    names = whole_names(base.vision)
    tensors = {}
    for name, tensor in adapter.tensors().items():
        module, lora, rest = name.removeprefix(PEFT_PREFIX).partition(".lora_")
        tensors[PEFT_PREFIX + names.get(module, module) + lora + rest] = tensor.contiguous()
    if isinstance(config["target_modules"], list) and not config.get("exclude_modules"):
        config = config | {"exclude_modules": NOT_THE_TOWER}
    else:
        selected = adapter.check(base.config.get_text_config())
        unset = {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
        config = config | unset | {"target_modules": sorted(names[name] for name in selected)}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def whole_names(vision: Vision) -> dict[str, str]:
    """A module of the decoder alone -> its name in the whole model."""
    return {plain_name(name): name for name, _ in meta_model(vision).named_modules() if TOWER not in name.split(".")}
