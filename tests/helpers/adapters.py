"""Adapters made by peft on tiny models, with values that matter, and what peft itself computes with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

TOKENS = torch.tensor([[5, 9, 33, 7, 21, 64, 90, 11], [3, 3, 80, 41, 17, 6, 150, 2]])


def train_nothing(
    model: Any, folder: Path, base: Path | str, targets: str | list[str] = "all-linear", **keys: Any
) -> PeftModel:
    """`model` with a random adapter on it, saved to `folder` as trained on `base`."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=12, target_modules=targets, task_type="CAUSAL_LM", **keys)
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.05)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return adapted.eval()


@torch.no_grad()
def logits(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    """float32 [sequences, length, vocabulary]."""
    return model(input_ids=tokens).logits.float()
