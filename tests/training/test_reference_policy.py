"""grpo/training/reference_policy.py: the KL reference is the adapter that the run began with, or the base, also after a
resume."""

from __future__ import annotations

import pytest
import torch

from grpo.config.schema import Lora, Loss, Model
from grpo.model.base_weights import BaseWeights
from grpo.model.source import open_source
from grpo.policy.fused_layers import install_fused_layers
from grpo.policy.policy import Policy
from grpo.training.reference_policy import set_reference
from tests.helpers.tiny import save_tiny

START, BASE = Loss(beta=0.1), Loss(beta=0.1, reference="base")
PROMPTS, COMPLETIONS = [[5, 9, 33], [12, 140]], [[8, 15, 99], [9, 8, 7, 6]]


@pytest.fixture
def new_policy(tmp_path):
    save_tiny(tmp_path / "model", "llama")
    settings = Model(name=str(tmp_path / "model"), load_in_4bit=False)

    def make(**lora):
        base = BaseWeights(open_source(settings), settings, device=torch.device("cpu"), dtype=torch.float32)
        return Policy(base, Lora(r=4, **lora), kernels="torch")

    return make


def move(policy, seed):
    """What training does to the adapter."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for layer in policy.adapter_layers().values():
            layer.lora_A["default"].weight.add_(torch.randn_like(layer.lora_A["default"].weight) * 0.1)
            layer.lora_B["default"].weight.add_(torch.randn_like(layer.lora_B["default"].weight) * 0.1)


def scores(policy):
    return policy.score(PROMPTS, COMPLETIONS, temperature=1.0).logprobs


def reference_scores(policy):
    with policy.reference():
        return scores(policy)


@torch.no_grad()
def test_the_reference_is_the_starting_adapter_or_the_base(new_policy, tmp_path):
    policy = new_policy()
    base = scores(policy)
    move(policy, 1)
    policy.save_adapter(tmp_path / "warm")
    begun = new_policy(init=tmp_path / "warm")
    started = scores(begun)
    assert torch.equal(started, scores(policy)) and not torch.allclose(started, base, atol=1e-2)
    for settings, expected in ((START, started), (BASE, base)):
        begun.load_adapter(tmp_path / "warm")
        set_reference(begun, settings, tmp_path, resume=False)
        torch.testing.assert_close(reference_scores(begun), expected)
        move(begun, 2)
        moved = scores(begun)
        torch.testing.assert_close(reference_scores(begun), expected)
        assert not torch.allclose(moved, expected, atol=1e-2)
        assert torch.equal(scores(begun), moved)


def test_a_fresh_adapters_start_is_the_base_and_nothing_is_kept(new_policy, tmp_path):
    policy = new_policy()
    base = scores(policy).detach()
    set_reference(policy, START, tmp_path, resume=False)
    move(policy, 1)
    torch.testing.assert_close(reference_scores(policy), base)
    assert not (tmp_path / "reference_adapter").exists()


def test_a_resumed_run_has_the_reference_that_it_began_with(new_policy, tmp_path):
    policy = new_policy()
    move(policy, 1)
    set_reference(policy, START, tmp_path, resume=False)
    started = reference_scores(policy)
    move(policy, 2)
    policy.save_adapter(tmp_path / "checkpoint")
    resumed = new_policy()
    set_reference(resumed, START, tmp_path, resume=True)
    resumed.load_adapter(tmp_path / "checkpoint")
    assert torch.equal(reference_scores(resumed), started)
    assert torch.equal(scores(resumed), scores(policy))


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("mode", ["none", "layer"])
def test_the_reference_between_a_forward_and_its_backward_changes_no_gradient(kernels, mode, new_policy):
    policy = new_policy()
    if kernels:
        install_fused_layers(policy.decoder, policy.base)
    move(policy, 1)
    policy.remember_reference()
    move(policy, 2)
    policy.recompute_layers(mode)
    policy.model.train()

    def gradients(between):
        logprobs = scores(policy)
        between()
        logprobs.sum().backward()
        found = [parameter.grad.clone() for parameter in policy.parameters()]
        policy.model.zero_grad()
        return found

    expected = gradients(lambda: None)
    assert all(map(torch.equal, gradients(lambda: reference_scores(policy)), expected))
