"""Families beyond the first eight: vLLM and the training graph agree on one copy, whatever is particular about them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from grpo.config.schema import Lora, Model
from grpo.model.base_weights import BaseWeights
from grpo.model.inventory import account
from grpo.model.layout import Layout
from grpo.model.source import open_source
from grpo.policy.policy import Policy
from tests.helpers.families import NEWCOMERS, WITH_IMAGES, save_family, save_with_images

PROMPTS = [[5, 9, 33, 7, 21, 64, 90, 11, 2, 3], [12, 140, 77]]
CPU = torch.device("cpu")


def load(folder: Path, *, load_in_4bit: bool = False) -> tuple[BaseWeights, Policy]:
    """Base and policy of the model in `folder`, with an adapter that does something on every linear layer."""
    model = Model(name=str(folder), load_in_4bit=load_in_4bit, dtype="float32")
    source = open_source(model)
    parts = [part for linear in Layout.of(source.config).linears.values() for part in linear.parts]
    base = BaseWeights(source, model, device=CPU, dtype=torch.float32)
    policy = Policy(
        base, Lora(r=4, lora_alpha=8, target_modules=sorted({part.split(".")[-1] for part in parts})), seed=1
    )
    assert set(policy.adapter_layers()) == set(parts)
    torch.manual_seed(2)
    for layer in policy.adapter_layers().values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    return base, policy


def largest_difference(base: BaseWeights, policy: Policy, tokens: int = 30) -> float:
    """Between vLLM's logprobs and the training graph's on packed rows that share prompts, adapter on and off."""
    from grpo.rollout.engine import Engine, EngineSettings, Request, SamplingSettings

    engine, worst = Engine(base, policy, EngineSettings(max_seq_length=64, max_num_seqs=8)), 0.0
    try:
        requests = [Request(index, PROMPTS[index % 2], seed=index) for index in range(6)]
        for adapter in (True, False):
            done = {c.request_id: c for c in engine.generate(requests, SamplingSettings(0.9, tokens), adapter=adapter)}
            order = sorted(done, key=lambda index: index % 2)  # neighbours share a prompt
            rollout = torch.tensor([logprob for index in order for logprob in done[index].logprobs])
            rows = [PROMPTS[index % 2] for index in order], [done[index].token_ids for index in order]
            with torch.no_grad():
                if adapter:
                    scored = policy.score(*rows, temperature=0.9)
                else:
                    with policy.reference():
                        scored = policy.score(*rows, temperature=0.9)
            worst = max(worst, float((rollout - scored.logprobs).abs().max()))
    finally:
        engine.close()
    return worst


def check(reference: Any, folder: Path) -> None:
    """The training graph computes what transformers' model `reference` does on text, and vLLM what the graph does."""
    base, policy = load(folder)
    completion = [(13 * number) % 150 for number in range(30)]
    with policy.reference():
        scored = policy.score(PROMPTS, [completion, completion], temperature=0.7, chunk_tokens=3)
    expected = []
    for prompt in PROMPTS:
        with torch.no_grad():
            logits = reference(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        expected.append(torch.log_softmax(logits / 0.7, -1)[range(30), completion])
    if base.config.model_type != "phi3":  # transformers chooses its factors by the longest of a row, we of a run
        torch.testing.assert_close(scored.logprobs, torch.cat(expected), atol=3e-5, rtol=1e-5)
    assert largest_difference(base, policy) < 1e-4


QUICK = ("ministral3", "granite", "smollm3", "phi3")
"""Families whose exceptions are of different kinds; `make test-wide` has all."""


@pytest.mark.vllm
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in QUICK else pytest.mark.wide) for name in NEWCOMERS]
)
def test_vllm_the_training_graph_and_transformers_agree(family: str, tmp_path: Path) -> None:
    check(save_family(tmp_path, family), tmp_path)


@pytest.mark.vllm
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name == "gemma3" else pytest.mark.wide) for name in WITH_IMAGES]
)
def test_of_a_model_that_takes_images_the_decoder_of_text_is_read(family: str, tmp_path: Path) -> None:
    check(save_with_images(tmp_path, family), tmp_path)
    (notice,) = account(open_source(Model(name=str(tmp_path))))
    assert "not used:" in notice and "images" in notice
