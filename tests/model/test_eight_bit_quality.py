"""What 8 bit costs a real model, SmolLM2: the divergence of its next-token distributions from the 16-bit model's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from grpo.config.schema import Model
from grpo.export.compare import TEXTS, Distance
from grpo.kernels.attention import Packing
from grpo.model.base_weights import BaseWeights
from grpo.model.source import open_source
from grpo.policy.graph import build_graph
from tests.helpers.checkpoints import fp8
from tests.helpers.tiny_run import SMOLLM2

CPU = torch.device("cpu")
pytestmark = [pytest.mark.wide, pytest.mark.slow, pytest.mark.timeout(1800)]


def load(**keys: Any) -> BaseWeights:
    model = Model(name=SMOLLM2, **keys)
    return BaseWeights(open_source(model), model, device=CPU, dtype=torch.float32)


@torch.no_grad()
def logits(base: BaseWeights) -> Tensor:
    """[tokens of all texts, vocabulary]"""
    graph, tokenizer, found = build_graph(base).eval(), open_source(Model(name=SMOLLM2)).tokenizer(), []
    for text in TEXTS:
        tokens = torch.tensor([tokenizer(text)["input_ids"]])
        positions = torch.arange(tokens.shape[1])[None]
        packing = Packing.of_lengths([tokens.shape[1]], CPU)
        hidden = graph.model(input_ids=tokens, position_ids=positions, use_cache=False, packing=packing)
        found.append(hidden.last_hidden_state[0] @ base.head().t())
    return torch.cat(found)


def test_int8_and_fp8_stay_near_the_16_bit_model() -> None:
    plain = load(load_in_4bit=False)
    exact = logits(plain)
    in_int8 = Distance.between(exact, logits(load(load_in_8bit=True))).kl
    for linear in plain.linears.values():
        for part in linear.parts:
            weight = linear.part(part)[0].weight
            weight.copy_(fp8(weight, 128, 128)[2])
    in_fp8 = Distance.between(exact, logits(plain)).kl
    print(f"KL to the 16-bit model: int8 {in_int8:.4f}, FP8 in blocks {in_fp8:.4f} nats")
    assert 0 < in_int8 < 0.01
    assert in_int8 < in_fp8 < 0.03
