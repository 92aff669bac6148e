"""vLLM and the training graph on an 8-bit base, held as a GPU holds it: the same logprobs, one storage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from grpo.config.schema import Lora, Model
from grpo.model.base_weights import BaseWeights
from grpo.model.source import open_source
from grpo.policy.policy import Policy
from tests.helpers.checkpoints import quantize_folder_8bit
from tests.helpers.graph_comparison import largest_difference
from tests.helpers.tiny import save_tiny


class Packed(BaseWeights):
    """Held on a CPU as a GPU holds it: codes and scales."""

    packed = property(lambda self: self.quantized, lambda self, value: None)  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("form", "keep_16bit"),
    [
        ("qwen", ["k_proj"]),
        pytest.param(None, [], marks=pytest.mark.wide),
        pytest.param("ministral", [], marks=pytest.mark.wide),
        pytest.param("compressed-block", [], marks=pytest.mark.wide),
    ],
)  # fmt: skip
def test_vllm_and_the_training_graph_agree_on_codes(form: str | None, keep_16bit: list[str], tmp_path: Path) -> None:
    save_tiny(tmp_path, "qwen3")
    if form is not None:
        quantize_folder_8bit(tmp_path, form)
    model = Model(name=str(tmp_path), load_in_8bit=True, dtype="float32", keep_16bit=keep_16bit)
    base = Packed(open_source(model), model, device=torch.device("cpu"), dtype=torch.float32)
    segments = base.linears["model.layers.0.self_attn.qkv_proj"].segments
    assert any(segment.weight.element_size() == 1 for segment in segments)
    assert len(segments) == (3 if keep_16bit else 1)
    policy = Policy(base, Lora(r=4, lora_alpha=8), seed=1)
    torch.manual_seed(2)
    for layer in policy.adapter_layers().values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    assert largest_difference(base, policy, tokens=12) < 1e-4
