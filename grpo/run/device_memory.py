"""What of a device's memory a run may take, asked of the device before a model is loaded."""

from __future__ import annotations

from typing import Any

import torch

from grpo.config.schema import Config
from grpo.errors import UserError
from grpo.memory.fit import check_memory, lighter_weights, with_weight_update
from grpo.memory.full_finetuning import check_trainable
from grpo.memory.gpus import as_found
from grpo.memory.plan import weight_bytes
from grpo.memory.tower import TowerSizes
from grpo.model.vision import Vision


def architecture_of(device: torch.device) -> int:
    """86 for a GPU of compute capability 8.6."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def tower_sizes(vision: Vision | None) -> TowerSizes | None:
    """The sizes of a vision tower that is read; None of a model of text alone."""
    return None if vision is None else TowerSizes.of(vision.config.vision_config.to_dict())


def fitted_kv_bytes(
    config: Config,
    model: Any,
    device: torch.device,
    dtype: torch.dtype,
    loaded: int = 0,
    tower: TowerSizes | None = None,
) -> int | None:
    """KV cache for a GPU on which `loaded` bytes of the model are; None where the engine decides. `model`:
    transformers' configuration. Raises UserError if the run cannot fit."""
    if device.type != "cuda":
        return config.rollout.kv_cache_memory_bytes
    free, total = torch.cuda.mem_get_info(device)
    gpu = as_found(torch.cuda.get_device_name(device), architecture_of(device), total)
    return check_memory(config, model.get_text_config(), dtype.itemsize, free + loaded, total, gpu, tower)


def check_weights(
    config: Config, model: Any, device: torch.device, dtype: torch.dtype, tower: TowerSizes | None
) -> None:
    """Raise UserError if the weights alone exceed a GPU's free memory."""
    if device.type != "cuda":
        return
    free, shape = torch.cuda.mem_get_info(device)[0], model.get_text_config()
    needed = weight_bytes(config, shape, dtype.itemsize, on_gpu=True)
    if tower is not None and not config.model.offload_tower:
        needed += tower.weight_bytes(dtype.itemsize)
    if needed > free:
        raise UserError(
            f"the GPU has {free / 1e9:.1f} GB free, and the weights of {config.model.name} need {needed / 1e9:.1f} GB; "
            f"{lighter_weights(config, shape)}"
        )


def with_form(config: Config, model: Any, device: torch.device, dtype: torch.dtype) -> Config:
    """`config` with the form of the weights' update that it leaves open, where all weights are trained. `model`:
    transformers' configuration."""
    if not config.model.full_finetuning:
        return config
    check_trainable(model.get_text_config(), str(dtype).removeprefix("torch."))
    memory = torch.cuda.mem_get_info(device) if device.type == "cuda" else None
    gpu = None
    if memory is not None:
        gpu = as_found(torch.cuda.get_device_name(device), architecture_of(device), memory[1])
    return with_weight_update(config, model.get_text_config(), dtype.itemsize, memory, gpu)
