"""Recomputing layers: the same bits as without, less kept, and dropout drawn again as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo.config.schema import Lora, parse_config
from grpo.kernels.lora_mlp import lora_mlp
from grpo.model.base_weights import BaseWeights
from grpo.model.source import open_source
from grpo.policy.activation_checkpointing import recomputed
from grpo.policy.fused_layers import install_fused_layers
from grpo.policy.policy import Policy
from tests.helpers.families import save_family
from tests.helpers.tiny import FAMILIES, VOCABULARY, save_tiny

PROMPTS = [[3, 5, 9, 11], [3, 5, 9, 11], [8, 4, 7]]
COMPLETIONS = [[10, 20, 30], [40, 50], [60, 70, 80, 90, 100]]


def base_of(folder: Path, family: str = "llama") -> BaseWeights:
    save_tiny(folder, family, num_hidden_layers=3)
    values = {"model": {"name": str(folder), "load_in_4bit": False}, "task": {"name": "t"}}
    model = parse_config(values).model
    return BaseWeights(open_source(model), model, device=torch.device("cpu"), dtype=torch.float32)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseWeights:
    return base_of(tmp_path_factory.mktemp("llama"))


def policy_of(base: BaseWeights, **lora: object) -> Policy:
    policy = Policy(base, Lora(r=4, **lora), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in policy.adapter_layers().values():
            layer.lora_B["default"].weight.normal_(std=0.05, generator=generator)
    return policy


def learn(policy: Policy, mode: str, times: int = 1) -> tuple[Tensor, list[Tensor]]:
    """The logprobs and the gradients of `times` micro-batches, accumulated."""
    policy.recompute_layers(mode)
    policy.model.train()
    torch.manual_seed(5)
    for _ in range(times):
        scored = policy.score(PROMPTS, COMPLETIONS, temperature=1.0)
        (scored.logprobs * torch.linspace(-1, 1, len(scored.logprobs))).sum().backward()
    grads = [parameter.grad for parameter in policy.parameters()]
    for parameter in policy.parameters():
        parameter.grad = None
    assert all(grad is not None for grad in grads)
    return scored.logprobs.detach(), grads


def assert_same_bits(found: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]]) -> None:
    assert found[0].equal(expected[0])
    assert all(grad.equal(other) for grad, other in zip(found[1], expected[1], strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_mode_gives_the_same_bits(family: str, tmp_path: Path) -> None:
    policy = policy_of(base_of(tmp_path, family))
    expected = learn(policy, "none", times=2)
    assert expected[1][0].abs().max() > 0
    for mode in ("layer", "offload"):
        assert_same_bits(learn(policy, mode, times=2), expected)


def test_keys_that_later_layers_see_too_get_their_gradient_from_all_of_them(tmp_path: Path) -> None:
    """Gemma 4: its last two layers have the keys of the first two, and every layer has an input for each token."""
    save_family(tmp_path, "gemma4_text")
    values = {"model": {"name": str(tmp_path), "load_in_4bit": False}, "task": {"name": "t"}}
    model = parse_config(values).model
    base = BaseWeights(open_source(model), model, device=torch.device("cpu"), dtype=torch.float32)
    policy = policy_of(base)
    names = [name for name, parameter in policy.model.named_parameters() if parameter.requires_grad]
    expected = learn(policy, "none", times=2)
    assert all(grad.abs().max() > 0 for grad in expected[1])
    for mode in ("layer", "offload"):
        found = learn(policy, mode, times=2)
        assert found[0].equal(expected[0])
        for name, grad, other in zip(names, found[1], expected[1], strict=True):
            torch.testing.assert_close(grad, other, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_every_mode_gives_the_same_bits_with_the_kernels_layers(family: str, tmp_path: Path) -> None:
    base = base_of(tmp_path, family)
    policy = policy_of(base)
    assert install_fused_layers(policy.decoder, base) == 3
    expected = learn(policy, "none", times=2)
    for mode in ("mlp", "layer", "offload"):
        assert_same_bits(learn(policy, mode, times=2), expected)


def test_a_layer_that_runs_again_makes_no_output_that_no_backward_reads(
    base: BaseWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = policy_of(base)
    install_fused_layers(policy.decoder, base)
    made: list[bool] = []

    def recording(*arguments: Any, **named: Any) -> Tensor:
        made.append(named["output"])
        return lora_mlp(*arguments, **named)

    monkeypatch.setattr("grpo.policy.fused_layers.lora_mlp", recording)
    learn(policy, "none")
    assert made == [True] * 3
    made.clear()
    learn(policy, "layer")
    assert made == [True] * 3 + [False] * 3, "three layers forward, and again in the backward pass"


@pytest.mark.parametrize("mode", ["none", "offload"])
def test_what_trainers_switch_is_this_recomputation_in_the_mode_that_was_chosen(base: BaseWeights, mode: str) -> None:
    """TRL's DPOTrainer switches it off and on again at every step."""
    policy = policy_of(base)
    policy.recompute_layers(mode)
    layers = policy.decoder.model.layers
    chosen = [layer._gradient_checkpointing_func for layer in layers]
    policy.model.gradient_checkpointing_disable()
    assert not policy.model.is_gradient_checkpointing
    policy.model.gradient_checkpointing_enable({"use_reentrant": True})
    assert all(layer.gradient_checkpointing for layer in layers)
    assert [layer._gradient_checkpointing_func for layer in layers] == chosen
    fresh = policy_of(base)
    fresh.model.gradient_checkpointing_enable()
    assert all(layer._gradient_checkpointing_func.func is recomputed for layer in fresh.decoder.model.layers)


