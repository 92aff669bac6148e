"""grpo/policy/adapter_survival.py: the share of an adapter's effect that a 16-bit policy shows, against a plain float32
model."""

from __future__ import annotations

import math

import pytest
import torch

from grpo.config.schema import Lora, Model
from grpo.export.compare import adapter_share
from grpo.model.base_weights import BaseWeights
from grpo.model.source import open_source
from grpo.policy import adapter_survival as survival
from grpo.policy.adapter_survival import adapter_survival, float32_graph, float32_logprobs
from grpo.policy.lora_linear import ADAPTER
from grpo.policy.policy import Policy
from tests.helpers.tiny import save_tiny

PROMPTS = [[5, 9, 33, 2], [5, 9, 33, 2], [12, 40, 7]]
COMPLETIONS = [[8, 15, 99], [71, 3], [9, 8, 7, 6, 5, 4]]


def made(folder, family, dtype, four_bit=False, **lora):
    save_tiny(folder, family)
    settings = Model(name=str(folder), load_in_4bit=four_bit)
    base = BaseWeights(open_source(settings), settings, device=torch.device("cpu"), dtype=dtype)
    return Policy(base, Lora(r=4, **lora), seed=0, kernels="torch")


def move(policy, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in policy.adapter_layers().values():
            weight = layer.lora_B[ADAPTER].weight
            weight.copy_(torch.randn(weight.shape, generator=generator) * size)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"])
@pytest.mark.parametrize("four_bit", [False, True])
def test_the_float32_graph_is_that_of_a_float32_policy(family, four_bit, tmp_path):
    policy = made(tmp_path, family, torch.float32, four_bit)
    move(policy, 0.1)
    expected = policy.score(PROMPTS, COMPLETIONS, temperature=1.0).logprobs
    with torch.no_grad():
        found = float32_logprobs(policy, float32_graph(policy), PROMPTS, COMPLETIONS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_head_in_slices_is_the_head(monkeypatch, tmp_path):
    policy = made(tmp_path, "gemma2", torch.float32)
    whole = float32_logprobs(policy, float32_graph(policy), PROMPTS, COMPLETIONS)
    monkeypatch.setattr(survival, "HEAD_ROWS", 7)
    torch.testing.assert_close(float32_logprobs(policy, float32_graph(policy), PROMPTS, COMPLETIONS), whole)


def test_a_large_effect_survives_and_an_idle_one_or_a_float32_policy_is_not_measured(tmp_path):
    policy = made(tmp_path / "16", "llama", torch.bfloat16)
    assert adapter_survival(policy, PROMPTS, COMPLETIONS) is None
    move(policy, 0.3)
    assert adapter_survival(policy, PROMPTS, COMPLETIONS) == pytest.approx(1.0, abs=0.05)
    assert adapter_survival(policy, [], []) is None and adapter_survival(policy, PROMPTS[:1], [[]]) is None
    wide = made(tmp_path / "32", "llama", torch.float32)
    move(wide, 0.3)
    assert adapter_survival(wide, PROMPTS, COMPLETIONS) is None


def test_measuring_changes_neither_the_policy_nor_random_numbers(tmp_path):
    policy = made(tmp_path, "llama", torch.bfloat16)
    move(policy, 0.3)
    before, state = policy.score(PROMPTS, COMPLETIONS, temperature=1.0).logprobs, torch.get_rng_state()
    adapter_survival(policy, PROMPTS, COMPLETIONS)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(policy.score(PROMPTS, COMPLETIONS, temperature=1.0).logprobs, before)


def test_out_of_memory_is_no_reason_to_end_a_run(tmp_path, monkeypatch):
    policy = made(tmp_path, "llama", torch.bfloat16)
    move(policy, 0.3)

    def full(*arguments):
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(survival, "float32_effect", full)
    assert adapter_survival(policy, PROMPTS, COMPLETIONS) is None


def test_an_export_that_shows_half_of_an_adapter_is_said_to_show_half():
    generator = torch.Generator().manual_seed(0)
    base, effect = (torch.randn(4, 7, 50, generator=generator) for _ in range(2))
    small = 1e-3 * effect
    assert adapter_share(base, base + small, base + small) == pytest.approx(1.0)
    assert adapter_share(base, base + small, base) == 0.0
    assert adapter_share(base, base + small, base + small / 2) == pytest.approx(0.5, abs=1e-3)
    assert math.isnan(adapter_share(base, base, base))
