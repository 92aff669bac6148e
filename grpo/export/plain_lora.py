"""An adapter that started from a part of its base, as plain LoRA on the whole base.

Training was on W - s B0 A0, so that what it changed of W is s (B A - B0 A0): twice the rank, the same scale.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo.model.adapter_config import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from grpo.model.initial_adapter import Factors, InitialLayer
from grpo.policy.adapter_files import PEFT_PREFIX, AdapterFile, factor_names


def write_plain_lora(
    adapter: AdapterFile, initial: Mapping[str, InitialLayer], config: Mapping[str, Any], folder: Path
) -> None:
    """Write the adapter's difference from what it started from into `folder`. config: its adapter_config.json.

    Layers that started from nothing have zeros for the second half of their rank.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for name in sorted(adapter.names):
        if not name.endswith(".lora_A.weight"):
            continue
        layer = name.removeprefix(PEFT_PREFIX).removesuffix(".lora_A.weight")
        trained = Factors(*(factor.float() for factor in adapter.factors(layer)))
        start = initial[layer].start if layer in initial else Factors(*map(torch.zeros_like, trained))
        a_name, b_name = factor_names(layer)
        tensors[a_name] = torch.cat([trained.a, start.a])
        tensors[b_name] = torch.cat([trained.b, -start.b], 1)
    save_file(tensors, str(folder / ADAPTER_WEIGHTS), metadata={"format": "pt"})
    (folder / ADAPTER_CONFIG).write_text(json.dumps(doubled(config), indent=2) + "\n", encoding="utf-8")


def doubled(config: Mapping[str, Any]) -> dict[str, Any]:
    """adapter_config.json with twice the ranks, at the same scales."""
    # alpha / r, or alpha / sqrt(r)
    factor = 2**0.5 if config.get("use_rslora") else 2
    values = {**config, "init_lora_weights": True, "loftq_config": {}}
    values |= {"r": 2 * config["r"], "lora_alpha": factor * config["lora_alpha"]}
    for key, times in (("rank_pattern", 2), ("alpha_pattern", factor)):
        values[key] = {pattern: times * value for pattern, value in (config.get(key) or {}).items()}
    return values