@pytest.mark.parametrize("mode", ["layer", "offload"])
def test_dropout_is_the_same_when_a_layer_runs_again(base: BaseWeights, mode: str) -> None:
    policy = policy_of(base, lora_dropout=0.4)
    expected = learn(policy, "none", times=2)
    assert not expected[0].equal(learn(policy_of(base), "none", times=2)[0]), "no dropout was drawn"
    assert_same_bits(learn(policy, mode, times=2), expected)


@pytest.mark.parametrize("mode", ["layer", "offload"])
def test_layers_without_an_adapter_pass_the_gradient_on(base: BaseWeights, mode: str) -> None:
    policy = policy_of(base, target_modules=["q_proj"])
    for name, layer in policy.adapter_layers().items():
        if ".0." not in name:
            layer.requires_grad_(False)
    expected = learn(policy, "none")
    assert len(expected[1]) == 2
    assert_same_bits(learn(policy, mode), expected)


def test_offloaded_inputs_leave_the_device_and_come_back_once(base: BaseWeights) -> None:
    """Of the layers' inputs only the last stays until the backward; each is fetched while its successor runs."""
    policy = policy_of(base)
    policy.recompute_layers("offload")
    policy.model.train()
    store = policy.decoder.model.layers[0]._gradient_checkpointing_func.args[1]
    scored = policy.score(PROMPTS, COMPLETIONS, temperature=1.0)
    kept = [store.newest()]
    while kept[-1].before is not None:
        kept.append(kept[-1].before)
    assert len(kept) == 3
    assert [entry.on_device is not None for entry in kept] == [True, False, False]
    last = kept[0].load()
    assert last.shape[-1] == 128 and kept[1].on_device is not None and kept[2].on_device is None
    kept[1].load()
    assert kept[2].on_device is not None
    del scored


def test_a_forward_without_backward_leaves_nothing_behind(base: BaseWeights) -> None:
    policy = policy_of(base)
    expected = learn(policy, "none")
    policy.recompute_layers("offload")
    policy.model.train()
    store = policy.decoder.model.layers[0]._gradient_checkpointing_func.args[1]
    scored = policy.score(PROMPTS, COMPLETIONS, temperature=1.0)
    assert store.newest() is not None
    del scored
    assert store.newest() is None
    assert_same_bits(learn(policy, "offload"), expected)


def test_scoring_without_gradient_keeps_nothing(base: BaseWeights) -> None:
    policy = policy_of(base)
    policy.recompute_layers("offload")
    policy.model.train()
    store = policy.decoder.model.layers[0]._gradient_checkpointing_func.args[1]
    with policy.reference():
        policy.score(PROMPTS, COMPLETIONS, temperature=1.0)
    assert store.newest() is None


def test_less_is_saved_for_the_backward(base: BaseWeights) -> None:
    """Bytes that autograd holds from the layers: all, their inputs, nothing."""
    policy = policy_of(base)
    tokens = 4 + 2 + 1 + 3 + 4
    found = {}
    for mode in ("none", "layer", "offload"):
        policy.recompute_layers(mode)
        policy.model.train()
        seen: dict[int, int] = {}

        def remember(tensor: Tensor, seen: dict[int, int] = seen) -> Tensor:
            if tensor.shape[-2:] == (tokens, 128) and not isinstance(tensor, torch.nn.Parameter):
                seen[tensor.untyped_storage().data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            scored = policy.score(PROMPTS, COMPLETIONS, temperature=1.0)
        found[mode] = len(seen)
        del scored
    assert found["none"] > 2 * found["layer"] > 0
    assert found["layer"] - found["offload"] == 3
    assert VOCABULARY == 160
